"""Each client's statistics in the run folder: ``statistics/<client id>.safetensors``.

From them a client is forgotten exactly and its contribution told, without asking anybody again.
A file is written before the round's commit and anew if the round is repeated, so it counts only
where the commit's slot ``reported`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedtl.errors import InputError, writing
from fedtl.results.files import write_atomic
from fedtl.types import ClientUpdates

STATISTICS = "statistics"

KEPT_BYTES = 2**31
"""Statistics of all clients together that a run keeps at most."""


def keep_statistics(run: Path, updates: ClientUpdates, names: Sequence[str]) -> None:
    """Write one file per client; replaces an older one.

    Args:
        run: the run folder.
        updates: accepted statistics.
        names: all clients' names, by id.
    """
    folder = run / STATISTICS
    with writing("statistics", run):
        folder.mkdir(exist_ok=True)
    for i, client in enumerate(updates.clients.tolist()):
        own = {name: np.ascontiguousarray(tensor[i]) for name, tensor in updates.tensors.items()}
        content = save(own, metadata={"client": names[client]})
        last = i + 1 == len(updates.clients)
        write_atomic(folder / f"{client}.safetensors", content, last=last)


def keeps_statistics(run: Path) -> bool:
    """Whether any client's statistics were kept."""
    return (run / STATISTICS).is_dir()


def kept_names(run: Path) -> dict[int, str]:
    """The name of every client whose statistics were kept, by id, in the order of the ids."""
    names: dict[int, str] = {}
    for path in sorted((run / STATISTICS).glob("[0-9]*.safetensors"), key=lambda p: int(p.stem)):
        with _opened(path) as file:
            names[int(path.stem)] = file.metadata()["client"]
    return names


def read_statistics(run: Path, client: int) -> dict[str, npt.NDArray[Any]]:
    """One client's statistics, as it sent them. Raises InputError where they are not."""
    with _opened(run / STATISTICS / f"{client}.safetensors") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"a client's statistics cannot be read ({error})",
            where=path,
            do="Only runs of fed3r and afl with strategy.keep_statistics have them",
        ) from error

"""A population on disk, so that other processes of this machine can host its clients.

The feature matrix is by far the largest part: where it is a stored ``.npy`` file already, only its
path is noted, and every process maps the same pages. There is no pickle in any of the files.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from fedtl.errors import EnvironmentFault, writing
from fedtl.types import Population, Rows, Tail

FACTS = "population.json"
FEATURES = "features.npy"
TAIL_TENSORS = "tail.safetensors"
PREFIX, OWNER, LONGEST = "fedtl-run-", "owner", 20
ARRAYS = ("labels", "train.index", "train.offsets", "test.index", "test.offsets")


@contextmanager
def scratch_folder(name: str | None = None) -> Iterator[Path]:
    """A temporary folder, gone afterwards.

    Folders of processes that were killed are swept away on the way: nobody locks their owner file
    any more.

    Args:
        name: of the folder, which must not exist; its path is short, as Unix sockets in it have
            107 characters. Default: a name and place of the system's choice.

    Raises:
        EnvironmentFault: there is no room for temporary files.
    """
    parent = Path(tempfile.gettempdir())
    if name is not None and len(str(parent)) > LONGEST:
        parent = Path("/tmp")
    _sweep(parent)
    with writing("temporary files", parent):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX)) if name is None else parent / (PREFIX + name)
        folder.mkdir(mode=0o700, exist_ok=name is None)
        owner = os.open(folder / "new", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(folder / "new", folder / OWNER)  # only now can it be swept
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)


def _sweep(parent: Path) -> None:
    for file in parent.glob(f"{PREFIX}*/{OWNER}"):
        with suppress(OSError):  # locked, somebody else's, or gone already
            owner = os.open(file, os.O_RDWR)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(file.parent, ignore_errors=True)
            finally:
                os.close(owner)


def save_population(population: Population, folder: Path) -> None:
    """Write a population into ``folder``, which must exist.

    Raises:
        EnvironmentFault: the disk is full or the folder cannot be written.
    """
    train, test = population.train, population.test
    arrays: tuple[npt.NDArray[Any], ...] = (
        population.labels, train.index, train.offsets, test.index, test.offsets,
    )  # fmt: skip
    with writing("the clients' data for other processes", folder):
        features = stored_file(population.features)
        if features is None:
            np.save(folder / FEATURES, population.features, allow_pickle=False)
        for name, array in zip(ARRAYS, arrays, strict=True):
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        facts: dict[str, Any] = {
            "features": str(features or folder.resolve() / FEATURES),
            "classes": population.classes,
            "names": population.names,
            "domains": population.domains,
        }
        if (tail := population.tail) is not None:
            facts["tail"] = {"recipe": tail.recipe, "shape": tail.shape, "width": tail.width}
            save_file(dict(tail.tensors), folder / TAIL_TENSORS)
        (folder / FACTS).write_text(json.dumps(facts))


def stored_file(features: npt.NDArray[Any]) -> Path | None:
    """The ``.npy`` file that holds exactly this matrix, or None if it must be copied to one."""
    if not isinstance(features, np.memmap) or features.filename is None or features.mode != "r":
        return None
    path = Path(features.filename).resolve()
    if path.suffix != ".npy" or not path.is_file():
        return None
    whole = np.load(path, mmap_mode="r")
    # A part of the file, or one in another order, has another shape, strides or dtype.
    same = (whole.shape, whole.strides, whole.dtype) == (
        features.shape, features.strides, features.dtype,
    )  # fmt: skip
    return path if same else None


@functools.lru_cache(maxsize=4)
def open_population(folder: Path) -> Population:
    """The population that ``save_population`` wrote; opened once per process.

    Every array is a read-only memory map, so processes share its pages.

    Raises:
        EnvironmentFault: the folder or the feature file is gone or damaged.
    """
    try:
        facts = json.loads((folder / FACTS).read_text())
        features = np.load(facts["features"], mmap_mode="r")
        labels, train_index, train_offsets, test_index, test_offsets = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in ARRAYS
        )
        tail = None
        if (told := facts.get("tail")) is not None:
            tensors = load_file(folder / TAIL_TENSORS)
            tail = Tail(told["recipe"], tuple(told["shape"]), told["width"], tensors)
        names, domains, classes = (tuple(facts[name]) for name in ("names", "domains", "classes"))
    except (OSError, ValueError, KeyError) as error:
        raise EnvironmentFault(
            "the clients' data are gone or damaged on the way to another process",
            do="Start the run again; 'fedtl cache rm' removes damaged features",
        ) from error
    return Population(
        features,
        labels,
        classes,
        Rows(train_index, train_offsets),
        Rows(test_index, test_offsets),
        names,
        domains,
        tail,
    )

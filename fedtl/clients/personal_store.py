"""What a client keeps to itself from one round to the next, on the disk where it lives.

Nothing of this is ever sent: residuals of compressed updates, and all else a client has of its own.
A state is filed under the round that made it and asked for by "before round r": a killed run that
does a round again reads what it read the first time, and ends with the same bits.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedtl.errors import EnvironmentFault, writing
from fedtl.results.files import write_atomic

KEEP = 4
"""Rounds kept: a run keeps three commits and may go back two, and its clients may be one ahead."""

SHOWN = 60
"""Characters of a client's name in the name of its folder; the hash behind them tells it apart."""

DIGEST = "blake2b"

Tensors = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class PersonalStore:
    """Arrays by purpose, client and round, a safetensors file each.

    Clients go by name, as their numbers differ between engines. No two clients share a file, so
    processes that look after different clients need no lock.

    Attributes:
        folder: belongs to one run; made when first needed.
    """

    folder: Path

    def load(
        self, purpose: str, client: str, before_round: int
    ) -> tuple[int, dict[str, npt.NDArray[Any]]] | None:
        """The client's newest state of an earlier round than ``before_round``, and that round.

        Args:
            purpose: "residual", say; what is kept for one purpose is not seen for another.

        Returns:
            None where there is none.

        Raises:
            EnvironmentFault: the file is damaged or cannot be read.
        """
        folder = self._folder(purpose, client)
        earlier = [round for round in _rounds(folder) if round < before_round]
        if not earlier:
            return None
        return max(earlier), _read(_file(folder, max(earlier)))

    def save(self, purpose: str, client: str, round: int, tensors: Tensors) -> None:
        """Keep the client's state after ``round``, whole or not at all.

        Of earlier rounds the newest stay, ``KEEP`` with this one. Later ones go: a run that does a
        round again has gone back, and what followed then is no part of it.

        Raises:
            EnvironmentFault: the disk is full or the folder cannot be written.
        """
        whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        folder = self._folder(purpose, client)
        with writing(f"what {client!r} keeps", folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(
                _file(folder, round), save(whole, metadata={DIGEST: _digest(whole)}), last=False
            )
            rounds = _rounds(folder)
            kept = sorted(r for r in rounds if r <= round)[-KEEP:]
            for old in set(rounds) - set(kept):
                _file(folder, old).unlink(missing_ok=True)

    def _folder(self, purpose: str, client: str) -> Path:
        """A name that every file system takes, whatever the client is called."""
        told_apart = hashlib.blake2b(client.encode("utf-8", "surrogatepass"), digest_size=8)
        shown = quote(client, safe="", errors="replace")[:SHOWN]
        return self.folder / f"{purpose}-{shown}-{told_apart.hexdigest()}"


def _file(folder: Path, round: int) -> Path:
    return folder / f"round-{round:06d}.safetensors"


def _rounds(folder: Path) -> list[int]:
    names = os.listdir(folder) if folder.is_dir() else []
    found = (re.fullmatch(r"round-(\d+)\.safetensors", name) for name in names)
    return [int(match[1]) for match in found if match]


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with safe_open(path, "np") as file:
            told = (file.metadata() or {}).get(DIGEST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        _damaged(path, str(error))
    if told != _digest(tensors):
        _damaged(path, "its hash does not match")
    return tensors


def _damaged(path: Path, why: str) -> NoReturn:
    raise EnvironmentFault(
        "what a client keeps cannot be read",
        where=path,
        got=why,
        do="Delete this file, and the client goes on from what it kept before",
    )


def _digest(tensors: Tensors) -> str:
    """BLAKE2b over names, types, shapes and values: safetensors itself notices no changed bit."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype.str} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()

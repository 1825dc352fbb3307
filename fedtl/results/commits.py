"""Commits of a run: after a kill at any point, the last whole one is found again.

A commit is a safetensors file (head, strategy state) and a JSON manifest with its BLAKE2b, written
last: without its manifest nothing is committed. The newest ``KEEP`` stay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedtl.failpoints import failpoint
from fedtl.results.files import write_atomic

KEEP = 3
"""Enough to survive a damaged newest commit twice over; a head is small."""

FORMAT = 1


@dataclass(frozen=True)
class Commit:
    """One committed round.

    Attributes:
        round: rounds completed, 0 before the first.
        tensors: all arrays of head and strategy state, by name.
        facts: everything else, JSON values only.
    """

    round: int
    tensors: Mapping[str, npt.NDArray[Any]]
    facts: Mapping[str, Any]


def write_commit(folder: Path, commit: Commit) -> None:
    """Commit a round: tensors first, manifest last, then old ones are dropped."""
    stem = f"round-{commit.round:06d}"
    content = save({k: np.ascontiguousarray(v) for k, v in commit.tensors.items()})
    write_atomic(folder / f"{stem}.safetensors", content, last=False)
    failpoint("before_manifest", commit.round)
    manifest = {
        "format": FORMAT,
        "round": commit.round,
        "blake2b": _hash(content, commit.round, commit.facts),
        "facts": commit.facts,
    }
    write_atomic(folder / f"{stem}.json", json.dumps(manifest).encode())
    for old in sorted(folder.glob("round-*.json"))[:-KEEP]:
        old.unlink()
        old.with_suffix(".safetensors").unlink(missing_ok=True)


def read_commit(folder: Path) -> tuple[Commit | None, list[str]]:
    """The newest whole commit, and a note for every newer one that is damaged.

    Returns:
        ``(None, notes)`` where there is none.
    """
    notes: list[str] = []
    for manifest_path in sorted(folder.glob("round-*.json"), reverse=True):
        try:
            return _read(manifest_path), notes
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            notes.append(f"commit {manifest_path.stem} is damaged ({error}): going back one")
    return None, notes


def _hash(content: bytes, round: int, facts: Mapping[str, Any]) -> str:
    """BLAKE2b over tensors, round and facts: nothing of a commit can change unnoticed."""
    digest = hashlib.blake2b(content)
    digest.update(json.dumps([round, facts], sort_keys=True).encode())
    return digest.hexdigest()


def _read(manifest_path: Path) -> Commit:
    manifest = json.loads(manifest_path.read_bytes())
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']}, this fedtl reads {FORMAT}")
    content = manifest_path.with_suffix(".safetensors").read_bytes()
    if _hash(content, manifest["round"], manifest["facts"]) != manifest["blake2b"]:
        raise ValueError("its hash does not match")
    return Commit(manifest["round"], load(content), manifest["facts"])

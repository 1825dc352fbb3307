"""Modules snap on: heads and adapters as files, found, shown, and put on their trunk again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedtl.errors import InputError
from fedtl.results.module_card import HEAD, Card, read_card
from fedtl.results.tables import seed_folders
from fedtl.simulation import find_run

DEEPEST = 4
"""Folders below a given one that are looked into."""

MOST = 10_000
"""Files that are looked at."""


def find_module(name: str) -> Card:
    """The module of a file, or of a run by path, name, or ``last``.

    Raises InputError where there is none, or a folder holds several.
    """
    path = find_run(name)
    if path.is_dir():
        if seeds := seed_folders(path):
            raise InputError(
                "holds a run for each seed, and each has a module",
                where=path,
                allowed=", ".join(str(seed) for seed in seeds[:8]),
                do=f"Name one of them, e.g. {seeds[0]}",
            )
        if not (path / HEAD).is_file():
            raise InputError(
                "this run has no module: it is not finished, or no run",
                where=path,
                do=f"Type 'fedtl resume {path}', or 'fedtl module ls'",
            )
        path = path / HEAD
    return read_card(path)


def list_modules(folders: Sequence[Path]) -> tuple[list[Card], list[tuple[Path, str]]]:
    """Every module in ``runs/`` or the given folders, newest first; and files that are none, why.

    Raises InputError for a folder that is not there.
    """
    cards, others = [], []
    for folder in folders or [Path("runs")]:
        if folders and not folder.is_dir():
            raise InputError("no such folder", where=folder)
        for path in _files(folder):
            try:
                cards.append(read_card(path))
            except InputError as error:
                others.append((path, str(error.got or error.what)))
    cards.sort(key=lambda card: (-card.path.stat().st_mtime, str(card.path)))
    return cards, others


def _files(folder: Path) -> Iterator[Path]:
    """Files that may be modules; links to folders are not followed."""
    left, counted = [(folder, 0)], 0
    while left:
        place, depth = left.pop()
        try:
            entries = sorted(place.iterdir()) if place.is_dir() else []
        except OSError:
            continue
        for path in entries:
            counted += 1
            if counted > MOST:
                return
            if path.is_dir() and not path.is_symlink():
                if depth < DEEPEST and path.name not in ("checkpoints", "records", "personal"):
                    left.append((path, depth + 1))
            elif path.suffix == ".safetensors" and path.is_file():
                yield path

"""Writing a file so that a reader or a crash sees the old one or the new one, never half of it."""

from __future__ import annotations

import os
from pathlib import Path

from fedtl.errors import InputError, writing


def write_atomic(path: Path, content: bytes, *, last: bool = True) -> None:
    """Temporary name in the same folder, fsync, replace, fsync of the folder.

    Where several files belong together, only the ``last`` needs the fsync of their folder.

    Raises EnvironmentFault when the disk is full or the folder cannot be written; no temporary
    file stays behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path.name, path.parent):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if last:
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_unwritable(*paths: Path | None) -> None:
    """Raise InputError, before anything slow, where a file cannot be written: None is no file."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise InputError("there is no such folder to write to", where=path.parent)
        if path is not None and path.is_dir():
            raise InputError("this is a folder, and a file is to be written", where=path)

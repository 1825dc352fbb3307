"""Writing a file so that a reader or a crash sees the old one or the new one, never half of it."""

from __future__ import annotations

import os
from pathlib import Path

from fedtl.errors import writing


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

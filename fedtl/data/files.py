"""The files of a data folder, or of a zip archive with the same layout."""

from __future__ import annotations

import errno
import os
import stat
import threading
import zipfile
import zlib
from itertools import accumulate, chain
from pathlib import Path
from typing import Protocol

from fedtl.errors import InputError, SecurityRefusal

MAX_FILE_BYTES = 200_000_000
"""No photograph is larger; reading one file must not fill the memory."""

MAX_DEPTH = 8
"""Folders inside folders that are looked at: enough to say that something lies too deep."""


class Files(Protocol):
    """Named files below one root, readable from any thread.

    Attributes:
        root: what the user named.
        paths: of every file, relative, with ``/``; hidden ones are left out.
        folders: of every folder below the root, in the same form.
    """

    root: Path
    paths: tuple[str, ...]
    folders: tuple[str, ...]

    def read(self, path: str) -> bytes:
        """All bytes of one of ``paths``; OSError where that is impossible."""
        ...


def open_files(path: Path) -> Files:
    """The folder or the zip archive at ``path``.

    Raises:
        InputError: there is nothing, or neither folder nor zip archive.
        SecurityRefusal: an entry leads out of it or is absurdly large.
    """
    if path.is_dir():
        return FolderFiles(path)
    if not path.exists():
        raise InputError("no such folder or .zip file", where="data.path", got=str(path))
    if not zipfile.is_zipfile(path):
        raise InputError(
            "neither a folder nor a .zip file",
            where="data.path",
            got=str(path),
            do="Name the folder that holds the class folders",
        )
    return ZipFiles(path)


def unwrapped(files: Files, extensions: tuple[str, ...], depth: int) -> Files:
    """An archive whose images all lie one folder too deep, as that one folder.

    Who packs a folder often packs the folder itself. ``depth``: folders that an image lies in.
    """
    paths = [path for path in files.paths if path.lower().endswith(extensions)]
    tops = {path.partition("/")[0] for path in paths}
    deeper = all(path.count("/") == depth + 1 for path in paths)
    if not isinstance(files, ZipFiles) or len(tops) != 1 or not deeper:
        return files
    return InnerFiles(files, tops.pop() + "/")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not the user's data (dot files, what macOS adds to archives)."""
    return name.startswith(".") or name == "__MACOSX"


class FolderFiles:
    """A folder. Links may not leave it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._real = os.path.realpath(root)
        paths: list[str] = []
        folders: list[str] = []
        leaving: list[str] = []
        self._walk("", 1, paths, folders, leaving)
        if leaving:
            raise SecurityRefusal(
                "links that lead out of the data folder",
                where=str(root),
                got=f"{', '.join(sorted(leaving)[:5])} ({len(leaving)} in all)",
                do="Copy the files into the folder",
            )
        self.paths, self.folders = tuple(paths), tuple(folders)

    def _walk(
        self, folder: str, depth: int, paths: list[str], folders: list[str], leaving: list[str]
    ) -> None:
        try:
            entries = list(os.scandir(os.path.join(self._real, folder)))
        except OSError as error:
            raise InputError(
                f"cannot list this folder: {error.strerror}", where=str(self.root / folder)
            ) from error
        for entry in entries:
            if is_hidden(entry.name):
                continue
            path = f"{folder}{entry.name}"
            if entry.is_symlink() and not self._inside(entry.path):
                leaving.append(path)
            elif entry.is_dir():
                folders.append(path)
                if depth < MAX_DEPTH:  # also ends a link to a folder above
                    self._walk(f"{path}/", depth + 1, paths, folders, leaving)
            else:
                paths.append(path)

    def _inside(self, path: str) -> bool:
        return os.path.commonpath([self._real, os.path.realpath(path)]) == self._real

    def read(self, path: str) -> bytes:
        """All bytes of one file; a pipe or device is never opened for waiting."""
        full = os.path.join(self._real, path)
        with open(os.open(full, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise OSError(errno.EFBIG, f"larger than {MAX_FILE_BYTES} bytes")
            return file.read()


class ZipFiles:
    """A zip archive, read member by member; nothing is extracted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        try:
            self._archive = zipfile.ZipFile(root)
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise InputError(f"cannot open this archive: {error}", where=str(root)) from error
        members = self._archive.infolist()
        self._check(members)
        names = [m.filename for m in members if not any(map(is_hidden, m.filename.split("/")))]
        self.paths = tuple(name for name in names if not name.endswith("/"))
        nested = {name.rpartition("/")[0] for name in names}
        parents = (accumulate(parent.split("/"), "{}/{}".format) for parent in nested)
        self.folders = tuple(sorted(set(chain.from_iterable(parents)) - {""}))

    def _check(self, members: list[zipfile.ZipInfo]) -> None:
        unsafe = [
            member.filename
            for member in members
            if member.filename.startswith(("/", "\\"))
            or ".." in member.filename.replace("\\", "/").split("/")
            or member.filename[1:2] == ":"
        ]
        large = [m.filename for m in members if m.file_size > MAX_FILE_BYTES]
        for names, what in (
            (unsafe, "members whose path leads out of the archive"),
            (large, f"members that claim more than {MAX_FILE_BYTES} bytes"),
        ):
            if names:
                shown = f"{', '.join(map(repr, names[:5]))} ({len(names)} in all)"
                raise SecurityRefusal(what, where=str(self.root), got=shown)
        locked = [m.filename for m in members if m.flag_bits & 0x1]
        if locked:
            raise InputError(
                "encrypted members",
                where=str(self.root),
                got=f"{locked[0]!r} ({len(locked)} in all)",
                do="Make the archive again without a password",
            )
        if len({member.filename for member in members}) < len(members):
            raise InputError("two members with the same path", where=str(self.root))

    def read(self, path: str) -> bytes:
        """All bytes of one member; never more than it claims."""
        try:
            with self._lock:
                return self._archive.read(path)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise OSError(errno.EIO, f"damaged member: {error}") from error


class InnerFiles:
    """The files below one folder of others."""

    def __init__(self, files: Files, top: str) -> None:
        self.root, self._files, self._top = files.root, files, top
        within = (path for path in files.paths if path.startswith(top))
        self.paths = tuple(path.removeprefix(top) for path in within)
        within = (folder for folder in files.folders if folder.startswith(top))
        self.folders = tuple(folder.removeprefix(top) for folder in within)

    def read(self, path: str) -> bytes:
        """All bytes of one file."""
        return self._files.read(self._top + path)

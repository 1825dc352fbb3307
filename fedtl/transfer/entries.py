"""One entry of the feature store on disk: written whole or not at all, checked when opened.

An entry is a folder: ``features.npy`` [n, D], ``content.npy`` uint8 [n, 16], ``kept.npy`` int64 [n]
and ``manifest.json``, which holds a hash of each of the three.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fedtl import machine
from fedtl.errors import InputError, writing
from fedtl.results.files import sync_folder
from fedtl.types import Float32, Int64

if TYPE_CHECKING:
    from fedtl.transfer.extraction import Forward

NAMED = 5
"""Bad files that a manifest, or a message, names."""

MANIFEST = "manifest.json"
ARRAYS = ("features.npy", "content.npy", "kept.npy")
_CHUNK_BYTES = 4 << 20


Opened = tuple[dict[str, Any], tuple[npt.NDArray[Any], npt.NDArray[np.uint8], Int64]]
"""Manifest, and features, content and kept."""


class DamagedEntry(Exception):
    """An entry whose files are not what its manifest says; says which in one line."""


class FeatureFile:
    """Rows of ``features.npy``, written in any order from any thread.

    Plain writes, not a memory map: on a full disk a map ends the process with a bus error.
    """

    def __init__(self, path: Path, rows: int, dim: int, dtype: str) -> None:
        self._path, self._dtype, self._lock = path, np.dtype(dtype), threading.Lock()
        self._row_bytes = dim * self._dtype.itemsize
        self._shape = (rows, dim)
        with writing("features", path.parent):
            self._file: BinaryIO = path.open("wb")
            self._start = _write_header(self._file, self._shape, self._dtype)
            self._file.truncate(self._start + rows * self._row_bytes)

    def write(self, first: int, features: Float32) -> None:
        """Rows ``first`` and following, float32 [b, D], stored as the file's dtype.

        Raises:
            InputError: a feature is beyond what the dtype can hold.
            EnvironmentFault: the disk is full.
        """
        block = stored_as(features, self._dtype)
        with self._lock, writing("features", self._path.parent):
            self._file.seek(self._start + first * self._row_bytes)
            self._file.write(block.data)

    def keep(self, rows: Int64) -> None:
        """Close the file; where some rows are bad, only ``rows`` of it stay."""
        with writing("features", self._path.parent):
            self._file.close()
            if len(rows) == self._shape[0]:
                return
            whole = np.load(self._path, mmap_mode="r")
            shorter = self._path.with_suffix(".kept")
            step = max(1, _CHUNK_BYTES // self._row_bytes)
            with shorter.open("wb") as file:
                _write_header(file, (len(rows), self._shape[1]), self._dtype)
                for start in range(0, len(rows), step):
                    file.write(np.ascontiguousarray(whole[rows[start : start + step]]).data)
            del whole
            os.replace(shorter, self._path)

    def close(self) -> None:
        """Close the file, whatever is in it."""
        self._file.close()


def stored_as(features: Float32, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Features in the dtype they are kept in; raises InputError where one does not fit."""
    kept = np.dtype(dtype)
    with np.errstate(over="ignore"):  # looked for in the next line
        block = np.ascontiguousarray(features, dtype=kept)
    if kept != np.float32 and not np.isfinite(block).all():
        raise InputError(
            f"a feature is too large for {kept}",
            where="backbone.feature_dtype",
            got=f"{float(np.abs(features).max()):.3g}",
            allowed=f"at most {float(np.finfo(kept).max):.3g}",
            do="Set backbone.feature_dtype = 'float32'",
        )
    return block


def seal_features(
    folder: Path,
    made_of: Mapping[str, Any],
    forward: Forward,
    content: npt.NDArray[np.uint8],
    kept: Int64,
    bad: Sequence[str],
    began: float,
    threads: int,
) -> None:
    """Write what stands beside a finished matrix, and seal the entry.

    Args:
        made_of: ``format``, ``backbone``, ``data`` and ``dtype`` of the entry's key.
        forward: what ran the trunk.
        content: a hash of each row's content, uint8 [n, 16].
        kept: which examples the rows are, int64 [n].
        bad: what could not be decoded, by name and reason.
        began: when the work began, by ``time.perf_counter``.
    """
    with writing("the feature store", folder):
        np.save(folder / ARRAYS[1], content)
        np.save(folder / ARRAYS[2], kept)
    manifest = {
        **made_of,
        "rows": len(kept),
        "dim": forward.dim,
        "way": forward.way,
        "trunk_before": forward.trunk_hash,
        "trunk_after": forward.state_hash(),
        "max_difference": forward.max_difference,
        "flops": getattr(forward, "flops", None),
        "created": time.time(),
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "build_seconds": time.perf_counter() - began,
        "num_bad": len(bad),
        "bad": list(bad[:NAMED]),
        "versions": machine.versions(),
        "cpu": machine.cpu_model(),
    }
    seal(folder, manifest, threads)


def seal(folder: Path, manifest: dict[str, Any], threads: int) -> None:
    """Make the finished files of an entry last, then write its manifest with their hashes."""
    with writing("the feature store", folder):
        for name in ARRAYS:
            with (folder / name).open("rb+") as file:
                os.fsync(file.fileno())
        hashes = {name: hash_array_file(folder / name, threads) for name in ARRAYS}
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            sealed = {**manifest, "blake2b": hashes}
            sealed["manifest_blake2b"] = _hash_manifest(sealed)
            json.dump(sealed, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)


def open_entry(folder: Path, threads: int) -> Opened:
    """An entry's manifest and its arrays (read-only; the features memory-mapped), all verified.

    Raises:
        DamagedEntry: a file is missing, cut short or changed.
    """
    manifest = read_manifest(folder)
    for name in ARRAYS:
        try:
            found = hash_array_file(folder / name, threads)
        except (OSError, ValueError) as error:
            raise DamagedEntry(f"{name} cannot be read") from error
        if found != manifest["blake2b"][name]:
            raise DamagedEntry(f"{name} is not what was written")
    features = np.load(folder / ARRAYS[0], mmap_mode="r")
    content, kept = (np.load(folder / name) for name in ARRAYS[1:])
    content.setflags(write=False)
    kept.setflags(write=False)
    return manifest, (features, content, kept)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an entry; raises DamagedEntry."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        seal = manifest.pop("manifest_blake2b")
        if seal == _hash_manifest(manifest) and set(manifest["blake2b"]) == set(ARRAYS):
            return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedEntry(f"{MANIFEST} cannot be read") from error
    raise DamagedEntry(f"{MANIFEST} is not what was written")


def _hash_manifest(manifest: dict[str, Any]) -> str:
    content = json.dumps(manifest, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def hash_array_file(path: Path, threads: int) -> str:
    """BLAKE2b over the BLAKE2b of each 4 MiB of a file, hashed by ``threads`` threads."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        whole = hashlib.blake2b(str(len(content)).encode(), digest_size=32)
        with memoryview(content) as view, ThreadPoolExecutor(threads, "verify") as pool:
            for digest in pool.map(_hash_chunk, _chunks(view)):
                whole.update(digest)
    return whole.hexdigest()


def _chunks(view: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(view), _CHUNK_BYTES):
        yield view[start : start + _CHUNK_BYTES]


def _hash_chunk(chunk: memoryview) -> bytes:
    with chunk:
        return hashlib.blake2b(chunk, digest_size=32).digest()


def _write_header(file: BinaryIO, shape: tuple[int, int], dtype: np.dtype[Any]) -> int:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.tell()


def folder_bytes(folder: Path) -> int:
    """What a folder's files take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove_folder(folder: Path) -> int:
    """Delete a folder of the store where it is there; bytes freed."""
    if not folder.exists():
        return 0
    freed = folder_bytes(folder)
    with writing("the feature store", folder):
        shutil.rmtree(folder)
    return freed

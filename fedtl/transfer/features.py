"""The feature store: the trunk runs once per image, its features are kept by what made them.

The key is a hash of the backbone's identity (weights, cut, preprocessing), the dtype, the way the
trunk was run, the data's fingerprint and the store's format: another model or another resize never
finds these features. Simulated and real clients use the same store.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from fedtl.data.examples import BadFiles, Images
from fedtl.errors import EnvironmentFault, InputError, writing
from fedtl.results.files import sync_folder
from fedtl.transfer import entries, extraction, pipeline
from fedtl.transfer.backbones import Backbone
from fedtl.transfer.entries import Opened
from fedtl.transfer.onnx_forward import WayRefused
from fedtl.types import Int64

FORMAT = 3
_SPARE_BYTES = 16 << 20  # left free on the disk beside what the features take


@dataclass(frozen=True)
class StoredFeatures:
    """Features of one data source under one backbone.

    Attributes:
        matrix: [n_kept, D] float32 or float16, a read-only memory map.
        content: BLAKE2b-128 of each image's decoded pixels, uint8 [n_kept, 16].
        kept: which examples the rows are, int64 [n_kept], ascending.
        seconds: what this call took.
        cached: whether the features were there already.
        way: how the trunk was run.
        num_bytes: size of the matrix on disk.
        notes: what the user should know, one line each.
        path: the ``.npy`` file of the matrix, for other processes to map.
        max_difference: to eager float32 torch on a sample, absolute.
        flops: of the trunk for one example, None where they were not counted.
    """

    matrix: npt.NDArray[np.floating]
    content: npt.NDArray[np.uint8]
    kept: Int64
    seconds: float
    cached: bool
    way: str
    num_bytes: int
    notes: tuple[str, ...]
    path: Path
    max_difference: float
    flops: float | None = None


@dataclass(frozen=True)
class StoreEntry:
    """One line of the store's listing; times are seconds since the epoch."""

    key: str
    backbone: str
    images: int
    num_bytes: int
    created: float
    last_used: float


@dataclass(frozen=True)
class _Order:
    """One call of ``FeatureStore.features`` on its way down."""

    backbone: Backbone
    images: Images
    fingerprint: str
    dtype: str
    on_bad_file: str
    threads: int
    progress: Callable[[int, int], None] | None
    started: float = field(default_factory=time.perf_counter)

    def key(self, way: str) -> str:
        identity = {"format": FORMAT, "backbone": self.backbone.identity(), "way": way}
        return extraction.digest_of({**identity, "dtype": self.dtype, "data": self.fingerprint})


class FeatureStore:
    """Stored features under ``root`` (default ``$FEDTL_CACHE``, else ``~/.cache/fedtl``)."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(os.environ.get("FEDTL_CACHE") or "~/.cache/fedtl").expanduser()
        self._folder = self.root / "features"
        self._quarantine = self._folder / "quarantine"
        self.exports = extraction.Exports(self.root / "trunks")

    def features(
        self,
        backbone: Backbone,
        images: Images,
        fingerprint: str,
        *,
        dtype: str = "float32",
        way: str = "auto",
        device: str = "auto",
        on_bad_file: str = "stop",
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> StoredFeatures:
        """The features of ``images`` under ``backbone``, from the store or made now.

        Of several processes that ask for the same, one makes them and the others wait for it.

        Args:
            backbone: any but ``identity``.
            images: the data's images.
            fingerprint: hash over the data's content; part of the key.
            dtype: "float32" or "float16".
            way: "auto", "onnx", "torch"; "auto" takes CUDA where there is one, else ONNX Runtime,
                else torch, and the one taken is part of the key.
            device: "auto", "cpu" or "cuda".
            on_bad_file: "stop", or "skip" to leave out images that cannot be decoded.
            threads: workers that decode and run the trunk.
            progress: called with (images done, images) in this thread; may raise to stop.

        Raises:
            InputError: images that cannot be decoded, no image at all, or a trunk not frozen.
            EnvironmentFault: not enough disk, the store cannot be written, no CUDA.
        """
        order = _Order(backbone, images, fingerprint, dtype, on_bad_file, max(1, threads), progress)
        if len(images) == 0:
            raise InputError("there is no image to extract features from", where="data")
        resolved = extraction.resolve_way(way, device, backbone, self.exports)
        notes: list[str] = []
        while True:
            try:
                return self._open_or_build(order, resolved, notes)
            except WayRefused as refusal:
                if way == "onnx" or resolved == "torch":
                    raise EnvironmentFault(
                        f"{backbone.name} cannot be run this way: {refusal}",
                        where="backbone.extraction",
                        got=repr(resolved),
                        do="Set backbone.extraction = 'auto' or 'torch'",
                    ) from refusal
                notes.append(f"{backbone.name} is run by torch, not by {resolved}: {refusal}")
                resolved = "torch"

    def width(
        self,
        backbone: Backbone,
        images: Images,
        fingerprint: str,
        *,
        dtype: str = "float32",
        way: str = "auto",
        device: str = "auto",
    ) -> int | None:
        """The width of stored features, or None where there are none; nothing is verified here."""
        order = _Order(backbone, images, fingerprint, dtype, "stop", 1, None)
        key = order.key(extraction.resolve_way(way, device, backbone, self.exports))
        return self.entry_width(key)

    def entry_width(self, key: str) -> int | None:
        """The width of the features under a key, None where there are none."""
        try:
            return int(entries.read_manifest(self._folder / key)["dim"])
        except entries.DamagedEntry:
            return None

    def entries(self) -> tuple[StoreEntry, ...]:
        """What the store holds, least recently used first; damaged entries are left out."""
        found = []
        for path in self._folder.glob(f"*/{entries.MANIFEST}"):
            if path.parent.name.startswith("."):
                continue
            try:
                manifest = entries.read_manifest(path.parent)
            except entries.DamagedEntry:
                continue
            found.append(
                StoreEntry(
                    path.parent.name,
                    str(manifest["backbone"]["model"]),
                    int(manifest["rows"]),
                    entries.folder_bytes(path.parent),
                    float(manifest["created"]),
                    path.stat().st_mtime,
                )
            )
        return tuple(sorted(found, key=lambda entry: entry.last_used))

    def remove(self, key: str | None = None) -> int:
        """Delete one entry, or everything with exported trunks and quarantine; bytes freed.

        Raises:
            InputError: no such entry.
        """
        known = {entry.key for entry in self.entries()}
        if key is not None and key not in known:
            raise InputError(
                "there is no such entry in the feature store",
                where=self._folder,
                got=key,
                do="'fedtl cache ls' shows all entries",
            )
        freed = 0
        for name in [key] if key is not None else sorted(known):
            with self._locked(name, []):
                freed += entries.remove_folder(self._folder / name)
        if key is None:
            freed += sum(map(entries.remove_folder, (self._quarantine, self.root / "trunks")))
        return freed

    def entry(
        self, key: str, fill: Callable[[Path], None], threads: int, notes: list[str]
    ) -> tuple[Opened, bool]:
        """An entry, verified, and whether it was there; if not, ``fill`` seals it in a folder."""
        with self._locked(key, notes):
            for stale in self._folder.glob(f".building-{key}-*"):
                shutil.rmtree(stale, ignore_errors=True)  # its owner died: the lock is ours
            found = self._sound(key, threads, notes)
            if not (cached := found is not None):
                self._make(key, fill)
                found = entries.open_entry(self._folder / key, threads)
            with writing("the feature store", self._folder):
                os.utime(self._folder / key / entries.MANIFEST)  # last used
        return found, cached

    def _open_or_build(self, order: _Order, way: str, notes: list[str]) -> StoredFeatures:
        key = order.key(way)
        found, cached = self.entry(key, partial(self._build, order, way), order.threads, notes)
        manifest, (matrix, content, kept) = found
        bad = [str(name) for name in manifest["bad"]]
        if bad:
            if order.on_bad_file == "stop":
                raise bad_images(bad, int(manifest["num_bad"]), len(order.images))
            notes.append(f"left out {named(bad, int(manifest['num_bad']))}")
        return StoredFeatures(
            matrix,
            content,
            kept,
            time.perf_counter() - order.started,
            cached,
            way,
            matrix.nbytes,
            tuple(notes),
            self.path(key),
            float(manifest["max_difference"]),
            manifest.get("flops"),
        )

    def _sound(self, key: str, threads: int, notes: list[str]) -> Opened | None:
        """The entry, verified; a damaged one is moved away, and that is noted."""
        folder = self._folder / key
        if not folder.exists():
            return None
        try:
            return entries.open_entry(folder, threads)
        except entries.DamagedEntry as damage:
            with writing("the feature store", self._quarantine):
                self._quarantine.mkdir(exist_ok=True)
                entries.remove_folder(self._quarantine / key)
                os.replace(folder, self._quarantine / key)
            notes.append(f"stored features were damaged ({damage}); moved away and made again")
            return None

    def _make(self, key: str, fill: Callable[[Path], None]) -> None:
        with writing("the feature store", self._folder):
            folder = Path(tempfile.mkdtemp(prefix=f".building-{key}-", dir=self._folder))
        try:
            fill(folder)
            with writing("the feature store", self._folder):
                os.replace(folder, self._folder / key)
                sync_folder(self._folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _build(self, order: _Order, way: str, folder: Path) -> None:
        sample = partial(pipeline.sample_batch, order.images, order.backbone.preprocessing, 16)
        forward = extraction.open_forward(way, order.backbone, self.exports, sample)
        self.check_disk(len(order.images), forward.dim, order.dtype)
        self._fill(order, forward, folder)

    def _fill(self, order: _Order, forward: extraction.Forward, folder: Path) -> None:
        images, count = order.images, len(order.images)
        stop = order.on_bad_file == "stop"
        file = entries.FeatureFile(folder / entries.ARRAYS[0], count, forward.dim, order.dtype)
        began = time.perf_counter()
        try:
            result = pipeline.extract(
                images,
                order.backbone.preprocessing,
                forward,
                file.write,
                stop_on_bad=stop,
                threads=order.threads,
                progress=order.progress,
            )
            extraction.refuse_changed(forward.trunk_hash, forward.state_hash())
            names = [str(error) for error in result.bad.values()]
            if names and (stop or len(names) == count):
                raise bad_images(names, len(names), count)
            kept = np.setdiff1d(np.arange(count, dtype=np.int64), list(result.bad))
            file.keep(kept)
        finally:
            file.close()
        made_of = {
            "format": FORMAT,
            "backbone": order.backbone.identity(),
            "data": order.fingerprint,
            "dtype": order.dtype,
        }
        content = result.content[kept]
        entries.seal_features(folder, made_of, forward, content, kept, names, began, order.threads)

    def path(self, key: str) -> Path:
        """The ``.npy`` file of an entry's matrix."""
        return self._folder / key / entries.ARRAYS[0]

    def check_disk(self, rows: int, dim: int, dtype: str) -> None:
        """Raise EnvironmentFault where so many features do not fit."""
        needed = rows * (dim * np.dtype(dtype).itemsize + pipeline.CONTENT_BYTES + 8)
        free = shutil.disk_usage(self._folder).free
        if needed + _SPARE_BYTES > free:
            raise EnvironmentFault(
                "not enough disk for the features",
                where=self.root,
                got=f"{free:,} bytes free",
                allowed=f"at least {needed + _SPARE_BYTES:,} bytes",
                do="Free some space ('fedtl cache rm'), set FEDTL_CACHE to another folder, "
                "or backbone.feature_dtype = 'float16'",
            )

    @contextmanager
    def _locked(self, key: str, notes: list[str]) -> Iterator[None]:
        with writing("the feature store", self.root):
            locks = self._folder / "locks"
            locks.mkdir(parents=True, exist_ok=True)
            # The kernel frees it when its owner dies, however it dies.
            lock = FileLock(locks / f"{key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                began = time.perf_counter()
                lock.acquire(poll_interval=0.1)
                waited = time.perf_counter() - began
                notes.append(f"waited {waited:.1f} s for another process with the same features")
        try:
            yield
        finally:
            lock.release()


def bad_images(names: list[str], num_bad: int, total: int) -> BadFiles:
    """The error for images that cannot be decoded; names at most the first few."""
    every = num_bad == total
    return BadFiles(
        "no image can be decoded" if every else "some images cannot be decoded",
        num_bad,
        where="data",
        got=named(names, num_bad),
        do="Mend or remove them"
        + ("" if every else ", or set data.on_bad_file = 'skip' to leave them out"),
    )


def named(names: list[str], num_bad: int) -> str:
    """How many bad images there are, and the first few by name and reason."""
    more = f", and {num_bad - entries.NAMED} more" if num_bad > entries.NAMED else ""
    return (
        f"{num_bad} image{'s' if num_bad != 1 else ''}: {'; '.join(names[: entries.NAMED])}{more}"
    )

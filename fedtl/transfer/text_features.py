"""From texts to feature rows: tokens, batches of texts of one length, the trunk, the store.

Batches hold texts of exactly one length, so nothing is padded, and always the same number of them:
kernels are chosen by a batch's shape, and so a text has the same bits whatever stands beside it. A
real client has the features of the same client in simulation. Texts of one length are about twice
as fast as batches in the given order that are padded to their longest (``benchmarks/text.py``).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.data.examples import Texts
from fedtl.errors import EnvironmentFault, InputError
from fedtl.transfer import entries, extraction
from fedtl.transfer.backbones import Backbone
from fedtl.transfer.extraction import Forward
from fedtl.transfer.features import FORMAT, FeatureStore, StoredFeatures
from fedtl.transfer.hf_trunk import PADDING, tokenizer
from fedtl.transfer.onnx_forward import WayRefused
from fedtl.transfer.pipeline import CONTENT_BYTES
from fedtl.types import Float32, Int64

Tokens = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]

BATCH = 4  # texts of one length at once: more fill more batches up, fewer waste the cache
_CUDA_BATCH = 64
_READ = 256  # texts tokenised at once
_CHARACTERS = 4.5  # of a token, in English
_SAMPLE = 8  # texts on which two ways are compared


@dataclass(frozen=True)
class _Order:
    """One call on its way down."""

    store: FeatureStore
    backbone: Backbone
    texts: Texts
    fingerprint: str
    dtype: str
    threads: int
    progress: Progress | None
    started: float = field(default_factory=time.perf_counter)

    def key(self, way: str) -> str:
        identity = {"format": FORMAT, "texts": self.backbone.identity(), "way": way}
        return extraction.digest_of({**identity, "dtype": self.dtype, "data": self.fingerprint})

    @cached_property
    def tokens(self) -> list[Tokens]:
        return read_tokens(self.backbone, self.texts)


def text_features(
    store: FeatureStore,
    backbone: Backbone,
    texts: Texts,
    fingerprint: str,
    *,
    dtype: str = "float32",
    way: str = "auto",
    device: str = "auto",
    threads: int = 1,
    progress: Progress | None = None,
) -> StoredFeatures:
    """The features of ``texts`` under ``backbone``, from the store or made now.

    As ``FeatureStore.features`` for images; ``content`` is the BLAKE2b-128 of each text.

    Raises:
        InputError: a text of no token, no text at all, files of the model that do not fit.
        EnvironmentFault: not enough disk, the store cannot be written, no transformers, no CUDA.
    """
    if not len(texts):
        raise InputError("there is no text to extract features from", where="data")
    order = _Order(store, backbone, texts, fingerprint, dtype, max(1, threads), progress)
    resolved = extraction.resolve_way(way, device, backbone, store.exports)
    notes: list[str] = []
    try:
        return _open_or_build(order, resolved, notes)
    except WayRefused as refusal:
        if way == "onnx" or resolved == "torch":
            raise EnvironmentFault(
                f"{backbone.name} cannot be run this way: {refusal}",
                where="backbone.extraction",
                got=repr(resolved),
                do="Set backbone.extraction = 'auto' or 'torch'",
            ) from refusal
        notes.append(f"{backbone.name} is run by torch, not by {resolved}: {refusal}")
        return _open_or_build(order, "torch", notes)


def embed(store: FeatureStore, backbone: Backbone, texts: Sequence[str], way: str) -> Float32:
    """float32 [n, D] of a few texts, not stored; ``way`` as for the examples, on the CPU."""
    tokens = read_tokens(backbone, texts)
    way = extraction.resolve_way(way.removesuffix("-cuda"), "cpu", backbone, store.exports)
    try:
        forward = extraction.open_forward(
            way, backbone, store.exports, partial(sample, backbone, tokens)
        )
    except WayRefused:
        forward = extraction.open_forward(
            "torch", backbone, store.exports, partial(sample, backbone, tokens)
        )
    features = np.empty((len(tokens), forward.dim), np.float32)

    def write(row: int, one: Float32) -> None:
        features[row] = one[0]

    run(tokens, forward, write, threads=1)
    return features


def read_tokens(backbone: Backbone, texts: Texts | Sequence[str]) -> list[Tokens]:
    """Each text's tokens, int64 [t], at most the trunk's ``max_tokens``; errors name rows only."""
    tokenize, found = tokenizer(backbone), []
    for first in range(0, len(texts), _READ):
        part = [texts[i] for i in range(first, min(first + _READ, len(texts)))]
        found += [np.array(numbers, dtype=np.int64) for numbers in tokenize(part)]
    empty = [i for i, numbers in enumerate(found) if not len(numbers)]
    if empty:
        where = getattr(texts, "where", "text {}".format)
        raise InputError(
            "a text has no token: its characters mean nothing to this model's tokenizer",
            where=where(empty[0]),
            got=f"{len(empty)} such texts",
            do="Leave such rows out",
        )
    return found


def sample(backbone: Backbone, tokens: Sequence[Tokens]) -> Tokens:
    """The shortest and other first texts as one padded batch, int64 [n, T], T above all lengths.

    Texts shorter than the batch are what an export must get right, as well as other lengths than
    that it was made with.
    """
    longest = max(2, int(backbone.settings["max_tokens"]))
    chosen = sorted(tokens[:_SAMPLE], key=len)
    batch = np.full((len(chosen), min(len(chosen[-1]) + 2, longest)), PADDING, np.int64)
    for row, numbers in enumerate(chosen):
        batch[row, : len(numbers)] = numbers
    return batch


def batches(tokens: Sequence[Tokens], size: int) -> Iterator[tuple[Int64, Tokens]]:
    """Rows [b] and their tokens [size, t], by length, then row; the last of a length is filled."""
    lengths = np.array([len(numbers) for numbers in tokens])
    for length in np.unique(lengths)[::-1]:  # the longest first: none is left to the end
        rows = np.flatnonzero(lengths == length)
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            filled = np.concatenate([part, np.repeat(part[:1], size - len(part))])
            yield part, np.stack([tokens[row] for row in filled])


def run(
    tokens: Sequence[Tokens],
    forward: Forward,
    write: Callable[[int, Float32], None],
    *,
    threads: int,
    where: Callable[[int], str] = "text {}".format,
    progress: Progress | None = None,
) -> None:
    """Every text through the trunk.

    Args:
        write: takes (row, float32 [1, D]); called from any worker.
        where: a row for messages.
        progress: called in the caller's thread with (texts done, n); what it raises stops it all.

    Raises:
        InputError: a feature is NaN or infinite.
    """
    size = _CUDA_BATCH if forward.way == "torch-cuda" else BATCH
    stopped: list[bool] = []

    def work(rows: Int64, batch: Tokens) -> int:
        if stopped:
            return 0
        features = forward.run(batch)[: len(rows)]
        if not (finite := np.isfinite(features).all(axis=1)).all():
            raise InputError(
                "the trunk gives NaN or infinity for a text",
                where=where(int(rows[int(np.argmin(finite))])),
                do="Try backbone.weights = 'default'",
            )
        for row, one in zip(rows.tolist(), features[:, None], strict=True):
            write(row, one)
        return len(rows)

    with (
        forward.threads(threads) as start_thread,
        ThreadPoolExecutor(threads, "extract", start_thread) as pool,
    ):
        futures = [pool.submit(work, *batch) for batch in batches(tokens, size)]
        done = 0
        try:
            for future in as_completed(futures):
                done += future.result()
                if progress is not None:
                    progress(done, len(tokens))
        except BaseException:
            stopped.append(True)
            raise


def hash_texts(texts: Texts) -> npt.NDArray[np.uint8]:
    """BLAKE2b-128 of each text, uint8 [n, 16]."""
    encoded = (texts[i].encode("utf-8", "surrogatepass") for i in range(len(texts)))
    hashes = [hashlib.blake2b(text, digest_size=CONTENT_BYTES).digest() for text in encoded]
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(len(texts), CONTENT_BYTES)


def _open_or_build(order: _Order, way: str, notes: list[str]) -> StoredFeatures:
    store, key = order.store, order.key(way)
    opened, cached = store.entry(key, partial(_build, order, way), order.threads, notes)
    manifest, (matrix, content, kept) = opened
    return StoredFeatures(
        matrix,
        content,
        kept,
        time.perf_counter() - order.started,
        cached,
        way,
        matrix.nbytes,
        tuple(notes),
        store.path(key),
        float(manifest["max_difference"]),
        manifest.get("flops"),
    )


def _build(order: _Order, way: str, folder: Path) -> None:
    backbone, texts, tokens = order.backbone, order.texts, order.tokens
    store = order.store
    forward = extraction.open_forward(
        way, backbone, store.exports, partial(sample, backbone, tokens)
    )
    count = len(texts)
    store.check_disk(count, forward.dim, order.dtype)
    file = entries.FeatureFile(folder / entries.ARRAYS[0], count, forward.dim, order.dtype)
    began = time.perf_counter()
    try:
        run(
            tokens,
            forward,
            file.write,
            threads=order.threads,
            where=texts.where,
            progress=order.progress,
        )
        extraction.refuse_changed(forward.trunk_hash, forward.state_hash())
    finally:
        file.close()
    made_of = {
        "format": FORMAT,
        "backbone": backbone.identity(),
        "data": order.fingerprint,
        "dtype": order.dtype,
    }
    content, kept = hash_texts(texts), np.arange(count, dtype=np.int64)
    entries.seal_features(folder, made_of, forward, content, kept, (), began, order.threads)


def text_width(
    backbone: Backbone,
    texts: Texts,
    fingerprint: str,
    *,
    dtype: str = "float32",
    way: str = "auto",
    device: str = "auto",
) -> int | None:
    """The width of stored features, or None where there are none; nothing is verified here."""
    store = FeatureStore()
    order = _Order(store, backbone, texts, fingerprint, dtype, 1, None)
    return store.entry_width(
        order.key(extraction.resolve_way(way, device, backbone, store.exports))
    )


def expected_macs(backbone: Backbone, texts: Texts) -> float:
    """Multiply-adds for one text, from the first texts' lengths; attention itself is left out."""
    config = backbone.skeleton["config"]
    width = _first(config, "hidden_size", "n_embd", "d_model", "dim") or backbone.dim
    layers = _first(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers") or 6
    inner = _first(config, "intermediate_size", "n_inner", "d_ff", "hidden_dim") or 4 * width
    characters = [len(texts[i]) for i in range(min(len(texts), _READ))]
    tokens = np.minimum(np.array(characters) / _CHARACTERS + 2, backbone.settings["max_tokens"])
    return float(tokens.mean() * layers * (4 * width**2 + 2 * width * inner))


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((int(config[name]) for name in names if config.get(name)), None)

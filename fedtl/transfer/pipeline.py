"""From images to feature rows: every worker decodes a batch, runs the trunk on it, hands it on.

A worker runs its forward pass on its own single thread, so decoding of one batch overlaps with the
pass of another, no core is asked for twice, and a batch's bits do not depend on how many workers
there are. (On two cores, two workers of one thread are as fast as one pass on two.)

Kernels are chosen by a batch's shape: torch gives an image other bits in a batch of 3 than in one
of 8, and the same bits anywhere in batches of 8, whatever the others show. So the last batch is
filled up with black images, and an image's features do not depend on the data set around it: a real
client has those of the same client in simulation.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.data.examples import BadImage, Images
from fedtl.errors import InputError
from fedtl.transfer.extraction import Forward
from fedtl.transfer.preprocessing import Preprocessing
from fedtl.types import Float32

CONTENT_BYTES = 16
_SEARCHED = 64  # images looked through for a sample to compare two ways on


@dataclass(frozen=True)
class Extracted:
    """What is known after every image was seen.

    Attributes:
        content: BLAKE2b-128 of each image's decoded pixels, uint8 [n, 16]; zero where bad.
        bad: what could not be decoded, by row.
    """

    content: npt.NDArray[np.uint8]
    bad: dict[int, BadImage]


def extract(
    images: Images,
    preprocessing: Preprocessing,
    forward: Forward,
    write: Callable[[int, Float32], None],
    *,
    stop_on_bad: bool,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> Extracted:
    """Run the trunk over all images.

    Args:
        images: loaded from ``threads`` threads at once.
        preprocessing: the geometric part.
        forward: the way the trunk is run.
        write: takes (first row, float32 [b, D]); called from any worker, rows of bad images hold
            anything.
        stop_on_bad: after the first bad image the trunk no longer runs; the rest is decoded all
            the same, so that every bad image is known at once.
        threads: workers.
        progress: called in the caller's thread with (images done, n); what it raises stops it all.

    Raises:
        InputError: a feature is NaN or infinite.
    """
    count = len(images)
    content = np.zeros((count, CONTENT_BYTES), np.uint8)
    bad: dict[int, BadImage] = {}
    decode_only, stopped = threading.Event(), threading.Event()

    def work(first: int) -> int:
        if stopped.is_set():
            return 0
        size = min(forward.batch, count - first)
        pixels = np.zeros((forward.batch, preprocessing.crop, preprocessing.crop, 3), np.uint8)
        for slot in range(size):
            try:
                image = images.load(first + slot)
                pixels[slot] = preprocessing.apply(image)
                content[first + slot] = hash_pixels(image)
            except BadImage as error:
                bad[first + slot] = error
                if stop_on_bad:
                    decode_only.set()
        if not decode_only.is_set():
            features = forward.run(pixels)[:size]
            _refuse_non_finite(features, images, first)
            write(first, features)
        return size

    with (
        forward.threads(threads) as start_thread,
        ThreadPoolExecutor(threads, "extract", start_thread) as pool,
    ):
        futures = [pool.submit(work, first) for first in range(0, count, forward.batch)]
        done = 0
        try:
            for future in as_completed(futures):
                done += future.result()
                if progress is not None:
                    progress(done, count)
        except BaseException:
            stopped.set()
            raise
    return Extracted(content, dict(sorted(bad.items())))


def hash_pixels(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """BLAKE2b-128 of one decoded image's shape and pixels, uint8 [16]."""
    digest = hashlib.blake2b(str(image.shape).encode(), digest_size=CONTENT_BYTES)
    digest.update(np.ascontiguousarray(image).data)
    return np.frombuffer(digest.digest(), np.uint8)


def sample_batch(images: Images, preprocessing: Preprocessing, size: int) -> npt.NDArray[np.uint8]:
    """The first good images, uint8 [at most size, S, S, 3], to compare ways on; else noise."""
    found: list[npt.NDArray[np.uint8]] = []
    for i in range(min(len(images), _SEARCHED)):
        try:
            found.append(preprocessing.apply(images.load(i)))
        except BadImage:
            continue
        if len(found) == size:
            break
    if found:
        return np.stack(found)
    side = preprocessing.crop
    noise = seeding.generator(0, "sample")
    return noise.integers(0, 256, (size, side, side, 3), dtype=np.uint8)


def _refuse_non_finite(features: Float32, images: Images, first: int) -> None:
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise InputError(
            "the trunk gives NaN or infinity for an image",
            where=images.where(first + int(np.argmin(finite))),
            do="Try backbone.weights = 'default', or feature_dtype = 'float32'",
        )

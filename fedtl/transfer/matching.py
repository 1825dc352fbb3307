"""Each client's pixels brought to the means and deviations that the weights were trained on.

A map x -> a x + b for each client and channel, rounded and clipped to 0..255. Its statistics are
those of the squares that the trunk sees, over a seeded sample of the client's training images, so a
real client finds the map that its simulated self has. A client whose pictures are grey gets one map
for all three channels, towards the mean of the channels: they stay grey.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.data.clients import ClientSplit
from fedtl.data.examples import Examples, Images, Pixels, content_hash
from fedtl.transfer.pictures import SLIGHT, look_at, pixel_statistics, trained_on
from fedtl.transfer.preprocessing import Preprocessing
from fedtl.types import Int32, Int64

SAMPLE = 64
"""Training images of a client that its map is made from."""

LEAST_DEVIATION = 1.0
"""Pixels that vary less than by one step are only moved, not stretched."""

Table = npt.NDArray[np.uint8]
"""What becomes of each value of each channel, [3, 256]."""


class MatchedImages:
    """Images as their clients' maps leave them.

    Attributes:
        original: the images before.
        client: int32 [N], whose each is; -1 for nobody's, which stay.
        tables: uint8 [K, 3, 256].
    """

    def __init__(self, original: Images, client: Int32, tables: npt.NDArray[np.uint8]) -> None:
        self.original, self.client, self.tables = original, client, tables

    def __len__(self) -> int:
        return len(self.original)

    def load(self, i: int) -> Pixels:
        """Image ``i`` through its client's map."""
        pixels, client = self.original.load(i), int(self.client[i])
        return pixels if client < 0 else self.tables[client][np.arange(3), pixels]

    def where(self, i: int) -> str:
        """Where the image lies."""
        return self.original.where(i)


def match_inputs(
    images: Images,
    split: ClientSplit,
    preprocessing: Preprocessing,
    seed: int,
    *,
    threads: int = 1,
) -> MatchedImages:
    """Every client's images, training and test, through a map of its own.

    Args:
        images: all examples'; ``SAMPLE`` training images of each client are decoded now.
        split: who has which.
        preprocessing: of the weights; says what they were trained on (``pictures.trained_on``).
        seed: the scenario's; the sample follows from it and the client's name.
        threads: that decode.
    """
    client = np.full(len(images), -1, np.int32)
    tables = np.empty((len(split.names), 3, 256), np.uint8)
    for k, name in enumerate(split.names):
        client[split.train.of(k)] = client[split.test.of(k)] = k
        rows = sampled(split.train.of(k), name, seed)
        tables[k] = match_table(images, rows, preprocessing, threads=threads)
    return MatchedImages(images, client, tables)


def match_examples(
    examples: Examples, split: ClientSplit, preprocessing: Preprocessing, seed: int, threads: int
) -> Examples:
    """Examples over matched images, with a fingerprint of their own."""
    assert examples.images is not None
    images = match_inputs(examples.images, split, preprocessing, seed, threads=threads)
    fingerprint = content_hash("match", examples.fingerprint, images.client, images.tables)
    return replace(examples, images=images, fingerprint=fingerprint)


def sampled(rows: Int64, name: str, seed: int) -> Int64:
    """At most ``SAMPLE`` of a client's training rows, ascending."""
    if len(rows) <= SAMPLE:
        return rows
    key = int(seeding.named_keys(seed, "match", [name])[0])
    chosen = seeding.generator(key, "sample").choice(len(rows), SAMPLE, replace=False)
    return rows[np.sort(chosen)]


def match_table(
    images: Images, rows: Int64, preprocessing: Preprocessing, *, threads: int = 1
) -> Table:
    """The map made from some images; without one that can be decoded, the identity."""
    looks = look_at(images, rows, preprocessing, threads)
    looks = looks.of(np.flatnonzero(np.isfinite(looks.colour)))
    values = np.arange(256.0)
    if not len(looks.colour):
        return np.tile(values.astype(np.uint8), (3, 1))
    mean, deviation = pixel_statistics(looks)
    wanted, spread = trained_on(preprocessing)
    if looks.colour.mean() < SLIGHT:
        wanted, spread = np.full(3, wanted.mean()), np.full(3, spread.mean())
        mean, deviation = np.full(3, mean.mean()), np.full(3, deviation.mean())
    gain = np.where(
        deviation < LEAST_DEVIATION, 1.0, spread / np.maximum(deviation, LEAST_DEVIATION)
    )
    mapped = gain[:, None] * (values - mean[:, None]) + wanted[:, None]
    return np.asarray(np.rint(np.clip(mapped, 0, 255)), np.uint8)

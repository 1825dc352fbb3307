"""What pictures are like before the trunk sees them, and pictures that are made unlike themselves.

The first tells whether a trunk gets what its weights were trained on, the second lets a change be
tried on a sample before anybody changes any data.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fedtl.data.examples import BadImage, Images, Pixels
from fedtl.transfer.preprocessing import Preprocessing
from fedtl.types import Float64, Int64

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
"""Of the pixels that published weights were trained on, in units of a pixel in [0, 255]."""

NOMINAL_STD = 100.0
"""Natural pictures never spread so far: such a scale only maps 0 to 255 onto -1 to 1."""

FLAT = 8
"""Pixels so near to black or white belong to an empty background."""

SLIGHT = 4.0
"""Channels that differ less, on average, are those of a grey picture that JPEG went over."""

DECODED_AT_A_TIME = 64

Alter = Callable[[int, Pixels], Pixels]
"""(which image, its pixels) -> other pixels, uint8 [h, w, 3] of any size."""


@dataclass(frozen=True)
class Looks:
    """Of n pictures; all but the sides are of the square that the trunk sees.

    Attributes:
        short, long: sides as decoded, int64 [n].
        mean, square: of each channel's pixels and of their squares, float64 [n, 3].
        colour: mean difference between the channels, float64 [n].
        top: the brightest value but for a thousandth of the pixels, float64 [n].
        dark, light: share of nearly black, or white, pixels, float64 [n].
    """

    short: Int64
    long: Int64
    mean: Float64
    square: Float64
    colour: Float64
    top: Float64
    dark: Float64
    light: Float64

    def of(self, places: Int64 | slice) -> Looks:
        """Those of some pictures."""
        return Looks(*(column[places] for column in vars(self).values()))


def look_at(
    images: Images,
    rows: Int64,
    preprocessing: Preprocessing,
    threads: int,
    check: Callable[[], None] = lambda: None,
) -> Looks:
    """Decode some images and say what they are like.

    Args:
        rows: which, int64 [n]; one that cannot be decoded counts as NaN, and as 0 px wide.
        preprocessing: of the trunk, its crop.
        check: called often; may raise to stop.
    """

    def measure(row: int) -> list[float]:
        try:
            image = images.load(row)
        except BadImage:
            return [0, 0, *[np.nan] * 10]
        seen = preprocessing.apply(image).reshape(-1, 3).astype(np.float32)
        grey = seen.mean(axis=1)
        return [
            *sorted(image.shape[:2]),
            *seen.mean(axis=0, dtype=np.float64),
            *np.square(seen).mean(axis=0, dtype=np.float64),
            float(np.ptp(seen, axis=1).mean()),
            float(np.quantile(grey, 0.999)),
            float((grey <= FLAT).mean()),
            float((grey >= 255 - FLAT).mean()),
        ]

    found: list[list[float]] = []
    with ThreadPoolExecutor(threads, "look") as pool:
        for first in range(0, len(rows), DECODED_AT_A_TIME):
            check()
            found += pool.map(measure, rows[first : first + DECODED_AT_A_TIME].tolist())
    table = np.array(found, np.float64).reshape(len(rows), 12)
    sides = table[:, :2].astype(np.int64)
    return Looks(sides[:, 0], sides[:, 1], table[:, 2:5], table[:, 5:8], *table[:, 8:].T)


def trained_on(preprocessing: Preprocessing) -> tuple[Float64, Float64]:
    """Channel means and deviations of the pixels that the weights were trained on, [3] each.

    The weights' own normalisation, where it is one; ImageNet's where it only maps the range.
    """
    if max(preprocessing.std) < NOMINAL_STD:
        return np.array(preprocessing.mean), np.array(preprocessing.std)
    return np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)


def pixel_statistics(looks: Looks) -> tuple[Float64, Float64]:
    """Mean and deviation of each channel over all pixels of some pictures, [3] each."""
    mean = np.nanmean(looks.mean, axis=0)
    variance = np.nanmean(looks.square, axis=0) - mean**2
    return mean, np.sqrt(np.maximum(variance, 0.0))


class AlteredImages:
    """Some of other images, each made another; see ``Alter``."""

    def __init__(self, images: Images, alter: Alter) -> None:
        self._images, self._alter = images, alter

    def __len__(self) -> int:
        return len(self._images)

    def load(self, i: int) -> Pixels:
        """Image ``i`` as it would be."""
        return self._alter(i, self._images.load(i))

    def where(self, i: int) -> str:
        """Where the image lies that it is made of."""
        return self._images.where(i)


def invert(image: Pixels) -> Pixels:
    """Black for white."""
    return np.asarray(255 - image, np.uint8)


def to_grey(image: Pixels) -> Pixels:
    """Luminance in all three channels (ITU-R 601)."""
    grey = np.rint(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def affine(image: Pixels, scale: Float64, offset: Float64) -> Pixels:
    """scale * pixel + offset by channel, cut off at 0 and 255."""
    return np.clip(np.rint(image * scale + offset), 0, 255).astype(np.uint8)


def pad(image: Pixels) -> Pixels:
    """A square around the whole picture, filled with the mean of its edge."""
    height, width = image.shape[:2]
    side = max(height, width)
    edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]).mean(axis=0)
    square = np.broadcast_to(np.rint(edge).astype(np.uint8), (side, side, 3)).copy()
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def halve(image: Pixels) -> Pixels:
    """Half as many pixels to each side, at least one."""
    from PIL import Image

    height, width = (max(1, side // 2) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))

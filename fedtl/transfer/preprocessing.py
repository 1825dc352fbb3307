"""How an image becomes what a trunk was trained on; it belongs to the weights.

The geometric part (resize, crop) is done by Pillow on uint8 pixels, the same call for simulated
and real clients; the arithmetic part (offset, scale) is inside the trunk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
_SUPPORT = 3.0  # source pixels (at scale 1) that the widest filter, Lanczos, looks to each side


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side resized to ``resize``, centre ``crop`` cut out, then (pixel - mean) / std.

    Attributes:
        resize: pixels of the shorter side after resizing, at least ``crop``.
        crop: pixels of the square that the trunk sees (S).
        interpolation: Pillow's filter, antialiased.
        mean, std: offset and scale of each channel, in units of a pixel in [0, 255].
    """

    resize: int
    crop: int
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def at(self, size: int | None) -> Preprocessing:
        """The same for ``size`` pixels, without a margin around the crop; None: unchanged."""
        return self if size is None else dataclasses.replace(self, resize=size, crop=size)

    def apply(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The geometric part: what torchvision's presets do with Pillow images.

        Only the pixels under the crop are resized, so an image of one row and millions of
        columns needs no more memory than another.

        Args:
            image: uint8 [h, w, 3].

        Returns:
            uint8 [S, S, 3].
        """
        from PIL import Image

        short = min(image.shape[:2])
        top, rows = self._window(image.shape[0], short)
        left, columns = self._window(image.shape[1], short)
        part = image[rows, columns]
        if short == self.resize:
            return part[int(top[0]) :, int(left[0]) :][: self.crop, : self.crop]
        box = (left[0], top[0], left[1], top[1])
        filter = Image.Resampling[self.interpolation.upper()]
        whole = Image.fromarray(np.ascontiguousarray(part))
        return np.asarray(whole.resize((self.crop, self.crop), filter, box=box))

    def _window(self, side: int, short: int) -> tuple[tuple[float, float], slice]:
        """One axis: the crop in source pixels relative to the slice that it needs."""
        resized = int(self.resize * side / short)
        start = round((resized - self.crop) / 2.0)
        scale = side / resized
        low, high = start * scale, min((start + self.crop) * scale, float(side))
        margin = _SUPPORT * max(scale, 1.0) + 1.0
        first = max(0, int(low - margin))
        return (low - first, high - first), slice(first, min(side, math.ceil(high + margin)))

    def identity(self) -> dict[str, Any]:
        """Plain values that key the feature store."""
        return dataclasses.asdict(self)


def plain(size: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> Preprocessing:
    """Resized to ``size``, then what a scenario says; without it pixels as they are, 0 to 255."""
    red, green, blue = mean or (0.0,) * 3
    stds = std or (1.0,) * 3
    return Preprocessing(size, size, "bilinear", (red, green, blue), (stds[0], stds[1], stds[2]))

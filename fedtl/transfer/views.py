"""Further views of training images: flipped, cropped, recoloured, put through a frozen trunk once.

A frozen trunk would have to run again in every epoch on an image that is augmented anew, so the
views are drawn once and their features stored. View 0 is the image as it is; it is stored by itself
and shared with runs that have no other view. Each further view is an entry of the store of its own,
so that eight views find the first four.

What a view does follows from the seed, the image's pixels and the view's number alone: a real
client makes the views that its simulated self has, on any engine, in any order.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.data.clients import ClientSplit
from fedtl.data.examples import Examples, Images, Pixels, content_hash
from fedtl.scenario.schema import Augmentation, Scenario
from fedtl.transfer.drawing import seeded
from fedtl.transfer.features import StoredFeatures
from fedtl.transfer.pipeline import hash_pixels
from fedtl.types import Int64, Rows

if TYPE_CHECKING:
    import torch

KINDS = ("crop", "flip", "randaugment", "colour")
"""In the order in which they are done, whatever order the scenario has them in."""

LEAST_CROPPED = 0.5
"""Of an image's area that a crop keeps at least. From 0.08 on, as in training on ImageNet, most of
a small picture would be gone, and a frozen trunk cannot learn to fill it in."""

COLOUR = 0.4
"""Brightness, contrast and saturation change by at most this share; hue by a quarter of it."""


@dataclass(frozen=True)
class Recipe:
    """What is done to the views.

    Attributes:
        kinds: of ``KINDS``.
        seed: the scenario's.
    """

    kinds: tuple[str, ...]
    seed: int

    @classmethod
    def of(cls, section: Augmentation, seed: int) -> Recipe:
        """That of a scenario."""
        return cls(tuple(kind for kind in KINDS if kind in section.kinds), seed)

    def view(self, pixels: Pixels, number: int) -> Pixels:
        """One view of an image, uint8 [h, w, 3], of its own size; number 0 is the image itself."""
        if number == 0:
            return pixels
        import torch

        content = int.from_bytes(hash_pixels(pixels).tobytes(), "little")
        key = seeding.key(self.seed, "view", content, number)
        image = torch.from_numpy(np.array(pixels.transpose(2, 0, 1)))
        with seeded(key >> 1):
            for kind in self.kinds:
                image = _transform(kind, image.shape[1], image.shape[2])(image)
        return np.ascontiguousarray(image.numpy().transpose(1, 2, 0))

    def fingerprint(self, of: str, rows: Int64, number: int) -> str:
        """That of the examples ``rows`` in view ``number``, of data of the fingerprint ``of``."""
        facts = {
            "kinds": self.kinds,
            "seed": self.seed,
            "numbers": [LEAST_CROPPED, COLOUR],
            "torchvision": metadata.version("torchvision"),
        }
        return content_hash("view", of, json.dumps(facts), rows, str(number))


@functools.lru_cache(maxsize=64)
def _transform(kind: str, height: int, width: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """One of torchvision's transforms of uint8 [3, h, w], which keeps the size."""
    from torchvision.transforms import v2

    if kind == "crop":
        size = (height, width)
        made: Any = v2.RandomResizedCrop(size, scale=(LEAST_CROPPED, 1.0), antialias=True)
    elif kind == "flip":
        made = v2.RandomHorizontalFlip()
    elif kind == "randaugment":
        made = v2.RandAugment()
    else:
        made = v2.ColorJitter(COLOUR, COLOUR, COLOUR, COLOUR / 4)
    transform: Callable[[torch.Tensor], torch.Tensor] = made
    return transform


class ViewedImages:
    """Images, and behind them views of some of them.

    Attributes:
        images: as they are.
        origin: int64 [N], the image that each row is a view of.
        number: int64 [N], of its view.
    """

    def __init__(self, images: Images, origin: Int64, number: Int64, recipe: Recipe) -> None:
        self.images, self.origin, self.number, self._recipe = images, origin, number, recipe

    def __len__(self) -> int:
        return len(self.origin)

    def load(self, i: int) -> Pixels:
        """Row ``i``."""
        return self._recipe.view(self.images.load(int(self.origin[i])), int(self.number[i]))

    def where(self, i: int) -> str:
        """Where the image lies, and which view of it this is."""
        place, number = self.images.where(int(self.origin[i])), int(self.number[i])
        return f"{place} (view {number})" if number else place


def without_views(scenario: Scenario) -> Scenario:
    """The scenario with examples as they are: what is measured on them takes them one by one."""
    plain = scenario.augmentation.model_copy(update={"views": 1})
    return scenario.model_copy(update={"augmentation": plain})


def in_views(section: Augmentation) -> str:
    """How often the trunk sees each training image, in words, where that is more than once."""
    return "" if section.views == 1 else f" in {section.views} views each"


def rows_in_all(section: Augmentation, split: ClientSplit, count: int) -> int:
    """Rows of ``count`` images with all views of the training images."""
    return count + (section.views - 1) * len(split.train.index)


def fingerprints(
    fingerprint: str, split: ClientSplit, section: Augmentation, seed: int
) -> list[str]:
    """That of each further view, as the feature store has it."""
    recipe, rows = Recipe.of(section, seed), np.sort(split.train.index)
    numbers = range(1, section.views)
    return [recipe.fingerprint(fingerprint, rows, number) for number in numbers]


@dataclass(frozen=True)
class Extended:
    """Examples with their views: rows of the images as they are, then those of view 1, 2, ...

    Attributes:
        matrix: [N, A].
        content: of each row's image as it is, uint8 [N, 16]: a view of a test image is that image.
        stored: what the store had or made, view by view.
    """

    matrix: npt.NDArray[np.floating[Any]]
    content: npt.NDArray[np.uint8]
    examples: Examples
    split: ClientSplit
    stored: Sequence[StoredFeatures]


def extend(
    base: Extended,
    seen: Examples,
    section: Augmentation,
    seed: int,
    features: Callable[[Images, str], StoredFeatures],
) -> Extended:
    """Each client's training rows with all views of its training images.

    Args:
        base: the images as they are.
        seen: the same examples as the trunk sees them.
        section: how many views of which kinds.
        seed: the scenario's.
        features: of images with a fingerprint, from the store or made now.
    """
    assert seen.images is not None
    assert base.examples.images is not None
    recipe, rows = Recipe.of(section, seed), np.sort(base.split.train.index)
    stored = []
    for number in range(1, section.views):
        views = ViewedImages(seen.images, rows, np.full(len(rows), number), recipe)
        stored.append(features(views, recipe.fingerprint(seen.fingerprint, rows, number)))
    count, more = len(base.examples), section.views - 1
    origin = np.concatenate([np.arange(count), np.tile(rows, more)])
    numbers = np.repeat(np.arange(1, more + 1), len(rows))
    numbers = np.concatenate([np.zeros(count, np.int64), numbers])
    images = ViewedImages(base.examples.images, origin, numbers, recipe)
    same = base.examples.fingerprint  # the views follow from it and the scenario
    made = [part.matrix for part in stored]
    return Extended(
        np.concatenate([base.matrix, *made]) if made else base.matrix,
        base.content[origin],
        replace(base.examples.subset(origin), images=images, fingerprint=same),
        replace(base.split, train=_with_views(base.split.train, rows, count, more)),
        stored,
    )


def _with_views(train: Rows, rows: Int64, count: int, more: int) -> Rows:
    """Each client's rows and those of their views, ascending within a client."""
    place = np.searchsorted(rows, train.index)
    client = np.repeat(np.arange(len(train.counts)), train.counts)
    index = np.concatenate(
        [train.index, *(count + view * len(rows) + place for view in range(more))]
    )
    order = np.lexsort((index, np.tile(client, more + 1)))
    return Rows(index[order], train.offsets * (more + 1))

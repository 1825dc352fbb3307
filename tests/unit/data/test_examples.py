"""Examples: columns that agree, subsets, fingerprints."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from fedtl.data.examples import (
    ArrayImages,
    ChosenImages,
    Examples,
    array_digest,
    content_fingerprint,
    data_problems,
)


def test_exactly_one_of_images_and_features(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples([0, 1])
    images = ArrayImages(np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(ValueError, match="exactly one"):
        dataclasses.replace(examples, images=images)
    with pytest.raises(ValueError, match="exactly one"):
        dataclasses.replace(examples, features=None)
    with pytest.raises(ValueError, match="differ in length"):
        dataclasses.replace(examples, domains=np.zeros(3, np.int32))


def test_subset_takes_every_column(make_examples: Callable[..., Examples]) -> None:
    examples = make_examples([0, 1, 2, 0], [0, 0, 1, 1], [3, 2, 1, 0], [True, False, True, False])
    part = examples.subset(np.array([1, 3]))
    assert len(part) == 2
    assert part.classes == examples.classes
    assert part.labels.tolist() == [1, 0]
    assert part.features[:, 0].tolist() == [1, 3]
    assert part.domains.tolist() == [0, 1]
    assert part.clients.tolist() == [2, 0]
    assert part.is_test.tolist() == [False, False]
    assert part.fingerprint != examples.fingerprint
    assert part.fingerprint != examples.subset(np.array([1, 2])).fingerprint
    assert part.fingerprint == examples.subset(np.array([1, 3])).fingerprint


def test_subset_renumbers_images() -> None:
    pixels = np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((4, 2, 5), np.uint8)
    examples = Examples(np.zeros(4, np.int32), ("a",), "f", ArrayImages(pixels))
    part = examples.subset(np.array([1, 3]))
    assert isinstance(part.images, ChosenImages)
    assert len(part.images) == 2
    assert part.images.load(1).tolist() == examples.images.load(3).tolist()
    assert part.where(1) == "row 3"


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 1), (2, 3, 5, 3)])
def test_array_images_are_rgb(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    image = ArrayImages(pixels).load(1)
    assert image.shape == (3, 5, 3)
    assert image.flags.c_contiguous
    assert (image == (pixels[1] if shape[3:] == (3,) else pixels[1].reshape(3, 5, 1))).all()


def test_fingerprint_depends_on_everything_and_on_nothing_else() -> None:
    labels = np.array([0, 1], np.int32)
    base = (b"content", labels, ("a", "b"), labels, ("d", "e"), None, (), None)
    changes = [
        (0, b"CONTENT"),
        (1, labels[::-1]),
        (2, ("ab", "")),
        (3, None),
        (4, ("d", "f")),
        (5, labels),
        (7, np.array([True, False])),
    ]
    seen = {content_fingerprint(*base)}
    for place, value in changes:
        changed = list(base)
        changed[place] = value
        seen.add(content_fingerprint(*changed))
    assert len(seen) == 1 + len(changes)
    assert content_fingerprint(*base) in seen


def test_array_digest_sees_dtype_and_shape() -> None:
    a = np.arange(6, dtype=np.uint8)
    arrays = [a, a.reshape(2, 3), a.reshape(3, 2), a.view(np.int8), a[::-1]]
    assert len({array_digest(array) for array in arrays}) == len(arrays)
    assert array_digest(a[::-1]) == array_digest(a[::-1].copy())


def test_many_problems_show_five_and_the_count() -> None:
    error = data_problems("here", [f"problem {i}" for i in range(7)], "Mend them")
    assert error.exit_code == 2
    assert "7 problems" in error.line()
    assert "problem 4" in error.line()
    assert "problem 5" not in error.line()
    assert "2 more" in error.line()

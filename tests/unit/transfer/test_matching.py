"""Pixels matched to what the weights were trained on: whose, from what, and how far."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedtl.data.clients import ClientSplit
from fedtl.data.examples import ArrayImages, BadImage, Examples
from fedtl.data.shifts import unshifted
from fedtl.transfer.matching import SAMPLE, match_examples, match_inputs, sampled
from fedtl.transfer.pictures import IMAGENET_MEAN, IMAGENET_STD
from fedtl.transfer.preprocessing import Preprocessing
from fedtl.types import Rows

IMAGENET = Preprocessing(16, 16, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
RANGE = Preprocessing(16, 16, "bilinear", (127.5,) * 3, (127.5,) * 3)


def split_of(*sizes: tuple[int, int], names: tuple[str, ...] = ()) -> ClientSplit:
    """Clients of so many training and test rows, one after the other."""
    train, test, first = [], [], 0
    for trains, tests in sizes:
        train.append(np.arange(first, first + trains))
        test.append(np.arange(first + trains, first + trains + tests))
        first += trains + tests
    rows = [Rows(np.concatenate(part), np.cumsum([0, *map(len, part)])) for part in (train, test)]
    names = names or tuple(f"c{i}" for i in range(len(sizes)))
    return ClientSplit(*rows, names, ("",) * len(sizes))


def coloured(count: int, mean: float, deviation: float, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    pixels = random.normal(mean, deviation, (count, 16, 16, 3)) + np.array([20, 0, -10])
    return np.clip(pixels, 0, 255).astype(np.uint8)


def pixels_of(images, rows) -> np.ndarray:
    return np.stack([images.load(int(i)) for i in rows]).reshape(-1, 3).astype(float)


@pytest.mark.parametrize("preprocessing", [IMAGENET, RANGE], ids=["statistics", "range"])
def test_means_and_deviations_become_the_weights_own(preprocessing) -> None:
    dark, flat = coloured(20, 60, 15), coloured(12, 150, 30, seed=1)
    images = ArrayImages(np.concatenate([dark, flat]))
    split = split_of((15, 5), (8, 4))
    matched = match_inputs(images, split, preprocessing, seed=3)
    for client in range(2):
        own = pixels_of(matched, split.train.of(client))
        np.testing.assert_allclose(own.mean(axis=0), IMAGENET_MEAN, atol=1.5)
        np.testing.assert_allclose(own.std(axis=0), IMAGENET_STD, rtol=0.05)  # a little is clipped
        tests = pixels_of(matched, split.test.of(client))
        np.testing.assert_allclose(tests.mean(axis=0), IMAGENET_MEAN, atol=6)
    assert matched.load(0).dtype == np.uint8


def test_the_map_is_the_affine_one_clipped() -> None:
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[0, :8] = (100, 60, 20)
    image[0, 8:] = (120, 140, 40)
    matched = match_inputs(ArrayImages(image), split_of((1, 0)), IMAGENET, seed=0)
    mean, deviation = np.array([110, 100, 30]), np.array([10, 40, 10])
    values = np.arange(256)[:, None]
    expected = (values - mean) * (np.array(IMAGENET_STD) / deviation) + IMAGENET_MEAN
    expected = np.rint(np.clip(expected, 0, 255))
    assert np.abs(matched.tables[0].T - expected).max() <= 1


def test_grey_pictures_stay_grey() -> None:
    grey = np.random.default_rng(0).normal(40, 20, (10, 16, 16)).clip(0, 255).astype(np.uint8)
    split = split_of((8, 2))
    matched = match_inputs(ArrayImages(grey), split, IMAGENET, seed=0)
    own = pixels_of(matched, np.arange(10))
    assert (own == own[:, :1]).all()
    train = pixels_of(matched, split.train.of(0))
    assert train[:, 0].mean() == pytest.approx(np.mean(IMAGENET_MEAN), abs=1.5)
    assert train[:, 0].std() == pytest.approx(np.mean(IMAGENET_STD), rel=0.05)


def test_pictures_without_contrast_are_only_moved() -> None:
    flat = np.full((4, 16, 16), 7, np.uint8)
    matched = match_inputs(ArrayImages(flat), split_of((3, 1)), IMAGENET, seed=0)
    assert set(pixels_of(matched, range(4)).ravel().tolist()) == {round(np.mean(IMAGENET_MEAN))}


def test_only_a_sample_of_the_training_images_counts() -> None:
    images = coloured(200, 80, 20)
    split = split_of((150, 50))
    chosen = sampled(split.train.of(0), "c0", seed=3)
    assert len(chosen) == SAMPLE == len(np.unique(chosen))
    other = images.copy()
    other[np.setdiff1d(np.arange(200), chosen)] = 255
    tables = [match_inputs(ArrayImages(x), split, IMAGENET, seed=3).tables for x in (images, other)]
    assert np.array_equal(*tables)
    # by name alone, whoever else there is, whatever number the client has
    moved = ArrayImages(np.concatenate([coloured(6, 10, 5), images]))
    beside = match_inputs(
        moved, split_of((5, 1), (150, 50), names=("else", "c0")), IMAGENET, seed=3, threads=2
    )
    assert np.array_equal(beside.tables[1], tables[0][0])
    assert not np.array_equal(sampled(split.train.of(0), "c1", 3), chosen)
    assert not np.array_equal(sampled(split.train.of(0), "c0", 4), chosen)


def test_what_cannot_be_decoded_has_no_say_and_nobodys_images_stay() -> None:
    class Broken(ArrayImages):
        def load(self, i: int):
            if i in (1, 8):
                raise BadImage(self.where(i), "broken")
            return super().load(i)

    pixels = coloured(12, 80, 20)
    matched = match_inputs(Broken(pixels), split_of((8, 0), (1, 1)), IMAGENET, seed=0)
    whole = match_inputs(ArrayImages(np.delete(pixels, 1, 0)), split_of((7, 0)), IMAGENET, seed=0)
    assert np.array_equal(matched.tables[0], whole.tables[0])
    assert np.array_equal(matched.load(9), pixels[9])  # its client's only training image is broken
    assert np.array_equal(matched.load(11), pixels[11])
    with pytest.raises(BadImage, match="row 1"):
        matched.load(1)


def test_features_are_stored_apart_and_copies_are_still_told() -> None:
    pixels = coloured(12, 80, 20)
    split = split_of((5, 1), (5, 1))
    labels = np.zeros(12, np.int32)
    examples = Examples(labels, ("a",), "print", images=ArrayImages(pixels))
    one = match_examples(examples, split, IMAGENET, seed=0, threads=1)
    assert unshifted(one.images) is examples.images
    brighter = dataclasses.replace(examples, images=ArrayImages(pixels + 1))
    other = match_examples(brighter, split, IMAGENET, seed=0, threads=1)
    swapped = match_examples(examples, split_of((3, 3), (5, 1)), IMAGENET, seed=0, threads=1)
    assert len({examples.fingerprint, one.fingerprint, other.fingerprint, swapped.fingerprint}) == 4
    again = match_examples(examples, split, IMAGENET, seed=0, threads=2)
    assert again.fingerprint == one.fingerprint

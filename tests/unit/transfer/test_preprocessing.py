from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtl.transfer.preprocessing import Preprocessing


def oracle(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """torchvision's own preset on a Pillow image."""
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    mode = InterpolationMode(preprocessing.interpolation)
    resized = transforms.resize(Image.fromarray(image), [preprocessing.resize], mode)
    return np.asarray(transforms.center_crop(resized, [preprocessing.crop]))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resize", "crop"), [(32, 32), (37, 32), (256, 224)])
@pytest.mark.parametrize("shape", [(227, 227), (100, 151), (151, 100), (8, 8), (32, 50), (37, 37)])
def test_what_torchvision_does(
    interpolation: str, resize: int, crop: int, shape: tuple[int, int]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ours = Preprocessing(resize, crop, interpolation, (0.0,) * 3, (1.0,) * 3)  # type: ignore[arg-type]
    difference = ours.apply(image).astype(int) - oracle(image, ours)
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 0.05  # Pillow takes the box as float32


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.integers(0, 20))
def test_any_image_becomes_the_square(height: int, width: int, crop: int, margin: int) -> None:
    ours = Preprocessing(crop + margin, crop, "bilinear", (0.0,) * 3, (1.0,) * 3)
    image = np.full((height, width, 3), (1, 2, 3), np.uint8)
    done = ours.apply(image)
    assert done.shape == (crop, crop, 3)
    assert (done == np.array([1, 2, 3])).all()


def test_an_extreme_shape_needs_little_memory() -> None:
    ours = Preprocessing(64, 64, "bicubic", (0.0,) * 3, (1.0,) * 3)
    image = np.zeros((1, 20_000_000, 3), np.uint8)  # resized whole, it would take 246 GB
    assert ours.apply(image).shape == (64, 64, 3)


def test_a_size_leaves_no_margin() -> None:
    ours = Preprocessing(256, 224, "bicubic", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert ours.at(None) is ours
    assert (ours.at(96).resize, ours.at(96).crop) == (96, 96)
    assert ours.at(96).identity() != ours.identity()

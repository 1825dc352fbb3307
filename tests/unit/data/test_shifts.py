"""Shifts of images and of concepts: how much, whose, and always the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtl.data.clients import ClientSplit
from fedtl.data.examples import ArrayImages, BadImage, Examples
from fedtl.data.shifts import KINDS, choose, draw_for, shifted, unshifted
from fedtl.errors import InputError
from fedtl.scenario.schema import Shift
from fedtl.types import Rows

NAMES = tuple(f"client-{i}" for i in range(6))


def picture(height: int = 64, width: int = 80, seed: int = 0) -> Any:
    """A smooth coloured scene with an edge, like a small photograph."""
    y, x = np.mgrid[0:height, 0:width] / min(height, width)
    waves = [np.sin(5 * x + i + seed) * np.cos(4 * y - i) for i in range(3)]
    image = 127 + 90 * np.stack(waves, axis=2)
    image[(x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.05] = (220, 40, 30)
    return image.astype(np.uint8)


def population(num: int = 6, each: int = 5) -> tuple[Examples, ClientSplit]:
    """Clients with four training images and one test image each."""
    size = num * each
    images = ArrayImages(np.stack([picture(24, 28, i) for i in range(size)]))
    examples = Examples((np.arange(size) % 4).astype(np.int32), tuple("abcd"), "f" * 64, images)
    rows = np.arange(size).reshape(num, each)
    train = Rows(rows[:, :-1].ravel(), np.arange(num + 1) * (each - 1))
    test = Rows(rows[:, -1].ravel(), np.arange(num + 1))
    return examples, ClientSplit(train, test, NAMES[:num], ("",) * num)


def pixels(examples: Examples) -> Any:
    assert examples.images is not None
    return np.stack([examples.images.load(i) for i in range(len(examples))])


@pytest.mark.parametrize("kind", KINDS)
def test_severity_grows_and_shape_and_type_stay(kind: str) -> None:
    images = [picture(), picture(96, 60, 3), picture(300, 260, 5)]
    for name in ("a", "b", "c"):
        for image in images:
            before = image.copy()
            amounts = []
            for severity in range(1, 6):
                after = draw_for(name, kind, severity, 7).apply(image, 0)
                assert after.shape == image.shape
                assert after.dtype == np.uint8
                amounts.append(np.abs(after.astype(float) - image).mean())
            assert amounts[0] > 0.1
            assert amounts == sorted(amounts)
            assert amounts[-1] > 1.2 * amounts[0]
            assert (image == before).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_client_has_its_own_draw_and_keeps_it(kind: str) -> None:
    image = picture()
    found = {name: draw_for(name, kind, 3, 7).apply(image, 4).tobytes() for name in ("a", "b", "c")}
    assert len(set(found.values())) == 3
    assert found["a"] == draw_for("a", kind, 3, 7).apply(image, 4).tobytes()
    assert found["a"] != draw_for("a", kind, 3, 8).apply(image, 4).tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2), (8, 8), (500, 3)])
def test_any_size_will_do(kind: str, shape: tuple[int, int]) -> None:
    for image in (np.zeros((*shape, 3), np.uint8), np.full((*shape, 3), 255, np.uint8)):
        assert draw_for("a", kind, 5, 0).apply(image, 0).shape == (*shape, 3)


def test_noise_is_the_images_own_and_the_others_are_the_clients() -> None:
    image = picture()
    for kind in KINDS:
        draw = draw_for("a", kind, 3, 0)
        same = (draw.apply(image, 1) == draw.apply(image, 2)).all()
        assert same == (kind != "noise")
    grey = np.full((200, 200, 3), 128, np.uint8)
    draw = draw_for("a", "noise", 1, 0)
    measured = (draw.apply(grey, 0).astype(float) - 128).std()
    assert measured == pytest.approx(255 * 0.08 * draw.strength, rel=0.03)


def test_grain_of_a_large_image_is_as_coarse_as_of_a_small_one() -> None:
    large = np.full((448, 448, 3), 128, np.uint8)
    noisy = draw_for("a", "noise", 3, 0).apply(large, 0)
    assert (noisy[::2, ::2] == noisy[1::2, 1::2]).all()


def test_grey_at_its_worst_is_grey_and_a_cast_never_brightens() -> None:
    image = picture()
    faded = draw_for("a", "grey", 5, 0).apply(image, 0)
    assert np.ptp(faded, axis=2).max() <= 1
    assert (draw_for("a", "colour", 5, 0).apply(image, 0) <= image).all()


def test_only_the_chosen_clients_are_shifted_and_a_note_says_so() -> None:
    examples, split = population()
    after = shifted(examples, split, Shift(kinds=["contrast"], fraction=0.5), 3)
    chosen = np.sort(choose(split.names, 0.5, 3, "shift"))
    assert len(chosen) == 3
    changed = (pixels(after) != pixels(examples)).any(axis=(1, 2, 3)).reshape(6, 5)
    assert (changed == np.isin(np.arange(6), chosen)[:, None]).all()
    names = ", ".join(NAMES[i] for i in chosen)
    assert after.notes == (f"shift contrast at severity 3: 3 of 6 clients ({names})",)
    assert unshifted(after.images) is examples.images
    assert after.images.where(7) == "row 7"


def test_several_kinds_are_dealt_evenly_and_one_client_at_least() -> None:
    examples, split = population()
    after = shifted(examples, split, Shift(kinds=["blur", "jpeg"], fraction=0.9), 0)
    assert [note.split(":")[1][:2] for note in after.notes] == [" 3", " 2"]
    assert "1 of 6" in shifted(examples, split, Shift(kinds=["blur"], fraction=1e-9), 0).notes[0]
    assert shifted(examples, split, Shift(kinds=["blur"], fraction=0.0), 0) is examples
    assert shifted(examples, split, Shift(), 0) is examples


def test_whatever_changes_pixels_changes_the_fingerprint() -> None:
    """So the feature store never takes one for the other."""
    examples, split = population()
    base = Shift(kinds=["blur"], fraction=0.5)
    others = [
        shifted(examples, split, base, 0),
        shifted(examples, split, base, 1),
        shifted(examples, split, base.model_copy(update={"severity": 4}), 0),
        shifted(examples, split, base.model_copy(update={"fraction": 1.0}), 0),
        shifted(examples, split, base.model_copy(update={"kinds": ["noise"]}), 0),
        shifted(examples, replace(split, names=tuple("uvwxyz")), base, 0),
    ]
    found = {examples.fingerprint, *(other.fingerprint for other in others)}
    assert len(found) == 7
    assert shifted(examples, split, base, 0).fingerprint == others[0].fingerprint


def test_concept_shift_is_a_derangement_of_each_clients_own() -> None:
    examples, split = population()
    after = shifted(examples, split, Shift(concept_fraction=1.0), 0)
    before = examples.labels.reshape(6, 5)
    labels = after.labels.reshape(6, 5)
    maps = set()
    for old, new in zip(before, labels, strict=True):
        pairs = set(zip(old.tolist(), new.tolist(), strict=True))
        assert len(pairs) == 4
        assert {a for a, _ in pairs} == {b for _, b in pairs} == {0, 1, 2, 3}
        assert all(a != b for a, b in pairs)
        maps.add(frozenset(pairs))
    assert len(maps) > 1
    assert "6 of 6 clients (client-0, client-1, client-2 and 3 more) have" in after.notes[0]
    # features are the same, the run is another
    assert after.fingerprint == examples.fingerprint
    assert after.identity != examples.identity
    one = shifted(examples, split, Shift(concept_fraction=0.01), 0)
    assert (one.labels != examples.labels).reshape(6, 5).all(axis=1).sum() == 1
    assert "has its labels permuted" in one.notes[0]


def test_two_classes_are_swapped_and_one_is_refused() -> None:
    examples, split = population()
    two = replace(examples, labels=examples.labels % 2, classes=("a", "b"))
    assert (shifted(two, split, Shift(concept_fraction=1.0), 0).labels == 1 - two.labels).all()
    alone = replace(examples, labels=examples.labels * 0, classes=("a",))
    with pytest.raises(InputError, match="one class"):
        shifted(alone, split, Shift(concept_fraction=1.0), 0)


def test_features_have_no_pixels_to_shift() -> None:
    examples, split = population()
    ready = replace(examples, images=None, features=np.zeros((30, 2), np.float32))
    with pytest.raises(InputError, match="features already"):
        shifted(ready, split, Shift(kinds=["noise"]), 0)
    assert shifted(ready, split, Shift(concept_fraction=1.0), 0).identity != ready.identity


def test_what_jpeg_cannot_hold_is_a_bad_image() -> None:
    examples, split = population(num=1, each=2)
    long = replace(examples, images=ArrayImages(np.zeros((2, 1, 70_000, 3), np.uint8)))
    after = shifted(long, split, Shift(kinds=["jpeg"]), 0)
    with pytest.raises(BadImage, match="row 0: cannot be shifted"):
        after.images.load(0)

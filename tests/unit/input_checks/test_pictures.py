"""What is unlike the weights' own pictures is found, at the right clients, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtl.build import open_data, open_examples
from fedtl.data.examples import Examples
from fedtl.evaluation.quick_head import accuracy, draw_sample, quick_answers
from fedtl.input_checks import check_inputs, findings, trials
from fedtl.input_checks.findings import CHECKS, look
from fedtl.input_checks.trials import TEST, TRAIN, Trials
from fedtl.ready_features import OpenedData, ReadyFeatures, make_features
from fedtl.scenario.schema import Scenario
from fedtl.transfer.pictures import IMAGENET_MEAN, IMAGENET_STD

CLIENTS = ("a", "b", "c", "d")
EACH = 10

Draw = Callable[[np.random.Generator, int], Any]


def nature(rng: np.random.Generator, i: int, height: int = 240, width: int = 240) -> Any:
    """Coarse noise with the pixels' mean and deviation that ImageNet has."""
    coarse = rng.normal(size=(height // 8 + 1, width // 8 + 1, 3))
    pixels = coarse.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return np.clip(pixels * IMAGENET_STD + IMAGENET_MEAN, 0, 255).astype(np.uint8)


def grey(rng: np.random.Generator, i: int) -> Any:
    return nature(rng, i)[:, :, :1].repeat(3, axis=2)


def strokes(rng: np.random.Generator, i: int) -> Any:
    image = np.zeros((240, 240, 3), np.uint8)
    image[60:180, 20 * (i % 5) + 40 : 20 * (i % 5) + 100] = nature(rng, i)[:120, :60]
    return image


class Pictures:
    """Images of any size in memory."""

    def __init__(self, images: list[Any]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def load(self, i: int) -> Any:
        return self.images[i]

    def where(self, i: int) -> str:
        return f"row {i}"


def opened(draws: list[Draw], **backbone: Any) -> tuple[OpenedData, ReadyFeatures]:
    """One natural client for each way to draw; features are never looked at."""
    rng = np.random.default_rng(3)
    images = [draw(rng, i) for draw in draws for i in range(EACH)]
    clients = np.repeat(np.arange(len(draws)), EACH).astype(np.int32)
    labels = np.tile(np.arange(EACH) % 2, len(draws)).astype(np.int32)
    examples = Examples(
        labels,
        ("even", "odd"),
        "0" * 64,
        images=Pictures(images),
        clients=clients,
        client_names=CLIENTS[: len(draws)],
    )
    scenario = Scenario.model_validate(
        {"name": "look", "clients": {"partition": "natural"}, "backbone": backbone}
    )
    data = open_examples(scenario, examples)
    matrix, content = np.zeros((len(images), 4), np.float32), np.zeros((len(images), 16), np.uint8)
    return data, ReadyFeatures(matrix, content, data.examples, data.split, {}, 0.0, ())


def found(draws: list[Draw], **backbone: Any) -> dict[str, set[str]]:
    data, features = opened(draws, **backbone)
    told = check_inputs(data, features, 1, lambda: None, measure=False)
    assert all(one["gain"] is None and one["gain_note"] for one in told)
    return {one["what"]: set(one["clients"]) for one in told}


def test_pictures_like_the_weights_own_are_left_in_peace() -> None:
    assert found([nature] * 4) == {}


FAINT = "normalised already"
CASES: list[tuple[str, Draw, dict[str, set[str]]]] = [
    ("grey", grey, {"grey here and in colour": {"d"}}),
    ("strokes", strokes, {"light on black": {"d"}, "weights were trained on: at d": {"d"}}),
    ("faint", lambda r, i: (nature(r, i) > 128).astype(np.uint8), {FAINT: {"d"}}),
    ("long", lambda r, i: nature(r, i, 240, 480), {"cuts up to 50 %": {"d"}}),
    ("small", lambda r, i: nature(r, i, 96, 96), {"pictures of 96 px": {"d"}}),
    (
        "bright",
        lambda r, i: np.clip(nature(r, i) * 0.4 + 150, 0, 255).astype(np.uint8),
        {"weights were trained on: at d": {"d"}},
    ),
]


@pytest.mark.parametrize(("name", "draw", "expected"), CASES, ids=[case[0] for case in CASES])
def test_one_odd_client_is_named(name: str, draw: Draw, expected: dict[str, set[str]]) -> None:
    told = found([nature, nature, nature, draw])
    for words, clients in expected.items():
        assert [own for what, own in told.items() if words in what] == [clients], (words, told)
    assert len(told) == len(expected), told


def test_a_client_far_from_the_others_though_near_the_weights_own() -> None:
    def dim(rng: np.random.Generator, i: int) -> Any:
        return (nature(rng, i) * 0.6 + 20).astype(np.uint8)

    def bright(rng: np.random.Generator, i: int) -> Any:
        return (nature(rng, i) * 0.6 + 85).astype(np.uint8)

    told = found([dim, dim, dim, bright])
    assert list(told.values()) == [{"d"}]
    assert "far from the other clients'" in next(iter(told))


@pytest.mark.parametrize(("size", "word"), [(96, "below"), (320, "above")])
def test_image_size_is_compared_with_the_weights_own(size: int, word: str) -> None:
    (what,) = found([nature] * 2, image_size=size)
    assert f"image_size = {size} is {word} the 224 px" in what
    assert ("up to 240 px" in what) == (word == "below"), "whether the pictures have more"


def test_weights_that_were_never_trained_have_no_pictures_of_their_own() -> None:
    assert found([lambda r, i: nature(r, i, 40, 40), grey], weights="none", image_size=32) == {}


def test_a_picture_that_cannot_be_decoded_is_passed_over() -> None:
    from fedtl.data.examples import BadImage

    class Torn(Pictures):
        def load(self, i: int) -> Any:
            if i < 5:
                raise BadImage("row", "torn")
            return self.images[i]

    data, features = opened([nature, nature])
    torn = Torn(features.examples.images.images)  # type: ignore[union-attr]
    object.__setattr__(features.examples, "images", torn)
    assert check_inputs(data, features, 1, lambda: None, measure=False) == []


def test_the_gain_is_what_the_changed_data_would_give(tmp_path: Any) -> None:
    """0 and 1 stored as whole numbers: tried out, it says what data of 0 and 255 give."""
    rng = np.random.default_rng(5)
    labels = np.tile([0, 1], 40)
    bars = np.zeros((80, 32, 32), np.uint8)
    for i, label in enumerate(labels.tolist()):
        place = rng.integers(4, 24, 2)
        bars[
            i, place[0] : place[0] + (4 if label else 9), place[1] : place[1] + (9 if label else 4)
        ] = 1
    bars |= (rng.random(bars.shape) < 0.1).astype(np.uint8)
    measured = {}
    for name, x in (("faint", bars), ("full", bars * 255)):
        np.savez(tmp_path / f"{name}.npz", x=x, y=labels, client=np.repeat(["a", "b"], 40))
        scenario = Scenario.model_validate(
            {
                "name": "bars",
                "data": {"source": "arrays", "path": str(tmp_path / f"{name}.npz")},
                "clients": {"partition": "natural"},
                "backbone": {"image_size": 32},
            }
        )
        data = open_data(scenario)
        features = make_features(data)
        sample = draw_sample(features.split, TRAIN, TEST, scenario.seed, "tried")
        people = sample.population(features.matrix[sample.kept], features.examples, features.split)
        measured[name] = accuracy(quick_answers(people))
        if name == "faint":
            seen = look(data, features, 1, lambda: None)
            (finding,) = (f for of in CHECKS for f in of(seen) if FAINT in f.what)
            assert finding.trial is not None
            gain = Trials(data, features, 1, lambda: None).gain(finding.trial)
    assert gain is not None
    assert (gain.before, gain.after) == (measured["faint"], measured["full"])
    assert gain.before != gain.after


@pytest.mark.parametrize(("limit", "decoded"), [(2000, 30), (0, 15)])
def test_of_many_clients_only_sampled_pictures_are_decoded(
    limit: int, decoded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matching would look at 64 of each client, however many there are."""
    monkeypatch.setattr(trials, "LOOKED_AT", limit)
    monkeypatch.setattr(trials, "TRAIN", 15)
    data, features = opened([nature] * 4)
    holders = Trials(data, features, 1, lambda: None)._holders()
    assert holders.names == CLIENTS
    assert len(holders.train.index) <= decoded + 2
    for k in range(4):
        assert set(holders.train.of(k)) <= set(data.split.train.of(k))


@pytest.mark.parametrize(
    ("archive", "size", "expected"),
    [
        ("pacs96_full.zip", None, ["pictures of 96 px"]),
        ("pacs227_40percell.zip", 96, ["image_size = 96 is below the 224 px"]),
        ("pacs227_40percell.zip", None, []),
    ],
)
def test_pacs_has_its_resolution_told_before_training(
    archive: str, size: int | None, expected: list[str],
    shared_data: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(findings, "LOOKED_AT", 80)
    scenario = Scenario.model_validate(
        {
            "name": "pacs",
            "data": {
                "source": "folder",
                "path": str(shared_data(f"pacs/{archive}")),
                "domains": True,
            },
            "clients": {"partition": "domain"},
            "backbone": {"image_size": size},
        }
    )
    data = open_data(scenario)
    count = len(data.examples)
    nothing, content = np.zeros((count, 1), np.float32), np.zeros((count, 16), np.uint8)
    features = ReadyFeatures(nothing, content, data.examples, data.split, {}, 0.0, ())
    told = check_inputs(data, features, 2, lambda: None, measure=False)
    sizes = [one["what"] for one in told if "px" in one["what"]]
    assert len(sizes) == len(expected)
    assert all(words in what for words, what in zip(expected, sizes, strict=True))
    assert all(set(one["clients"]) == set(data.split.names) for one in told if "px" in one["what"])
    (grey_ones,) = (one["clients"] for one in told if "grey" in one["what"])
    assert grey_ones == ["sketch"]

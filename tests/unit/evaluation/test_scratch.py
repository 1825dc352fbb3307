"""From scratch: the whole network learns, judged on the same tests, the same bits every time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fedtl.data.examples import ArrayImages
from fedtl.errors import Interrupted
from fedtl.evaluation.references import Judge
from fedtl.evaluation.scratch import Order, _Network, judge_scratch
from fedtl.scenario import schema
from fedtl.transfer.backbones import open_backbone
from fedtl.types import Population, Rows


@pytest.fixture
def place() -> SimpleNamespace:
    """Forty pictures of bright left or right halves at two clients."""
    rng = np.random.default_rng(0)
    y = np.tile([0, 1], 20).astype(np.int32)
    images = rng.integers(0, 60, (40, 32, 32, 3)).astype(np.uint8)
    images[y == 0, :, :16] += 150
    images[y == 1, :, 16:] += 150
    train = Rows(np.arange(24), np.array([0, 12, 24]))
    test = Rows(np.arange(24, 40), np.array([0, 10, 16]))
    nothing = np.zeros((40, 1), np.float32)
    population = Population(nothing, y, ("left", "right"), train, test, ("a", "b"), ("", ""))
    judge = Judge(population, np.arange(2), np.arange(24, 40, 2), 1, "cpu")
    order = Order(
        ArrayImages(images),
        schema.Backbone(name="squeezenet1_1", weights="default"),
        32,
        schema.Head(),
        schema.Training(batch_size=6, learning_rate=0.02, momentum=0.5),
        [0.02] * 6,
        5,
    )
    return SimpleNamespace(judge=judge, order=order)


def test_it_learns_and_is_judged_on_the_clients_tests(place: SimpleNamespace) -> None:
    found = judge_scratch(place.judge, place.order, lambda: None)
    assert found.facts["accuracy"] > 0.9
    assert found.own.examples.tolist() == [10, 6]
    assert found.facts["examples_everyone"] == 8
    assert found.facts["epochs"] == 6
    assert found.answers is not None
    assert found.answers.tests.tolist() == [10, 6]
    again = judge_scratch(place.judge, place.order, lambda: None)
    assert again.facts == found.facts
    assert again.own.loss.tobytes() == found.own.loss.tobytes()


def test_the_seed_and_the_rates_count(place: SimpleNamespace) -> None:
    one = replace(place.order, rates=[0.02])
    found = judge_scratch(place.judge, one, lambda: None)
    other = judge_scratch(place.judge, replace(one, seed=6), lambda: None)
    slower = judge_scratch(place.judge, replace(one, rates=[0.001]), lambda: None)
    losses = {judged.facts["train_loss"] for judged in (found, other, slower)}
    assert len(losses) == 3


def test_an_interrupt_is_honoured_between_batches(place: SimpleNamespace) -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        judge_scratch(place.judge, place.order, check)
    assert len(calls) == 3


def test_it_needs_images(fedtl, small) -> None:
    done = fedtl("check", "small.toml", "--set", 'evaluation.references=["from_scratch"]')
    assert done.returncode == 2
    assert "from_scratch" in done.stderr
    assert "images" in done.stderr


def test_batch_norm_has_the_statistics_of_the_last_weights(place: SimpleNamespace) -> None:
    import torch

    section = schema.Backbone(name="shufflenet_v2_x0_5", weights="none", image_size=32)
    order = replace(place.order, backbone=section)
    network = _Network(order, open_backbone(section, 5), 2, "cpu")
    rows = place.judge.population.train.index
    network.train(rows, place.judge.population.labels, lambda: None)
    first = network._body.conv1
    pixels = np.stack([network._preprocessing.apply(order.images.load(i)) for i in rows])
    trunk = network._trunk
    with torch.inference_mode():
        seen = first[0]((torch.from_numpy(pixels).permute(0, 3, 1, 2) - trunk.offset) / trunk.scale)
    np.testing.assert_allclose(
        first[1].running_mean.numpy(), seen.mean((0, 2, 3)).numpy(), rtol=1e-3, atol=1e-4
    )
    assert not network._body.training

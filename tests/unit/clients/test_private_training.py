"""DP-SGD at the clients: against the slow version, and what it promises."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from fedtl.clients.blocks import block_rows
from fedtl.clients.private_kernel import train_private_block
from fedtl.clients.private_training import train_private
from fedtl.clients.tasks import do_task
from fedtl.clients.training import train_clients
from fedtl.errors import InputError
from fedtl.plans import Personal, Protection, RoundPlan
from fedtl.types import ClientUpdates, Head, LocalTraining, Population

here = Path(__file__)
oracle = SimpleNamespace(**run_path(str(here.with_name("oracle.py"))))
slow = SimpleNamespace(**run_path(str(here.with_name("private_oracle.py"))))

private_plan, agree, moved = slow.private_plan, slow.agree, slow.moved

PLAIN = LocalTraining(2, 5, 0.1)
FULL = LocalTraining(2, 5, 0.1, momentum=0.9, weight_decay=0.01, proximal=0.1)
HEAD = oracle.linear_head(19, 4)
SIZES = [11, 0, 1, 24, 5, 3]


def same(a: ClientUpdates, b: ClientUpdates) -> bool:
    return all(
        np.array_equal(a.tensors[name], b.tensors[name], equal_nan=True) for name in a.tensors
    )


@pytest.mark.parametrize(("width", "num_classes"), [(19, 4), (32, 10), (7, 2), (16, 1)])
@pytest.mark.parametrize("training", [PLAIN, FULL])
def test_agrees_with_one_row_at_a_time(
    width: int, num_classes: int, training: LocalTraining
) -> None:
    people = oracle.federation(SIZES, width, num_classes)
    head = oracle.linear_head(width, num_classes)
    plan = private_plan(people, training)
    updates = train_private(people, head, plan)
    agree(updates, slow.train_all(people, head, plan))
    assert updates.num_examples.tolist() == SIZES
    assert np.isnan(updates.loss).all()
    assert all(np.array_equal(updates.tensors[name][1], head[name]) for name in head)


def test_batches_longer_than_a_piece() -> None:
    people = oracle.federation([300, 90], 19, 4)
    plan = private_plan(people, LocalTraining(1, 150, 0.1), clip=0.7)
    agree(train_private(people, HEAD, plan), slow.train_all(people, HEAD, plan))


def test_corrections_come_after_the_noise() -> None:
    people = oracle.federation(SIZES, 19, 4)
    random = np.random.default_rng(0)
    corrections = {
        name: random.standard_normal((len(SIZES), *tensor.shape)).astype(np.float32)
        for name, tensor in HEAD.items()
    }
    plan = dataclasses.replace(private_plan(people, FULL), corrections=corrections)
    agree(train_private(people, HEAD, plan), slow.train_all(people, HEAD, plan))


def test_without_noise_keys_there_must_be_no_noise() -> None:
    people = oracle.federation(SIZES, 19, 4)
    plan = dataclasses.replace(private_plan(people, PLAIN, noise=0.0), noise_keys=None)
    agree(train_private(people, HEAD, plan), slow.train_all(people, HEAD, plan))


@pytest.mark.parametrize("training", [FULL, dataclasses.replace(FULL, batch_size=100)])
def test_clipping_far_away_and_all_rows_is_full_batch_descent(training: LocalTraining) -> None:
    people = oracle.federation([8, 0, 40, 70], 19, 4)
    training = dataclasses.replace(training, batch_size=100, epochs=4)
    plan = private_plan(people, training, clip=1e6, noise=0.0)
    plain = train_clients(people, HEAD, dataclasses.replace(plan, protection=None))
    agree(train_private(people, HEAD, plan), plain.tensors, atol=1e-6)


def test_an_empty_batch_is_a_step_of_noise_alone() -> None:
    people = oracle.federation([40], 19, 4)
    training = LocalTraining(1, 1, 0.1)
    plan = private_plan(people, training, noise=1.0)
    empty = [
        step for step in range(40)
        if not slow.seeded_batch(int(plan.batch_keys[0]), step, 1, 40)
    ]  # fmt: skip
    assert empty
    agree(train_private(people, HEAD, plan), slow.train_all(people, HEAD, plan), atol=2e-5)


def test_bits_depend_on_the_client_alone() -> None:
    people = oracle.federation([11, 0, 3, 24, 5, 1, 9, 2, 30, 10, 7], 19, 4)
    plan = private_plan(people, FULL)
    whole = train_private(people, HEAD, plan)
    for threads, size in ((1, 1), (2, 3), (3, None), (1, 100)):
        assert same(whole, train_private(people, HEAD, plan, threads=threads, block_size=size))
    some = np.array([0, 3, 8])
    alone = train_private(people, HEAD, plan.part(some), device="cuda")
    for name, tensor in alone.tensors.items():
        assert np.array_equal(tensor, whole.tensors[name][some])


def test_half_width_and_strided_features_are_their_float32_values() -> None:
    people = oracle.federation([8, 13], 19, 4, dtype=np.float16)
    plan = private_plan(people, PLAIN)
    wide = people.features.astype(np.float32)
    strided = np.repeat(wide, 2, axis=1)[:, ::2]
    expected = train_private(dataclasses.replace(people, features=wide), HEAD, plan)
    for features in (people.features, strided, people.features.astype(np.float64)):
        own = dataclasses.replace(people, features=features)
        assert same(expected, train_private(own, HEAD, plan))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_survives_and_stays_with_its_client(bad: float) -> None:
    people = oracle.federation([8, 13, 6], 19, 4)
    plan = private_plan(people, dataclasses.replace(PLAIN, batch_size=100))
    clean = train_private(people, HEAD, plan)
    features = people.features.copy()
    features[people.train.of(1)[2], 3] = bad
    spoiled = train_private(dataclasses.replace(people, features=features), HEAD, plan)
    assert not np.isfinite(spoiled.tensors["weight"][1]).all()
    for name, tensor in clean.tensors.items():
        assert np.array_equal(spoiled.tensors[name][[0, 2]], tensor[[0, 2]])


def test_a_row_that_overflows_moves_no_more_than_another() -> None:
    """Its logits are infinite once the weights have grown; its client's others still count."""
    people = oracle.federation([8, 13, 6], 19, 4)
    plan = private_plan(people, dataclasses.replace(PLAIN, batch_size=100, learning_rate=50.0))
    features = people.features.copy()
    features[people.train.of(1)[2]] = 3e38
    found = train_private(dataclasses.replace(people, features=features), HEAD, plan)
    assert all(np.isfinite(tensor).all() for tensor in found.tensors.values())


# What is promised --------------------------------------------------------------------------------


def step_sum(
    people: Population, head: Head, inside: np.ndarray, clip: float, batch_size: int
) -> np.ndarray:
    """The sum of one step without noise, [C, D + 1], of a batch that is given as bool [n].

    It is read from the momentum, which the first step leaves at the mean gradient itself.
    """
    rows = block_rows(people.features, people.labels, [people.train.of(0)])
    (num_classes, width), num = head["weight"].shape, len(inside)
    weights, biases = head["weight"][None].copy(), head["bias"][None].copy()
    speeds = np.zeros_like(weights), np.zeros_like(biases)
    key, rate = np.zeros(1, np.uint64), np.float32(0.1)
    zero = np.float32(0)
    frozen = [weights.copy(), biases.copy(), weights[:0].copy(), biases[:0].copy()]
    for array in frozen:
        array.flags.writeable = False
    train_private_block(
        rows.features, rows.halves, rows.labels, rows.index, rows.starts, rows.stops, *frozen,
        key, key, np.where(inside, 0, 2**32 - 1).astype(np.uint32)[None],
        np.empty((0, num_classes, width + 1), np.float32), 0, np.ones(1, np.int64),
        batch_size, clip, 0.0, rate, np.float32(0.5), zero, zero, weights, biases, *speeds,
    )  # fmt: skip
    size = min(batch_size, num)
    return size * np.concatenate([speeds[0][0], speeds[1][0][:, None]], axis=1).astype(np.float64)


@pytest.mark.parametrize("clip", [1e-3, 1.0, 30.0])
def test_a_neighbour_changes_the_sum_by_the_clip_at_most(clip: float) -> None:
    """Search: rows from tiny to huge, right or wrong labels, heads from zero to certain."""
    random, worst = np.random.default_rng(0), 0.0
    people = oracle.federation([60], 19, 4, seed=5)
    own = people.train.of(0)
    people.features[own] *= 10.0 ** random.integers(-8, 17, (60, 1))
    people.features[own[0]] = 0
    people.features[own[1]] = 1e18
    for scale in (0.0, 1e-3, 1.0, 30.0):
        head = {name: np.float32(scale) * tensor for name, tensor in HEAD.items()}
        inside = random.random(60) < 0.5
        whole = step_sum(people, head, inside, clip, 20)
        assert np.isfinite(whole).all()
        for row in range(60):
            other = inside.copy()
            other[row] = not other[row]
            alone = np.arange(60) == row
            change = np.linalg.norm(step_sum(people, head, other, clip, 20) - whole)
            length = np.linalg.norm(step_sum(people, head, alone, clip, 20))
            assert length <= clip  # to the last bit
            assert change <= clip * (1 + 1e-5)  # sums of up to 60 round
            worst = max(worst, length)
    assert worst > 0.99999 * clip  # the search comes as near as it may


def test_the_noise_in_an_update_has_its_variance() -> None:
    num, size, steps = 400, 3, 4
    people = oracle.federation([6] * num, 19, 4)
    plan = private_plan(people, LocalTraining(2, size, 0.1), clip=1e-6, noise=2.0)
    updates = train_private(people, HEAD, plan)
    noise = np.stack([moved(updates, HEAD, i) for i in range(num)])
    deviation = 0.1 * 2.0 / size * np.sqrt(steps)
    total = (noise / deviation) ** 2
    assert 1e-4 < stats.chi2.sf(total.sum(), total.size) < 1 - 1e-4
    for entry in (total[:, -4:], total[:, :4], total[:, 70:76]):  # biases and weights alike
        assert 1e-4 < stats.chi2.sf(entry.sum(), entry.size) < 1 - 1e-4
    assert stats.kstest((noise / deviation).ravel(), "norm").pvalue > 1e-4
    between = np.corrcoef(noise[:40])[np.triu_indices(40, 1)] * np.sqrt(noise.shape[1])
    assert np.abs(between).max() < 4.9  # clients share none: of 780 pairs


# Real clients ------------------------------------------------------------------------------------


class Given:
    """A source of known numbers in place of the system's."""

    def __init__(self) -> None:
        self.random, self.asked = np.random.default_rng(8), []

    def normal(self, size: int) -> np.ndarray:
        self.asked.append(size)
        return self.random.standard_normal(size)


@pytest.mark.parametrize("at_once", [1, 170, 10**6])
def test_noise_and_coins_of_the_system(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps whatever is drawn at once, with momentum, and nothing of the plan's keys."""
    from fedtl.clients import private_training

    people = oracle.federation([17], 19, 4)
    given, tossed = Given(), np.random.default_rng(9)
    monkeypatch.setattr("fedtl.privacy.noise.from_system", lambda: given)
    monkeypatch.setattr(os, "urandom", lambda size: tossed.bytes(size))
    monkeypatch.setattr(private_training, "DRAWN", at_once)
    plan = dataclasses.replace(private_plan(people, FULL), noise_keys=None)
    updates = train_private(people, HEAD, plan, secure=True)
    noise = np.random.default_rng(8).standard_normal((8, 4, 20))
    coins = np.frombuffer(np.random.default_rng(9).bytes(8 * 17 * 4), np.uint32).reshape(8, 17)
    data = people.client(0)
    expected = slow.train_one(
        data.features.astype(np.float64), data.labels, HEAD, plan, 0,
        lambda step: slow.tossed(coins[step], 5), lambda step: noise[step],
    )  # fmt: skip
    agree(updates, {"weight": expected[None, :, :-1], "bias": expected[None, :, -1]})
    assert sum(given.asked) == 8 * 80
    assert max(given.asked) <= max(at_once, 80)


def test_the_system_never_draws_twice_the_same() -> None:
    people = oracle.federation([9, 0, 30], 19, 4)
    plan = dataclasses.replace(private_plan(people, PLAIN), noise_keys=None)
    first, second = (train_private(people, HEAD, plan, secure=True) for _ in range(2))
    difference = first.tensors["weight"] - second.tensors["weight"]
    assert (difference[[0, 2]] != 0).all()
    assert np.array_equal(first.tensors["weight"][1], HEAD["weight"])
    coins = dataclasses.replace(
        plan, protection=Protection(example_clip=1.0), training=LocalTraining(1, 15, 0.1)
    )
    tossed = [train_private(people, HEAD, coins, secure=True).tensors["bias"][2] for _ in range(4)]
    assert any(not np.array_equal(tossed[0], other) for other in tossed[1:])


# The way there, and what is refused --------------------------------------------------------------


def test_the_plan_leads_there() -> None:
    people = oracle.federation(SIZES, 19, 4)
    plan = private_plan(people, PLAIN)
    assert same(do_task(people, HEAD, plan, threads=2), train_private(people, HEAD, plan))
    drawn = do_task(people, HEAD, dataclasses.replace(plan, noise_keys=None), secure=True)
    assert not np.array_equal(drawn.tensors["weight"][0], HEAD["weight"])


def refused(what: str) -> tuple[Population, Head, RoundPlan]:
    people, head = oracle.federation([3, 4], 19, 4), HEAD
    plan = private_plan(people, PLAIN)
    if what == "label":
        people.labels[people.train.of(1)[0]] = 4
    elif what == "mlp":
        head = oracle.mlp_head(19, [7], 4)
    elif what == "prior":
        plan = dataclasses.replace(plan, training=dataclasses.replace(PLAIN, prior_strength=1.0))
    elif what == "reports":
        plan = dataclasses.replace(plan, reports=("start_loss",))
    elif what == "personal":
        plan = dataclasses.replace(plan, personal=Personal("ditto"))
    elif what == "keys":
        plan = dataclasses.replace(plan, noise_keys=None)
    elif what == "fewer keys":
        plan = dataclasses.replace(plan, noise_keys=plan.noise_keys[:1])
    elif what == "correction":
        plan = dataclasses.replace(plan, corrections={"weight": np.zeros((2, 4, 19), np.float32)})
    else:
        clip, noise = {"clip": (0.0, 1.0), "noise": (1.0, -1.0), "nan": (1.0, np.nan)}[what]
        own = Protection(example_clip=clip, example_noise=noise)
        plan = dataclasses.replace(plan, protection=own)
    return people, head, plan


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("label", r"client 1 \(c1\).*0 to 3"),
        ("mlp", "linear heads only"),
        ("prior", "balanced softmax"),
        ("reports", "start_loss"),
        ("personal", "personal heads"),
        ("keys", "one noise key per client"),
        ("fewer keys", "one noise key per client"),
        ("correction", "lack a fitting 'bias'"),
        ("clip", "example_clip above 0"),
        ("noise", "example_noise must be at least 0"),
        ("nan", "example_noise must be at least 0"),
    ],
)
def test_what_is_not_protected_is_refused(what: str, told: str) -> None:
    people, head, plan = refused(what)
    with pytest.raises(InputError, match=told):
        train_private(people, head, plan)


def test_labels_are_checked_with_the_systems_noise_too() -> None:
    people, head, plan = refused("label")
    with pytest.raises(InputError, match="client 1"):
        train_private(people, head, plan, secure=True)

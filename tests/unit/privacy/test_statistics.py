"""Statistics under protection: how far a neighbour moves them, found by search; and their noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from fedtl.clients.statistics import pack_symmetric, statistics, unpack_symmetric
from fedtl.plans import Protection, RoundPlan, Statistics
from fedtl.privacy.noise import seeded
from fedtl.privacy.statistics import (
    BIAS,
    encoded_length,
    noised,
    on_diagonal,
    protect_answer,
    protect_rows,
    sensitivity,
)
from fedtl.types import LocalTraining, Population, Rows

C, D, CLIP = 3, 3, 2.0
HEAD = {"weight": np.zeros((C, D), np.float32), "bias": np.zeros(C, np.float32)}
CASES = {
    "fed3r": Statistics(),
    "afl, fedlda": Statistics(bias=False),
    "fedncm": Statistics(gram=False, bias=False),
    "random features": Statistics(random_features=5, scale=2.0, key=3),
    "random features, no bias": Statistics(bias=False, random_features=5, scale=2.0, key=3),
}
BOUNDS = {  # one row more or less, another row in its place
    "fed3r": (2**0.5, 4.5**0.5),
    "afl, fedlda": (3**0.5, 6**0.5),
    "fedncm": (2**0.5, 2.0),
    "random features": (2**0.5, 4.5**0.5),
    "random features, no bias": (3**0.5, 6**0.5),
}
RANDOM_CLIP = 0.05  # random features are about 1 long: their rows are all shortened


def sums(rows: np.ndarray, labels: list[int], asked: Statistics, safe: Protection):
    """One client's statistics of these rows, by the code that clients run."""
    x = np.asarray(rows, np.float32).reshape(-1, D)
    ends = np.array([0, len(x)])
    population = Population(
        x,
        np.array(labels, np.int32),
        ("a", "b", "c"),
        Rows(np.arange(len(x)), ends),
        Rows(np.empty(0, np.int64), np.zeros(2, np.int64)),
        ("one",),
        ("",),
    )
    one = np.zeros(1, np.int64)
    keys = np.array([7], np.uint64)
    plan = RoundPlan(1, one, keys, LocalTraining(1, 1, 0.1), task="statistics")
    plan = replace(plan, statistics=asked, protection=safe, noise_keys=keys)
    return {name: t[0] for name, t in statistics(population, HEAD, plan).tensors.items()}


def apart(a, b, asked: Statistics) -> float:
    """Length of the difference, from whole matrices; counts where the sums do not hold them."""
    squares = np.square(a["sums"] - b["sums"]).sum()
    if asked.gram:
        squares += np.square(unpack_symmetric(a["gram"] - b["gram"])).sum()
    if not asked.bias:
        squares += np.square(a["counts"] - b["counts"]).sum()
    return float(np.sqrt(squares))


def clip_of(asked: Statistics) -> Protection:
    return Protection(row_clip=RANDOM_CLIP if asked.random_features else CLIP)


ROW = st.lists(st.floats(-100, 100, width=32), min_size=D, max_size=D)


@pytest.mark.parametrize("case", CASES)
@given(st.lists(ROW, max_size=3), ROW, ROW, st.integers(0, C - 1))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_no_neighbour_moves_the_sums_further(case, others, row, instead, label) -> None:
    asked, safe, labels = CASES[case], clip_of(CASES[case]), [0] * len(others)
    without = sums(np.array(others), labels, asked, safe)
    with_row = sums(np.array([*others, row]), [*labels, 1], asked, safe)
    with_other = sums(np.array([*others, instead]), [*labels, label], asked, safe)
    assert apart(with_row, without, asked) <= BOUNDS[case][0] * (1 + 1e-9)
    assert apart(with_row, with_other, asked) <= BOUNDS[case][1] * (1 + 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_the_bounds_are_reached(case) -> None:
    """An adversary who searches for the worst neighbour comes within 1 % of each."""
    asked, safe = CASES[case], clip_of(CASES[case])
    assert sensitivity(asked) == pytest.approx(BOUNDS[case][0], rel=1e-12)
    assert sensitivity(asked, replaced=True) == pytest.approx(BOUNDS[case][1], rel=1e-12)
    rng = np.random.default_rng(0)
    nobody = sums(np.empty((0, D)), [], asked, safe)

    def worst(move, size: int) -> float:
        found = [
            -minimize(lambda v: -move(v), v0, method="Nelder-Mead", options={"maxfev": 150}).fun
            for v0 in 30 * rng.normal(size=(2, size))
        ]
        return max(found)

    def added(v) -> float:
        return apart(sums(v, [0], asked, safe), nobody, asked)

    def replaced(v, label: int) -> float:
        first, second = sums(v[:D], [0], asked, safe), sums(v[D:], [label], asked, safe)
        return apart(first, second, asked)

    reached = worst(added, D)
    assert 0.99 * BOUNDS[case][0] <= reached <= BOUNDS[case][0] * (1 + 1e-9)
    reached = max(worst(lambda v, c=c: replaced(v, c), 2 * D) for c in (0, 1))
    assert 0.99 * BOUNDS[case][1] <= reached <= BOUNDS[case][1] * (1 + 1e-9)


def test_rows_are_shortened_as_a_whole_and_short_ones_only_scaled() -> None:
    rows = np.array([[3.0, 4.0, 1.0], [0.3, 0.4, 1.0], [0.0, 0.0, 1.0], [np.nan, 1.0, 1.0]])
    got = rows.copy()
    protect_rows(got, Statistics(), 1.0)
    unit = rows * np.array([0.9**0.5, 0.9**0.5, 0.1**0.5])
    assert got[0] == pytest.approx(unit[0] / np.linalg.norm(unit[0]), rel=1e-14)
    assert (got[1:3] == unit[1:3]).all()
    assert not got[3].any()  # and it does not take its client with it
    assert pytest.approx(0.1) == BIAS**2
    bare = rows[:2, :2].copy()
    protect_rows(bare, Statistics(bias=False), 2.0)
    assert bare[0] == pytest.approx([0.6, 0.8], rel=1e-14)
    assert (bare[1] == rows[1, :2] / 2).all()


@pytest.mark.parametrize("asked", [Statistics(), Statistics(bias=False)], ids=["bias", "counts"])
def test_noise_has_its_deviation_in_every_place(asked) -> None:
    width, repeats, sigma = 30, 80, 3.0
    packed = width * (width + 1) // 2
    zero = {"gram": np.zeros(packed), "sums": np.zeros((4, width)), "counts": np.zeros(4, int)}
    drawn = [noised(zero, asked, sigma, seeded(k)) for k in range(repeats)]
    gram = np.stack([d["gram"] for d in drawn])
    diagonal = np.isin(np.arange(packed), on_diagonal(packed))
    assert (np.flatnonzero(diagonal) == on_diagonal(packed)).all()
    assert diagonal.sum() == width
    # relative deviation of a variance of n draws: sqrt(2 / n); five of them
    parts = {"diagonal": (gram[:, diagonal], sigma), "above": (gram[:, ~diagonal], sigma / 2**0.5)}
    parts["sums"] = np.stack([d["sums"] for d in drawn]), sigma
    if not asked.bias:
        parts["counts"] = np.stack([d["counts"] for d in drawn]), sigma
    assert ("counts" in drawn[0]) is (not asked.bias)
    for name, (values, deviation) in parts.items():
        slack = 5 * (2 / values.size) ** 0.5
        assert np.square(values).mean() == pytest.approx(deviation**2, rel=slack), name
        assert abs(values.mean()) < 5 * deviation / values.size**0.5, name


def test_noise_is_as_large_as_the_repair_takes_it_to_be() -> None:
    """The spectral norm of the noise is lambda = sigma sqrt(2 W), to the W^(-2/3) of its edge."""
    width, sigma = 300, 2.0
    zero = {"gram": np.zeros(width * (width + 1) // 2), "sums": np.zeros((1, 1))}
    gram = noised(zero, Statistics(), sigma, seeded(1))["gram"]
    norm = np.abs(np.linalg.eigvalsh(unpack_symmetric(gram))).max()
    assert norm == pytest.approx(sigma * (2 * width) ** 0.5, rel=0.05)


@pytest.mark.parametrize("asked", [Statistics(), Statistics(bias=False), CASES["fedncm"]], ids=str)
def test_an_answer_is_shortened_to_the_clip(asked) -> None:
    rng = np.random.default_rng(5)
    rows, labels = rng.normal(size=(20, D)), rng.integers(0, C, 20).tolist()
    plain = sums(rows, labels, asked, Protection(row_clip=CLIP))
    nobody = {name: np.zeros_like(tensor) for name, tensor in plain.items()}
    length = encoded_length(plain, asked)
    assert length == pytest.approx(apart(plain, nobody, asked), rel=1e-12)
    clipped = sums(rows, labels, asked, Protection(row_clip=CLIP, clip=length / 4))
    for name, tensor in plain.items():
        assert clipped[name].dtype == np.float64
        assert clipped[name] == pytest.approx(tensor / 4, rel=1e-12)
    loose = sums(rows, labels, asked, Protection(row_clip=CLIP, clip=2 * length))
    assert all((loose[name] == plain[name]).all() for name in plain)


def test_a_client_that_adds_noise_gives_away_no_count() -> None:
    rows, labels = np.eye(3), [0, 0, 1]
    safe = Protection(row_clip=CLIP, noise=2.0)
    plain = sums(rows, labels, Statistics(), Protection(row_clip=CLIP))
    own = sums(rows, labels, Statistics(), safe)
    drawn = noised(plain, Statistics(), 2.0, seeded(7))
    assert not own["counts"].any()
    assert all((own[name] == drawn[name]).all() for name in drawn)
    bare = sums(rows, labels, Statistics(bias=False), safe)
    assert (bare["counts"] != [2, 1, 0]).all()
    with pytest.raises(AssertionError, match="noise comes with the plan"):
        protect_answer(plain, Statistics(), safe)


def test_the_packed_diagonal() -> None:
    packed = pack_symmetric(np.diag(np.arange(1.0, 6.0)))
    assert packed[on_diagonal(15)].tolist() == [1, 2, 3, 4, 5]

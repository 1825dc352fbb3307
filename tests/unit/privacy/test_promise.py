"""Each mechanism's promise against its formula by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fedtl import planning
from fedtl.privacy.accounting import Release, epsilon_of
from fedtl.privacy.matrix import coefficients, sensitivity
from fedtl.privacy.promise import Promise, make_promise
from fedtl.privacy.worst import Cost, worst_cost
from fedtl.scenario.schema import Scenario
from fedtl.types import Int64, Roster

DELTA = 1e-5


def roster(sizes: list[int] | Int64) -> Roster:
    counts = np.asarray(sizes, np.int64)
    names = tuple(f"c{i}" for i in range(len(counts)))
    return Roster(names, ("",) * len(names), ("a", "b"), counts, counts, 4)


def scenario(
    fraction: float = 1.0, rounds: int = 12, training: dict | None = None, **privacy
) -> Scenario:
    if not {"epsilon", "noise_multiplier"} & set(privacy):
        privacy["noise_multiplier"] = 2.0
    return Scenario.model_validate(
        {
            "name": "x",
            "seed": 5,
            "rounds": rounds,
            "clients": {"fraction": fraction},
            "training": training or {},
            "privacy": {"mechanism": "central", **privacy},
        }
    )


def promise(sizes: list[int] | int = 20, **given) -> Promise:
    sizes = [50] * sizes if isinstance(sizes, int) else sizes
    made = make_promise(scenario(**given), roster(sizes))
    assert made is not None
    return made


def gaussian(noise: float, count: float) -> float:
    return epsilon_of([Release(noise / math.sqrt(count))], DELTA)


def turns_of(cohorts: list[list[int]]) -> Int64:
    return np.bincount(np.concatenate(cohorts).astype(np.int64))


def rounds_of(made: Promise, cohorts: list[list[int]]):
    return [made.entry(i, who, f"n{i}") for i, who in enumerate(cohorts, 1)]


def test_no_mechanism_no_promise() -> None:
    assert make_promise(Scenario(name="x"), roster([5])) is None


def test_central_of_all_clients() -> None:
    made = promise(sampling="fixed")
    assert (made.sampling, made.denominator, made.unit) == ("none", 20, "client")
    assert made.epsilon_after(12) == pytest.approx(gaussian(2.0, 12))
    assert made.server_after(12) is None
    spent = made.epsilon(rounds_of(made, [[0, 1]] * 5))  # whoever answered: all are in the sum
    assert spent == pytest.approx(gaussian(2.0, 5))


def test_central_by_coins() -> None:
    made = promise(25, fraction=0.1)
    assert (made.sampling, made.rate, made.denominator) == ("poisson", 0.1, 2.5)
    assert made.epsilon_after(7) == epsilon_of([Release(2.0, 7, "poisson", 0.1)], DELTA)
    assert made.epsilon(rounds_of(made, [[], [3], [1, 2]])) == made.epsilon_after(3)


def test_central_of_a_fixed_number_pays_for_two_clips() -> None:
    made = promise(25, fraction=0.1, sampling="fixed")
    assert (made.accountant, made.denominator, made.cohort) == ("rdp", 3, 3)
    halved = Release(1.0, 12, "fixed", 1.0, 25, 3)
    assert made.epsilon_after(12) == epsilon_of([halved], DELTA, "rdp")
    assert any("in another's place" in sentence for sentence in made.assumptions)


def test_central_in_turns_pays_for_own_turns() -> None:
    made = promise(20, fraction=0.3, sampling="cyclic", rounds=10)
    assert (made.cohort, made.separation) == (6, 4)
    assert made.epsilon_after(4) == pytest.approx(gaussian(2.0, 1))
    assert made.epsilon_after(5) == pytest.approx(gaussian(2.0, 2))
    assert made.epsilon_after(10) == pytest.approx(gaussian(2.0, 3))
    assert made.epsilon(rounds_of(made, [[0], [1], [0], [0]])) == pytest.approx(gaussian(2.0, 3))


def test_banded_is_one_gaussian() -> None:
    made = promise(20, fraction=0.25, sampling="cyclic", noise="banded", rounds=10)
    column = coefficients(4)
    np.testing.assert_array_equal(made.coefficients, column)
    assert made.sensitivity == sensitivity(column, 10, 4)
    assert made.epsilon_after(10) == pytest.approx(gaussian(2.0, 1))
    begun = sensitivity(column, 3, 4) / made.sensitivity
    assert made.epsilon_after(3) == pytest.approx(gaussian(2.0, begun**2))
    entries = rounds_of(made, [[i] for i in range(10)])
    assert made.epsilon(entries) == pytest.approx(gaussian(2.0, 1))
    assert made.epsilon(entries[:3]) == pytest.approx(made.epsilon_after(3))


def test_banded_round_released_twice_costs_more() -> None:
    """The matrix with row t twice, by hand: worst column norm over turns 0, 4, 8."""
    made = promise(20, fraction=0.25, sampling="cyclic", noise="banded", bands=6, rounds=10)
    entries = rounds_of(made, [[i] for i in range(10)])
    column = coefficients(6)
    matrix = sum(value * np.eye(10, k=-i) for i, value in enumerate(column))
    for again in range(10):
        doubled = np.vstack([matrix, matrix[again : again + 1]])
        worst = max(np.linalg.norm(doubled[:, first::4].sum(axis=1)) for first in range(4))
        exact = gaussian(2.0 * made.sensitivity / worst, 1)
        spent = made.epsilon([*entries, replace(entries[again], noise_id="other")])
        assert exact <= spent + 1e-12
        if again == 8:  # the third turn of who came first: this row moves most
            assert exact == pytest.approx(spent)


def test_local_pays_for_two_clips_in_own_rounds() -> None:
    made = promise(20, mechanism="local", fraction=0.25)
    spent = made.epsilon(rounds_of(made, [[0, 1], [1], [1, 2]]))
    assert spent == pytest.approx(gaussian(1.0, 3))
    assert made.against_server(rounds_of(made, [[0]])) == pytest.approx(gaussian(1.0, 1))
    assert made.server_after(12) == made.epsilon_after(12)


@pytest.mark.parametrize("mechanism", ["local", "example"])
@pytest.mark.parametrize("over", [1.0, 1.5])
def test_turns_are_those_that_will_be_taken(mechanism: str, over: float) -> None:
    asked = scenario(0.25, mechanism=mechanism, rounds=9).model_copy(
        update={
            "participation": scenario().participation.model_copy(update={"over_selection": over})
        }
    )
    made = make_promise(asked, roster([50] * 20))
    assert made is not None
    size = min(20, math.ceil(planning.cohort_size(asked, 20) * over))
    cohorts = [planning.sample_cohort(5, t, 20, size).tolist() for t in range(1, 10)]
    most = turns_of(cohorts).max()
    assert made.epsilon(rounds_of(made, cohorts)) == made.epsilon_after(9)
    if mechanism == "local":
        assert made.epsilon_after(9) == pytest.approx(gaussian(1.0, most))
        assert len(made.worst_clients(9)) == (turns_of(cohorts) == most).sum()


def test_secure_sums_against_the_server() -> None:
    made = promise(20, fraction=0.25, secure_aggregation="secagg", rounds=9)
    cohorts = [planning.poisson_cohort(5, t, 20, 0.25).tolist() for t in range(1, 10)]
    most = turns_of(cohorts).max()
    entries = rounds_of(made, cohorts)
    assert made.against_server(entries) == pytest.approx(gaussian(2.0, most))
    assert made.server_after(9) == pytest.approx(gaussian(2.0, most))
    assert made.epsilon(entries) < made.against_server(entries)


def test_example_level_steps_by_hand() -> None:
    """Batches of 10: 25 rows are 3 steps an epoch, at 0.4; 8 rows one full batch."""
    made = promise(
        [25, 8], mechanism="example", training={"batch_size": 10, "local_epochs": 2}, rounds=4
    )
    steps = Release(2.0, 4 * 2 * 3, "poisson", 0.4)
    whole = epsilon_of([steps], DELTA), gaussian(2.0, 4 * 2)
    assert made.epsilon_after(4) == max(whole)
    only_second = rounds_of(made, [[1], [1]])
    assert made.epsilon(only_second) == pytest.approx(gaussian(2.0, 2 * 2))
    assert made.unit == "example"


def test_worst_of_many_sizes_is_found_exactly() -> None:
    sizes = np.random.default_rng(3).integers(4, 300, 25)
    made = promise(sizes.tolist(), mechanism="example", training={"batch_size": 32}, rounds=2)
    each = {
        n: epsilon_of([Release(2.0, 10 * -(-n // 32), "poisson", min(1.0, 32 / n))], DELTA)
        for n in sizes.tolist()
    }
    assert made.epsilon_after(2) == max(each.values())
    assert set(sizes[made.worst_clients(2)].tolist()) == {max(each, key=lambda n: each[n])}


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_worst_cost_by_trying_all(accountant: str) -> None:
    stream = np.random.default_rng(1)
    for noise in (1.5, 6.0):
        costs = [
            Cost(float(rate), int(steps))
            for rate, steps in zip(
                stream.uniform(0.02, 1, 9), stream.integers(1, 60, 9), strict=True
            )
        ]
        spent = {c: epsilon_of(c.releases(noise), DELTA, accountant) for c in costs}
        found = worst_cost(costs, noise, DELTA, accountant)
        assert found is not None
        assert spent[found] == max(spent.values())
    assert worst_cost([], 1.0, DELTA, accountant) is None


def test_release_is_one_gaussian_whoever_is_protected() -> None:
    for unit in ("client", "example"):
        made = promise(mechanism="release", unit=unit, rounds=1)
        assert made.unit == unit
        assert made.epsilon_after(1) == pytest.approx(gaussian(2.0, 1))
        entry = made.entry(1, range(20), "n")
        assert (entry.kind, entry.clients) == ("statistics", tuple(range(20)))
        assert made.epsilon([entry]) == pytest.approx(gaussian(2.0, 1))
        assert made.against_server([entry]) is None
    made = promise(mechanism="release", rounds=1, secure_aggregation="secagg")
    assert made.against_server([entry]) == made.server_after(1) == made.epsilon_after(1)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"fraction": 0.25},
        {"fraction": 0.25, "sampling": "fixed"},
        {"fraction": 0.25, "sampling": "cyclic", "noise": "banded"},
        {"mechanism": "local", "fraction": 0.5},
        {"mechanism": "example"},
        {"mechanism": "release", "rounds": 1},
    ],
)
def test_noise_follows_from_epsilon(given) -> None:
    sizes = [30, 33, 65, 200, 500]
    made = promise(sizes, epsilon=2.5, **given)
    spent = made.epsilon_after(made.rounds)
    assert spent is not None
    assert 2.5 * 0.995 < spent <= 2.5
    assert make_promise(scenario(epsilon=2.5, **given), roster(sizes)) == made


def test_budget_in_rounds() -> None:
    made = promise(rounds=50, noise_multiplier=5.0)
    within = made.rounds_within(3.0)
    assert made.epsilon_after(within) <= 3.0 < made.epsilon_after(within + 1)
    assert made.rounds_within(0.01) == 0
    assert made.rounds_within(1e3) == 50


def test_without_noise_nothing_is_promised() -> None:
    for mechanism in ("central", "local", "example"):
        made = promise(mechanism=mechanism, noise_multiplier=0.0)
        assert made.epsilon_after(12) is None
        assert made.epsilon(rounds_of(made, [[0]])) is None
        assert made.server_after(12) is None
        assert made.rounds_within(100.0) == 0
        assert any("nothing is promised" in note for note in made.notes)
        assert made.epsilon([]) == 0


@pytest.mark.parametrize(
    ("given", "sizes", "warned"),
    [
        ({"delta": 0.05}, [50] * 20, "clients (1/20"),
        ({"delta": 0.049}, [50] * 20, None),
        ({"mechanism": "example", "delta": 0.1}, [10, 50], "examples of the smallest client (1/10"),
        ({"mechanism": "example", "delta": 0.09}, [10, 50], None),
        ({"mechanism": "release", "delta": 0.02, "rounds": 1}, [10, 40], "examples (1/50"),
        ({"mechanism": "release", "unit": "client", "delta": 0.6, "rounds": 1}, [10, 40], "(1/2"),
    ],
)
def test_delta_is_warned_of(given, sizes, warned: str | None) -> None:
    notes = [note for note in promise(sizes, **given).notes if note.startswith("delta")]
    assert len(notes) == (warned is not None)
    assert warned is None or warned in notes[0]


def test_one_client_is_told() -> None:
    made = promise(1, fraction=0.5)
    assert any("one client" in note for note in made.notes)
    assert made.sampling == "poisson"  # its coin still counts


def test_noise_of_two_strengths_adds_up() -> None:
    made = promise()
    strong = replace(made.entry(1, [0], "a"), noise_multiplier=8.0)
    both = made.epsilon([strong, made.entry(2, [0], "b")])
    assert both == pytest.approx(gaussian(1.0, 1 / 64 + 1 / 4))


def test_rounds_of_a_changed_scenario_keep_their_own_sampling() -> None:
    before, after = promise(fraction=0.25), promise(fraction=0.5)
    entries = [before.entry(1, [0], "a"), after.entry(2, [0], "b")]
    exact = [Release(2.0, 1, "poisson", 0.25), Release(2.0, 1, "poisson", 0.5)]
    assert after.epsilon(entries) == epsilon_of(exact, DELTA)
    everybody = promise()
    spent = everybody.epsilon([everybody.entry(1, [0], "a"), before.entry(2, [0], "b")])
    assert spent == epsilon_of([Release(2.0), exact[0]], DELTA)

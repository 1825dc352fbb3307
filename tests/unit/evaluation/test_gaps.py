"""The whole table: its laws, its bad inputs, and that sums alone give the same."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from fedtl.evaluation import client_sums, gaps, sampled_gaps
from fedtl.evaluation.client_sums import ClientSums
from fedtl.evaluation.gap_kinds import KINDS, SAMPLED, SCORES
from fedtl.evaluation.source_classes import SourceClassifier
from fedtl.types import Population, Rows

NONE = "NCE and LEEP are undefined: no source."
SUMMED = [name for name, kind in KINDS.items() if kind["made_from"] != SAMPLED]


def people(*clients: tuple[np.ndarray, np.ndarray], classes: int = 3) -> Population:
    """Clients of given training features and labels."""
    ends = np.cumsum([0, *(len(y) for _, y in clients)])
    num = len(clients)
    return Population(
        np.concatenate([x for x, _ in clients]).astype(np.float32),
        np.concatenate([y for _, y in clients]).astype(np.int32),
        tuple("abcdef"[:classes]),
        Rows(np.arange(ends[-1]), ends),
        Rows(np.empty(0, np.int64), np.zeros(num + 1, np.int64)),
        tuple(f"client-{k}" for k in range(num)),
        ("",) * num,
    )


def client(n: int, seed: int, shift: float = 0.0, width: int = 5):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    x = rng.normal(size=(n, width)) + shift + 2
    x[np.arange(n), y] += 2
    return x, y


def measured(population: Population, **options) -> dict:
    """Measured, and JSON without NaN or infinity."""
    found = gaps.measure(population, 1, **{"classifier": NONE, **options})
    json.dumps(found, allow_nan=False)
    num = population.num_clients
    if found["pairs"] is not None:
        assert set(found["pairs"]) == set(KINDS)
        for matrix in found["pairs"].values():
            assert [len(row) for row in matrix] == [num] * num
            assert matrix == [list(column) for column in zip(*matrix, strict=True)]
    assert set(found["rest"]) == set(KINDS)
    assert all(len(values) == num for values in found["rest"].values())
    return found


def without_time(facts: dict) -> dict:
    return {name: value for name, value in facts.items() if name != "seconds"}


def test_threads_do_not_change_a_figure(population: Population) -> None:
    rng = np.random.default_rng(0)
    source = SourceClassifier(rng.normal(size=(20, 9)).astype(np.float32), np.zeros(20, np.float32))
    one = measured(population, classifier=source)
    assert without_time(one) == without_time(measured(population, classifier=source, threads=3))
    # four clients of at least ten rows, everything else is defined
    assert one["rest"]["a_distance"].count(None) == 1
    assert np.isfinite(np.array(one["pairs"]["conditional"], float)).all()
    assert None not in one["transferability"]["all"].values()


def test_sums_alone_give_the_same_but_for_what_takes_rows(population: Population) -> None:
    sums = list(ClientSums(population, 1, lambda: None))
    found = gaps.from_statistics(sums, population.names, population.domains, population.classes)
    json.dumps(found, allow_nan=False)
    here = measured(population)
    for name in SUMMED:
        assert found["pairs"][name] == here["pairs"][name]
        assert found["rest"][name] == here["rest"][name]
    for name in set(KINDS) - set(SUMMED):
        assert set(found["rest"][name]) == {None}
        assert "real clients" in found["kinds"][name]["note"]
    assert found["transferability"] == here["transferability"]
    assert found["counts"] == here["counts"]
    # without the bias that Fed3R asks for, the same again
    width = population.features.shape[1]
    upper = np.triu_indices(width + 1)
    inner = (upper[0] < width) & (upper[1] < width)
    bare = [
        {"counts": s["counts"], "sums": s["sums"][:, :width], "gram": s["gram"][inner]}
        for s in sums
    ]
    other = gaps.from_statistics(
        bare, population.names, population.domains, population.classes, bias=False
    )
    assert without_time(other) == without_time(found)


def test_many_clients_are_compared_to_the_rest_only(
    population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(population)
    monkeypatch.setattr(gaps, "PAIRS_LIMIT", 4)
    many = measured(population)
    assert many["pairs"] is None
    assert many["rest"] == whole["rest"]
    assert any("to the rest only" in note for note in many["notes"])
    monkeypatch.setattr(client_sums, "KEPT_BYTES", 100)
    monkeypatch.setattr(client_sums, "WAVE", 2)
    assert without_time(measured(population)) == without_time(many)


def test_the_order_of_clients_only_reorders() -> None:
    data = [client(40, 1), client(25, 2, shift=0.5), client(60, 3)]
    first = measured(people(*data))
    turned = measured(people(data[2], data[0], data[1]))
    order = [2, 0, 1]
    for name in SUMMED:
        expected = np.array(first["pairs"][name])[np.ix_(order, order)]
        assert np.array(turned["pairs"][name]) == pytest.approx(expected, rel=1e-5, abs=1e-12)
        rest = np.array(first["rest"][name])[order]
        assert np.array(turned["rest"][name]) == pytest.approx(rest, rel=1e-5, abs=1e-12)


def test_identical_domains_are_at_distance_0() -> None:
    same = client(50, 1)
    found = measured(people(same, same, same))
    for name in SUMMED:
        assert np.array(found["pairs"][name]) == pytest.approx(np.zeros((3, 3)), abs=1e-9)
        assert np.array(found["rest"][name]) == pytest.approx(np.zeros(3), abs=1e-9), name
    for name in ("js", "hellinger", "emd", "conditional"):
        assert set(found["rest"][name]) == {0.0}
    assert np.min(found["pairs"]["mmd_p"]) > 0.05


def test_identical_domains_are_seldom_significant() -> None:
    # 200 draws of two clients of one distribution, through the whole of the sampling
    p = []
    for seed in range(200):
        population = people(client(16, 2 * seed), client(16, 2 * seed + 1))
        with ThreadPoolExecutor(1) as pool:
            found = sampled_gaps.sample_gaps(population, seed, True, pool, lambda: None)
        p.append((found.pairs["mmd_p"][0, 1], found.rest["mmd_p"][0]))
    for column in np.array(p).T:
        assert binomtest(int((column < 0.05).sum()), 200, 0.05).pvalue > 0.001


def test_a_shifted_domain_is_seen_by_every_feature_distance() -> None:
    found = measured(people(client(60, 1), client(60, 2), client(60, 3, shift=3)))
    for name in ("conditional", "frechet", "a_distance", "mmd2"):
        matrix = np.array(found["pairs"][name])
        assert matrix[0, 2] > 3 * matrix[0, 1] + 0.1, name
        assert np.argmax(found["rest"][name]) == 2
    assert found["pairs"]["mmd_p"][0][2] == 0.005


def test_one_client_has_nobody_to_be_far_from() -> None:
    found = measured(people(client(30, 1)))
    assert {value for values in found["rest"].values() for value in values} == {None}
    assert found["transferability"]["clients"][0]["logme"] is not None
    assert any("one client" in note for note in found["notes"])


def test_small_and_lopsided_clients_are_undefined_where_they_are() -> None:
    x, y = client(40, 1)
    few = (x[:2], np.array([0, 1]))
    single = (x[:1], y[:1])
    one_class = (x, np.zeros(40, int))
    found = measured(people(client(50, 2), few, single, one_class))
    own = found["transferability"]["clients"]
    for k in (1, 2, 3):
        assert own[k]["h_score"] is None
        assert own[k]["logme"] is None
    assert found["pairs"]["coral"][0][1] is not None
    assert found["pairs"]["coral"][0][2] is None
    assert found["pairs"]["frechet"][2][3] is None
    assert found["pairs"]["a_distance"][0][1] is None
    assert found["pairs"]["a_distance"][0][3] is not None
    assert any("fewer than two" in note for note in found["notes"])
    assert any("fewer than 10" in note for note in found["notes"])


def test_constant_features_are_at_distance_0() -> None:
    y = np.arange(30) % 3
    same = (np.full((30, 5), 0.1), y)
    found = measured(people(same, same))
    for name in KINDS:
        expected = 1.0 if name == "mmd_p" else 0.0
        assert found["pairs"][name][0][1] == pytest.approx(expected, abs=1e-12), name
    assert found["transferability"]["all"]["h_score"] is None
    apart = measured(people(same, (same[0] + 1, y)))
    assert apart["pairs"]["conditional"][0][1] is None  # there is no spread to measure it by
    assert apart["pairs"]["frechet"][0][1] == pytest.approx(5, rel=1e-5)


def test_domains_without_common_classes_have_no_distance_within_classes() -> None:
    x, _ = client(40, 1)
    first, second = (x, np.arange(40) % 2), (x, np.full(40, 2))
    found = measured(people(first, second))
    assert found["pairs"]["conditional"][0][1] is None
    assert found["rest"]["conditional"] == [None, None]
    assert found["pairs"]["js"][0][1] == 1
    assert found["pairs"]["coral"][0][1] == pytest.approx(0, abs=1e-12)


def test_without_a_source_classifier_it_is_said_why(population: Population) -> None:
    found = measured(population)
    assert NONE in found["notes"]
    assert found["transferability"]["all"]["leep"] is None
    assert set(found["scores"]) == set(SCORES) == set(found["transferability"]["all"])


def test_source_rows_are_shared_out_by_examples(
    population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampled_gaps, "SOURCE_ROWS", 62)
    classifier = SourceClassifier(np.eye(9, dtype=np.float32), np.zeros(9, np.float32))
    found = measured(population, classifier=classifier)
    assert found["sampling"]["source_rows"] == 15 + 4 + 28 + 6 + 10
    halves = replace(population, features=population.features.astype(np.float16))
    assert measured(halves, classifier=classifier)["rest"]["js"] == found["rest"]["js"]


def test_work_can_be_stopped(population: Population) -> None:
    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        gaps.measure(population, 1, classifier=NONE, check=stop)

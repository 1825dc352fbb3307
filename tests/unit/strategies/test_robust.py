"""Robust rules against slow oracles, and against Flower's own where it has them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.multikrum import select_multikrum
from scipy.optimize import minimize

from fedtl.errors import PolicyStop
from fedtl.strategies import robust
from fedtl.strategies.averaging import FedAvg
from fedtl.strategies.robust import (
    Bulyan,
    FLTrust,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NormClip,
    TrimmedMean,
)

RNG = np.random.default_rng(5)
HEAD = {
    "weight": RNG.normal(size=(3, 4)).astype(np.float32),
    "bias": RNG.normal(size=3).astype(np.float32),
}
ALL = [
    Krum(malicious=2),
    MultiKrum(malicious=2),
    MultiKrum(malicious=2, selected=3),
    Bulyan(malicious=2),
    Median(),
    TrimmedMean(trim=0.2),
    GeometricMedian(),
    FLTrust(root=4),
    NormClip(),
    NormClip(max_norm=0.5),
]


def stepped(strategy, given):
    return strategy.step(strategy.init(HEAD, 99), given).head


def deltas(given) -> np.ndarray:
    """[k, P], float64."""
    return np.concatenate(
        [(t.astype(float) - HEAD[n]).reshape(len(t), -1) for n, t in given.tensors.items()], axis=1
    )


def heads(rows: np.ndarray) -> dict[str, np.ndarray]:
    rows = np.atleast_2d(rows)
    return {
        "weight": HEAD["weight"] + rows[:, :12].reshape(-1, 3, 4),
        "bias": HEAD["bias"] + rows[:, 12:],
    }


def same(head, delta: np.ndarray, tolerance: float = 1e-6) -> None:
    for name, tensor in heads(delta).items():
        np.testing.assert_allclose(head[name], tensor[0], rtol=tolerance, atol=tolerance)


@pytest.fixture
def cohort(updates):
    """Eleven clients of unequal size that moved as one likes, 15 coordinates each."""

    def make(seed: int = 0, size: int = 11, liars: int = 0, lie=None):
        rng = np.random.default_rng(seed)
        moved = 0.3 + rng.normal(size=(size, 15))
        moved[size - liars :] = lie if liars else 0
        return updates(heads(moved), examples=rng.integers(1, 99, size).tolist())

    return make


def slow_scores(rows: np.ndarray, f: int) -> list[float]:
    scores = []
    for i in range(len(rows)):
        apart = sorted(((rows[i] - rows[j]) ** 2).sum() for j in range(len(rows)) if j != i)
        scores.append(sum(apart[: max(1, len(rows) - f - 2)]))
    return scores


def as_records(given) -> list[RecordDict]:
    return [
        RecordDict(
            {
                "arrays": ArrayRecord({n: Array(t[k]) for n, t in given.tensors.items()}),
                "metrics": MetricRecord({"num-examples": int(given.num_examples[k])}),
            }
        )
        for k in range(len(given.clients))
    ]


def flowers(strategy, given) -> dict[str, np.ndarray]:
    replies = [SimpleNamespace(content=c, has_error=lambda: False) for c in as_records(given)]
    arrays, _ = strategy.aggregate_train(1, replies)
    return {name: array.numpy() for name, array in arrays.items()}


@pytest.mark.parametrize("seed", range(4))
def test_krum_takes_over_the_update_with_the_lowest_score(cohort, seed: int) -> None:
    given = cohort(seed)
    best = int(np.argmin(slow_scores(deltas(given), 2)))
    head = stepped(Krum(malicious=2), given)
    for name in HEAD:
        assert head[name].tobytes() == given.tensors[name][best].tobytes()


@pytest.mark.parametrize(("f", "selected", "weighting"), [(2, None, "examples"), (1, 4, "uniform")])
def test_multikrum_averages_the_lowest_scores(cohort, f, selected, weighting) -> None:
    given = cohort(1)
    chosen = np.argsort(slow_scores(deltas(given), f))[: selected or 11 - f]
    weights = given.num_examples[chosen] if weighting == "examples" else None
    mean = np.average(deltas(given)[chosen], axis=0, weights=weights)
    same(stepped(MultiKrum(weighting, 1.0, f, selected), given), mean)


@pytest.mark.parametrize("f", [0, 1, 2, 3])
def test_krum_and_multikrum_choose_as_flower_does(cohort, f: int) -> None:
    given = cohort(2)
    records = as_records(given)
    for wanted, strategy in ((1, Krum(malicious=f)), (5, MultiKrum(malicious=f, selected=5))):
        theirs = [records.index(r) for r in select_multikrum(records, f, wanted)]
        shares = strategy.shares(HEAD, given)
        assert np.flatnonzero(shares).tolist() == sorted(theirs)


def test_distances_are_right_beside_an_update_that_is_far_away(cohort) -> None:
    given = cohort(3, liars=2, lie=1e9)
    rows = deltas(given)
    slow = ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
    found = robust.square_distances(HEAD, given)
    np.testing.assert_allclose(found[:9, :9], slow[:9, :9], rtol=1e-9)
    np.testing.assert_allclose(found[:9, 9:], slow[:9, 9:], rtol=1e-9)
    assert (found == found.T).all()


def test_what_cancels_in_distances_is_less_than_float32_hides(cohort) -> None:
    given = cohort(3)
    for apart in (1.0, 1e-3, 1e-5):
        tensors = {
            n: (t[:1] + 1e3 + apart * (t - t[:1])).astype(np.float32)
            for n, t in given.tensors.items()
        }
        near = replace(given, tensors=tensors)
        nudged = replace(given, tensors={n: np.nextafter(t, np.inf) for n, t in tensors.items()})
        nudged.tensors["bias"][:5] = tensors["bias"][:5]  # not all the same way
        slow, other = (
            ((rows[:, None] - rows[None]) ** 2).sum(axis=2)
            for rows in (deltas(near), deltas(nudged))
        )
        off = ~np.eye(11, dtype=bool)
        error = np.abs(robust.square_distances(HEAD, near) - slow)[off].max()
        assert error < np.abs(other - slow)[off].max()


def test_equal_scores_go_to_the_lower_client(updates) -> None:
    pairs = np.zeros((5, 15))
    pairs[:, 0] = [9, 1, 1.5, 5, 20]  # with f = 1 two neighbours count
    pairs[3, 0] = 1.25
    given = updates(heads(pairs))
    scores = robust.krum_scores(robust.square_distances(HEAD, given), 1)
    assert Krum(malicious=1).shares(HEAD, given).argmax() == np.argmin(scores) == 3
    twins = updates(heads(np.zeros((5, 15))))
    assert Krum(malicious=1).shares(HEAD, twins).tolist() == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("f", "size"), [(0, 5), (1, 7), (2, 11), (2, 12)])
def test_bulyan_chooses_again_and_again_and_averages_near_the_median(cohort, seed, f, size) -> None:
    given = cohort(seed, size)
    rows, left, chosen = deltas(given), list(range(size)), []
    while len(chosen) < size - 2 * f:
        best = int(np.argmin(slow_scores(rows[left], f))) if len(left) > 1 else 0
        chosen.append(left.pop(best))
    kept, expected = rows[chosen], []
    for column in kept.T:
        middle = np.median(column)
        expected.append(np.mean(sorted(column, key=lambda v: abs(v - middle))[: size - 4 * f]))
    head = stepped(Bulyan(malicious=f), given)
    same(head, np.array(expected))
    rule = flower.Bulyan(
        num_malicious_nodes=f, selection_rule=lambda records, *_: [records[k] for k in chosen]
    )
    for name, theirs in flowers(rule, given).items():
        np.testing.assert_allclose(head[name], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 7, 10])
def test_median_is_numpys_and_flowers(cohort, size: int) -> None:
    given = cohort(4, size)
    head = stepped(Median(), given)
    same(head, np.median(deltas(given), axis=0))
    for name, theirs in flowers(flower.FedMedian(), given).items():
        np.testing.assert_allclose(head[name], theirs, rtol=1e-6)


@pytest.mark.parametrize(("trim", "size"), [(0.0, 9), (0.1, 9), (0.2, 10), (0.3, 11), (0.49, 11)])
def test_trimmed_mean_is_scipys_and_flowers(cohort, trim: float, size: int) -> None:
    given = cohort(5, size)
    head = stepped(TrimmedMean(trim=trim), given)
    same(head, scipy.stats.trim_mean(deltas(given), trim, axis=0))
    for name, theirs in flowers(flower.FedTrimmedAvg(beta=trim), given).items():
        np.testing.assert_allclose(head[name], theirs, rtol=1e-5)


def test_trimming_counts_as_people_do_and_never_cuts_everybody() -> None:
    assert robust.trimmed_clients(0.29, 100) == 29
    assert robust.trimmed_clients(0.1, 9) == 0
    for count in range(1, 300):
        for trim in np.arange(0, 0.5, 0.01).tolist():
            assert 2 * robust.trimmed_clients(trim, count) < count


def test_rules_by_column_do_not_depend_on_the_chunks(cohort, monkeypatch) -> None:
    given = cohort(6)
    for strategy in (Median(), TrimmedMean(trim=0.2), Bulyan(malicious=2), Krum(malicious=2)):
        whole = stepped(strategy, given)
        with monkeypatch.context() as patch:
            patch.setattr(robust, "CHUNK_BYTES", 150)
            parts = stepped(strategy, given)
        assert all(whole[n].tobytes() == parts[n].tobytes() for n in HEAD)


def test_the_geometric_median_has_the_least_sum_of_distances(cohort) -> None:
    given = cohort(7)
    rows, weights = deltas(given), given.num_examples / given.num_examples.sum()

    def objective(point):
        return (weights * np.linalg.norm(rows - point, axis=1)).sum()

    found = np.concatenate(
        [(t.astype(float) - HEAD[n]).ravel()
         for n, t in stepped(GeometricMedian(iterations=200), given).items()]
    )  # fmt: skip
    solved = scipy.optimize.minimize(objective, rows.mean(axis=0), options={"gtol": 1e-9})
    assert objective(found) <= solved.fun * (1 + 1e-7)
    few = heads(np.zeros((1, 15))) | stepped(GeometricMedian(), given)
    np.testing.assert_allclose(few["bias"], HEAD["bias"] + found[12:], atol=0.02)


def test_weiszfeld_steps_are_the_papers(cohort) -> None:
    given = cohort(8)
    rows, weights = deltas(given), given.num_examples / given.num_examples.sum()
    own = np.linalg.norm(rows, axis=1)
    point = (weights * np.minimum(1, np.median(own) / own)) @ rows
    for _ in range(3):
        beta = weights / np.maximum(1.5, np.linalg.norm(rows - point, axis=1))
        point = (beta[:, None] * rows).sum(axis=0) / beta.sum()
    same(stepped(GeometricMedian(iterations=3, nu=1.5), given), point)


@pytest.mark.parametrize("idle", [1, 2, 4])
def test_clients_that_do_not_move_hold_no_geometric_median(cohort, idle: int) -> None:
    given = cohort(9, size=10)
    rows = deltas(given) + 3.0
    rows[:idle] = 0
    moved = replace(given, tensors={n: t.astype(np.float32) for n, t in heads(rows).items()})
    found = deltas_of(stepped(GeometricMedian(weighting="uniform", iterations=40), moved))
    best = minimize(lambda v: np.linalg.norm(rows - v, axis=1).sum(), rows.mean(axis=0)).x
    np.testing.assert_allclose(found, best, atol=0.02 * np.linalg.norm(best))
    quick = deltas_of(stepped(GeometricMedian(weighting="uniform"), moved))
    assert np.linalg.norm(quick) > 0.9 * np.linalg.norm(best)


def deltas_of(head) -> np.ndarray:
    return np.concatenate([(head[n].astype(float) - HEAD[n]).ravel() for n in HEAD])


def test_norms_are_clipped_without_a_word_about_clients_that_do_not_move(cohort) -> None:
    given = cohort(9, size=5)
    rows = deltas(given) * 100
    rows[0] = 0
    moved = replace(given, tensors={n: t.astype(np.float32) for n, t in heads(rows).items()})
    stepped(NormClip(), moved)  # warnings are errors


def test_the_geometric_median_comes_back_from_far_outliers_in_few_steps(cohort) -> None:
    far, near = cohort(9, liars=3, lie=1e9), cohort(9, size=11)
    honest = deltas(near)[:8]
    found = stepped(GeometricMedian(weighting="uniform"), far)
    apart = np.linalg.norm(found["bias"] - HEAD["bias"] - honest[:, 12:].mean(axis=0))
    assert apart < np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()


def test_fltrust_follows_its_equations(cohort) -> None:
    given = cohort(10)
    rows = deltas(given)
    trusted = rows[4]
    scores, sent = [], []
    for k, row in enumerate(rows):
        if k == 4:
            continue
        cosine = row @ trusted / np.linalg.norm(row) / np.linalg.norm(trusted)
        scores.append(max(0.0, cosine))
        sent.append(row * np.linalg.norm(trusted) / np.linalg.norm(row))
    assert 0 < np.count_nonzero(scores) < 10
    expected = (np.array(scores)[:, None] * sent).sum(axis=0) / sum(scores)
    same(stepped(FLTrust(root=4, server_learning_rate=0.5), given), 0.5 * expected)


def test_fltrust_stays_without_its_client_or_anybody_who_agrees(cohort, updates) -> None:
    given = cohort(11)
    away = replace(given, clients=given.clients + 100)
    against = updates(heads(np.vstack([np.ones(15), -np.ones(15), np.zeros(15)])))
    still = updates(heads(np.vstack([np.zeros(15), np.ones(15)])))
    for strategy, round in (
        (FLTrust(root=4), away),
        (FLTrust(root=0), against),
        (FLTrust(root=0), still),
    ):
        head = stepped(strategy, round)
        assert all(head[n].tobytes() == HEAD[n].tobytes() for n in HEAD)


@pytest.mark.parametrize("bound", [None, 0.7, 1e6])
def test_norm_clip_shortens_to_the_bound_or_the_median(cohort, bound) -> None:
    given = cohort(12)
    rows, weights = deltas(given), given.num_examples / given.num_examples.sum()
    length = np.linalg.norm(rows, axis=1)
    limit = np.median(length) if bound is None else bound
    clipped = rows * np.minimum(1, limit / length)[:, None]
    assert np.linalg.norm(clipped, axis=1).max() <= limit * (1 + 1e-12)
    same(stepped(NormClip(max_norm=bound), given), weights @ clipped)
    if bound == 1e6:
        same(stepped(FedAvg(), given), weights @ clipped)


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: type(s).__name__)
def test_a_rate_of_the_server_scales_the_step(strategy, cohort) -> None:
    given = cohort(13)
    whole, half = (
        stepped(strategy, given),
        stepped(replace(strategy, server_learning_rate=0.5), given),
    )
    for name in HEAD:
        np.testing.assert_allclose(
            half[name], HEAD[name] + 0.5 * (whole[name].astype(float) - HEAD[name]), atol=1e-6
        )


@pytest.mark.parametrize(
    ("strategy", "needed"),
    [
        (Krum(malicious=2), 7),
        (MultiKrum(malicious=2), 7),
        (MultiKrum(malicious=1, selected=6), 7),
        (Bulyan(malicious=1), 7),
    ],
)
def test_too_few_updates_stop_the_run_with_the_numbers(strategy, needed, cohort) -> None:
    stepped(strategy, cohort(14, needed))
    with pytest.raises(PolicyStop) as caught:
        stepped(strategy, cohort(14, needed - 1))
    line, rule = caught.value.line(), type(strategy).__name__.lower()
    assert line.startswith(f"{rule} needs {needed} updates to withstand {strategy.malicious} liars")
    assert f"the round has {needed - 1}" in line
    assert f"participation.quorum = {needed}" in line

"""Episodes: drawn as asked for, and heads on inner products equal the slow and obvious ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import Ridge

from fedtl.few_shot.episodes import (
    RIDGE,
    Pool,
    accuracies,
    draw,
    draw_many,
    eligible,
    interval,
    logistic_scores,
    prototype_scores,
    ridge_scores,
)

WAYS, SHOTS, QUERIES = 3, 4, 6


@pytest.fixture
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Support [5, 12, 9] and queries [5, 18, 9], rows of length 1, sorted by class."""
    rng = np.random.default_rng(0)
    found = []
    for each in (SHOTS, QUERIES):
        rows = rng.normal(size=(5, WAYS * each, 9)) + np.repeat(np.eye(9)[:WAYS] * 1.5, each, 0)
        found.append(rows / np.linalg.norm(rows, axis=2, keepdims=True))
    return found[0], found[1]


def products(drawn: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    support, query = drawn
    return support @ support.transpose(0, 2, 1), query @ support.transpose(0, 2, 1)


def test_prototypes_are_nearest_means(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores = prototype_scores(*products(drawn), WAYS)
    for e, (support, query) in enumerate(zip(*drawn, strict=True)):
        means = support.reshape(WAYS, SHOTS, -1).mean(axis=1)
        far = np.square(query[:, None] - means).sum(axis=2)
        own = np.square(query).sum(axis=1, keepdims=True)
        assert np.allclose(scores[e], (own - far) / 2, atol=1e-12)


def test_ridge_is_scikit_learns(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores = ridge_scores(*products(drawn), WAYS)
    target = np.repeat(np.eye(WAYS), SHOTS, axis=0)
    for e, (support, query) in enumerate(zip(*drawn, strict=True)):
        expected = Ridge(alpha=RIDGE, solver="cholesky").fit(support, target).predict(query)
        assert np.allclose(scores[e] + 1 / WAYS, expected, atol=1e-9)


def test_the_logistic_head_is_near_the_optimum(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores = logistic_scores(*products(drawn), WAYS)
    truth = np.repeat(np.arange(WAYS), SHOTS)
    for e, (support, query) in enumerate(zip(*drawn, strict=True)):
        centred = support - support.mean(axis=0)

        def loss(flat: np.ndarray, x: np.ndarray = centred) -> float:
            found = x @ flat.reshape(-1, WAYS)
            log = np.log(np.exp(found).sum(axis=1)) - found[np.arange(len(x)), truth]
            return float(log.sum() + RIDGE / 2 * np.square(flat).sum())

        best = minimize(loss, np.zeros(9 * WAYS), options={"gtol": 1e-7}).x.reshape(-1, WAYS)
        expected = (query - support.mean(axis=0)) @ best
        assert np.allclose(scores[e], expected, atol=2e-3)


def test_an_episode_is_what_was_asked_for() -> None:
    labels = np.repeat(np.arange(6), [30, 30, 30, 30, 5, 30]).astype(np.int32)
    rows = np.arange(len(labels))
    pool = Pool("all", rows, rows)
    classes = eligible(pool, labels, SHOTS, QUERIES)
    assert len(classes) == 5  # one has too few
    for seed in range(20):
        support, query = draw(classes, True, WAYS, SHOTS, QUERIES, np.random.default_rng(seed))
        assert support.shape == (WAYS, SHOTS)
        assert query.shape == (WAYS, QUERIES)
        assert (labels[support] == labels[query[:, :1]]).all()
        assert len(set(labels[support[:, 0]])) == WAYS
        assert len({*support.ravel(), *query.ravel()}) == WAYS * (SHOTS + QUERIES)


def test_queries_of_others_are_never_of_the_supports_client() -> None:
    labels = np.tile(np.arange(4), 20).astype(np.int32)
    mine = np.arange(40)
    found = draw_many(Pool("x", mine, np.arange(40, 80)), labels, 3, 2, 5, count=30, seed=1)
    assert found is not None
    support, query = found
    assert support.max() < 40 <= query.min()
    assert (labels[support][:, :, 0] == labels[query][:, :, 0]).all()


def test_episodes_follow_from_seed_pool_and_number() -> None:
    labels = np.repeat(np.arange(6), 30).astype(np.int32)
    rows = np.arange(180)

    def of(name: str = "a", count: int = 8, seed: int = 1) -> np.ndarray:
        found = draw_many(Pool(name, rows, rows), labels, WAYS, SHOTS, QUERIES, count, seed)
        assert found is not None
        return found[0]

    assert (of() == of(count=20)[:8]).all()
    assert (of() != of(seed=2)).any()
    assert (of() != of("b")).any()


def test_accuracy_does_not_depend_on_how_many_are_done_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(5), 20).astype(np.int32)
    features = rng.normal(size=(100, 7)).astype(np.float32) + 2 * np.eye(7)[labels]
    rows = np.arange(100)
    found = draw_many(Pool("a", rows, rows), labels, 3, 2, 5, count=40, seed=0)
    assert found is not None
    whole = accuracies(features, *found)
    monkeypatch.setattr("fedtl.few_shot.episodes.CHUNK_ENTRIES", 1)
    single = accuracies(features, *found)
    for name, values in whole.items():
        assert (values == single[name]).all()
        assert 0.6 < values.mean() < 1  # a third is guessing


def test_the_interval_is_the_textbooks() -> None:
    values = np.array([0.2, 0.4, 0.9, 0.5])
    mean, half = interval(values)
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(1.96 * np.sqrt(np.square(values - 0.5).sum() / 3 / 4))


def test_the_command_tells_every_pool_as_json(fedtl, small) -> None:
    done = fedtl(
        "episodes", "small.toml", "--ways", "3", "--shots", "1,2", "--queries", "4",
        "--episodes", "20", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    rows = {(row["pool"], row["shots"]): row for row in facts["rows"]}
    assert {("everybody", 1), ("everybody", 2), ("client-0000", 1)} <= set(rows)
    assert ("client-0000 for others", 2) in rows
    for row in rows.values():
        for name in ("prototype", "ridge", "logistic"):
            assert row[name]["low"] <= row[name]["mean"] <= row[name]["high"]
    assert rows["everybody", 2]["ridge"]["mean"] > 0.5
    assert any("1.96" in line for line in facts["assumptions"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ways", "9"), "at least 9 such classes"),
        (("--queries", "500"), "too few classes have enough examples"),
        (("--ways", "1"), "at least 2"),
        (("--shots", "0"), "at least 1"),
        (("--shots", "one"), "not a list of whole numbers"),
        (("--episodes", "1"), "at least 2"),
    ],
)
def test_what_cannot_be_drawn_is_said(fedtl, small, arguments, says: str) -> None:
    done = fedtl("episodes", "small.toml", *arguments)
    assert done.returncode == 2, done.stdout
    assert says in done.stderr
    assert "Traceback" not in done.stderr

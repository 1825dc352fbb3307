"""Aligned features: the maps against their definitions, whose rows they see, and their bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import sqrtm

from fedtl.clients.alignment import align, moments, pooled_moments
from fedtl.engines.hosting import stored_file
from fedtl.transfer.features import FeatureStore
from fedtl.types import Population, Rows


def world(sizes: list[int], width: int, seed: int = 0, dtype: type = np.float32) -> Population:
    """Clients with a mean, scales and correlations of their own, rows scattered over the matrix."""
    random = np.random.default_rng(seed)
    tests = [4] * len(sizes)
    num = sum(sizes) + sum(tests)
    places = random.permutation(num)
    features = np.empty((num, width), dtype)
    train, test, first = [], [], 0
    for held, judged in zip(sizes, tests, strict=True):
        rows = np.sort(places[first : first + held + judged])
        mixing = np.linalg.qr(random.normal(size=(width, width)))[0] * random.uniform(1, 3, width)
        x = random.normal(size=(len(rows), width)) @ mixing + 5 * random.normal(size=width)
        features[rows] = x.astype(dtype)
        chosen = np.sort(random.choice(len(rows), held, replace=False))
        train.append(rows[chosen])
        test.append(np.setdiff1d(rows, rows[chosen]))
        first += held + judged
    offsets = np.cumsum([0, *sizes])
    names = tuple(f"c{i}" for i in range(len(sizes)))
    return Population(
        features,
        random.integers(0, 2, num).astype(np.int32),
        ("a", "b"),
        Rows(np.concatenate(train), offsets),
        Rows(np.concatenate(test), np.cumsum([0, *tests])),
        names,
        ("",) * len(sizes),
    )


def shrunk(x: np.ndarray) -> np.ndarray:
    """The covariance with as many more rows as it has features, alike in all directions."""
    count, width = x.shape
    covariance = np.cov(x.T, bias=True)
    mean_variance = np.trace(covariance) / width
    return (count * covariance + width * mean_variance * np.eye(width)) / (count + width)


def oracle(people: Population, kind: str, client: int) -> np.ndarray:
    """All rows of a client, training first, by the definitions, with scikit-learn and scipy."""
    own = people.client(client).features.astype(np.float64)
    both = np.concatenate([own, people.client(client, "test").features.astype(np.float64)])
    mean = own.mean(axis=0)
    if kind == "standardise":
        return (both - mean) / np.sqrt(own.var(axis=0) + 0.01 * own.var(axis=0).mean())
    whitened = (both - mean) @ np.linalg.inv(sqrtm(shrunk(own)).real)
    if kind == "whiten":
        return whitened
    everybody = people.features[people.train.index].astype(np.float64)
    return whitened @ sqrtm(shrunk(everybody)).real + everybody.mean(axis=0)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path)


@pytest.mark.parametrize("kind", ["standardise", "whiten", "coral"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_maps_are_those_of_the_definitions(store, kind, dtype) -> None:
    people = world([40, 3, 6, 90], 6, dtype=dtype)  # fewer rows than features, as many, more
    aligned, _ = align(people, kind, store=store)
    for client in range(people.num_clients):
        rows = np.concatenate([people.train.of(client), people.test.of(client)])
        expected = oracle(people, kind, client)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(aligned.features[rows], expected, atol=2e-6 * scale, rtol=0)


def test_afterwards_the_covariance_is_the_target(store) -> None:
    people = world([4000, 3000], 5)
    target = shrunk(people.features[people.train.index].astype(np.float64))
    for kind, wanted in (("whiten", np.eye(5)), ("coral", target)):
        aligned, _ = align(people, kind, store=store)
        for client in range(2):
            own = aligned.client(client).features.astype(np.float64)
            apart = np.cov(own.T, bias=True) - wanted  # what is left are 5 rows of 4,000
            assert np.abs(apart).max() < 0.02 * np.abs(wanted).max()
    everybody = people.features[people.train.index].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(own.mean(axis=0), everybody, atol=1e-5)


def test_the_shrunk_covariance_becomes_the_target_with_few_rows() -> None:
    people = world([7], 12)
    found = moments(people.features, people.train.of(0))
    covariance = found.power(1.0, np.eye(12))
    np.testing.assert_allclose(covariance, shrunk(people.client(0).features.astype(float)))
    target = moments(world([50], 12, seed=1).features, np.arange(50))
    for half, wanted in (
        (found.power(-0.5, np.eye(12)), np.eye(12)),
        (target.power(0.5, found.power(-0.5, np.eye(12))), target.power(1.0, np.eye(12))),
    ):
        np.testing.assert_allclose(half.T @ covariance @ half, wanted, atol=1e-12)


@pytest.mark.parametrize("kind", ["standardise", "whiten", "coral"])
def test_bits_depend_on_neither_threads_nor_other_clients(tmp_path, kind) -> None:
    people = world([40, 3, 1500, 9, 20], 8)
    one, _ = align(people, kind, threads=1, store=FeatureStore(tmp_path / "one"))
    more, _ = align(people, kind, threads=3, store=FeatureStore(tmp_path / "more"))
    assert one.features.tobytes() == more.features.tobytes()
    if kind == "coral":
        return  # its target is everybody's
    alone = dataclasses.replace(
        people,
        train=Rows(people.train.of(2), np.array([0, 1500])),
        test=Rows(people.test.of(2), np.array([0, 4])),
        names=("c2",),
        domains=("",),
    )
    own, _ = align(alone, kind, store=FeatureStore(tmp_path / "alone"))
    rows = np.concatenate([people.train.of(2), people.test.of(2)])
    assert own.features[rows].tobytes() == one.features[rows].tobytes()


def test_test_rows_have_no_say(store) -> None:
    people = world([30, 20], 6)
    changed = people.features.copy()
    changed[people.test.of(0)[0]] += 100
    other = dataclasses.replace(people, features=changed)
    for kind in ("standardise", "whiten", "coral"):
        before, after = (align(p, kind, store=store)[0].features for p in (people, other))
        differs = np.flatnonzero((before != after).any(axis=1))
        assert differs.tolist() == [people.test.of(0)[0]]


def test_one_matrix_that_other_processes_can_map(store) -> None:
    people = world([30, 20], 6)
    first, _ = align(people, "whiten", store=store)
    assert stored_file(first.features) is not None
    assert first.features.dtype == np.float32
    again, _ = align(people, "whiten", store=store)
    assert stored_file(again.features) == stored_file(first.features)
    assert len(store.entries()) == 1
    align(people, "standardise", store=store)
    moved = dataclasses.replace(people, train=people.test, test=people.train)
    align(moved, "whiten", store=store)
    assert len(store.entries()) == 3
    stored_file(first.features).write_bytes(b"nothing")
    mended, note = align(people, "whiten", store=store)
    assert "damaged" in note
    assert np.isfinite(mended.features).all()


@pytest.mark.parametrize("kind", ["standardise", "whiten", "coral"])
def test_clients_without_anything_that_varies(store, kind) -> None:
    people = world([1, 5, 20], 4)
    people.features[people.train.of(1)] = 0.1  # whose mean is rounded
    people.features[:, 3] = 7.0
    aligned, _ = align(people, kind, store=store)
    assert np.isfinite(aligned.features).all()
    for client in (0, 1):
        rows = people.train.of(client)
        expected = pooled_moments(people).mean if kind == "coral" else np.zeros(4)
        np.testing.assert_allclose(aligned.features[rows][0], expected, atol=1e-5)
        # its tests are as far from its mean as they were
        far = np.linalg.norm(people.features[people.test.of(client)] - people.features[rows[0]])
        assert np.linalg.norm(aligned.features[people.test.of(client)]) < 20 * far + 20


def test_features_that_leave_float32_are_refused(store) -> None:
    from fedtl.errors import InputError

    people = world([8, 8], 3)
    people.features[people.test.of(0)[0]] = 3e38
    people.features[people.train.of(0)] *= 1e-3
    with pytest.raises(InputError, match="leave what float32 can hold"):
        align(people, "whiten", store=store)

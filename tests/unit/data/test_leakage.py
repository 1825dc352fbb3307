"""The same content twice, against a slow and obvious count."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtl.data.clients import ClientSplit
from fedtl.data.examples import ArrayImages, Examples
from fedtl.data.leakage import LeakReport, check_leaks, content_hashes, find_leaks
from fedtl.errors import InputError
from fedtl.types import Rows


def split_of(client: Any, is_test: Any) -> ClientSplit:
    client, is_test = np.asarray(client), np.asarray(is_test, dtype=bool)
    num = client.max() + 1

    def rows(wanted: Any) -> Rows:
        parts = [np.flatnonzero((client == k) & wanted) for k in range(num)]
        return Rows(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))

    names = tuple(f"c{k}" for k in range(num))
    return ClientSplit(rows(~is_test), rows(is_test), names, ("",) * num)


def slow_leaks(content: str, client: Any, is_test: Any) -> tuple[int, int]:
    groups = {}
    for i, value in enumerate(content):
        groups.setdefault(bytes(value), []).append(i)
    splits = sum(len({bool(is_test[i]) for i in rows}) == 2 for rows in groups.values())
    between = sum(len({int(client[i]) for i in rows}) > 1 for rows in groups.values())
    return splits, between


def test_against_the_slow_count(make_examples: Callable[..., Examples]) -> None:
    generator = np.random.default_rng(0)
    for size in (3, 20, 80):
        for _ in range(20):
            pixels = generator.integers(0, 2, (size, 6)).astype(np.float32)
            client = np.append(generator.integers(0, 4, size - 1), 3)
            is_test = generator.random(size) < 0.3
            content = content_hashes(pixels)
            report = find_leaks(content, split_of(client, is_test), make_examples([0] * size))
            expected = slow_leaks(content, client, is_test)
            assert (report.train_test, report.between_clients) == expected
            assert bool(report.examples) == any(expected)
            assert len(report.examples) <= 5


def test_hashes() -> None:
    rows = np.array([[1, 2], [1, 2], [2, 1]], dtype=np.float32)
    hashes = content_hashes(rows)
    assert hashes.shape == (3, 16)
    assert hashes.dtype == np.uint8
    assert (hashes[0] == hashes[1]).all()
    assert (hashes[0] != hashes[2]).any()
    assert (content_hashes(np.asfortranarray(rows)) == hashes).all()
    images = np.zeros((2, 3, 3, 3), np.uint8)
    assert content_hashes(images).shape == (2, 16)


def test_hashes_that_differ_in_one_byte_only_are_different(
    make_examples: Callable[..., Examples],
) -> None:
    base = np.zeros((1, 16), np.uint8)
    for place in range(16):
        other = base.copy()
        other[0, place] = 1
        content = np.concatenate([base, other])
        report = find_leaks(content, split_of([0, 1], [False, True]), make_examples([0, 0]))
        assert report == LeakReport(0, 0)


def test_rows_of_excluded_clients_do_not_count(make_examples: Callable[..., Examples]) -> None:
    content = np.zeros((3, 16), np.uint8)
    content[1] = 1
    split = ClientSplit(
        Rows(np.array([0]), np.array([0, 1])), Rows(np.array([1]), np.array([0, 1])), ("c",), ("",)
    )
    assert find_leaks(content, split, make_examples([0, 0, 0])) == LeakReport(0, 0)


def test_the_report_names_places_clients_and_parts() -> None:
    images = ArrayImages(np.zeros((6, 2, 2), np.uint8))
    examples = Examples(np.zeros(6, np.int32), ("a",), "f", images)
    content = np.zeros((6, 16), np.uint8)
    content[:, 0] = [0, 1, 0, 0, 0, 2]
    report = find_leaks(content, split_of([0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 0, 1]), examples)
    assert (report.train_test, report.between_clients) == (1, 1)
    assert report.examples == (
        "row 0 (c0, train) = row 2 (c1, train) = row 3 (c1, test) and 1 more",
    )


def test_policy() -> None:
    clean, leaky = LeakReport(0, 0), LeakReport(2, 1, ("here = there",))
    for report, policy in itertools.product((clean, leaky), ("allow", "stop")):
        if report is leaky and policy == "stop":
            with pytest.raises(InputError) as caught:
                check_leaks(report, policy)
            line = caught.value.line()
            assert caught.value.exit_code == 2
            assert "2 in both train and test, 1 at more than one client" in line
            assert "here = there" in line
            assert "--set data.leakage=allow" in line
        else:
            check_leaks(report, policy)
    with pytest.raises(InputError):
        check_leaks(LeakReport(0, 1), "stop")
    with pytest.raises(InputError):
        check_leaks(LeakReport(1, 0), "stop")


def test_copies_are_found_between_hashes_with_the_same_first_half(
    make_examples: Callable[..., Examples],
) -> None:
    content = np.zeros((3, 16), np.uint8)
    content[1, 15] = 1
    report = find_leaks(content, split_of([0, 0, 1], [0, 0, 0]), make_examples([0] * 3))
    assert report.between_clients == 1

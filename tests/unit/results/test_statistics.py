"""Kept statistics come back bit for bit, one client at a time."""

from __future__ import annotations

import numpy as np
import pytest

from fedtl.errors import InputError
from fedtl.results.statistics import keep_statistics, kept_names, read_statistics
from fedtl.types import ClientUpdates


def some(clients: list[int], value: float) -> ClientUpdates:
    size = len(clients)
    tensors = {
        "gram": np.full((size, 3), value) + np.arange(size)[:, None],
        "counts": np.full((size, 2), 4, np.int64),
    }
    return ClientUpdates(1, np.array(clients), tensors, np.full(size, 8), np.full(size, np.nan))


def test_what_is_kept_comes_back(tmp_path) -> None:
    names = [f"n{i}" for i in range(12)]
    keep_statistics(tmp_path, some([0, 10], 0.1), names)
    keep_statistics(tmp_path, some([2], 7.0), names)
    assert kept_names(tmp_path) == {0: "n0", 2: "n2", 10: "n10"}
    assert list(kept_names(tmp_path)) == [0, 2, 10]
    own = read_statistics(tmp_path, 10)
    assert own["gram"].tolist() == [1.1, 1.1, 1.1]
    assert own["counts"].dtype == np.int64


def test_a_repeated_round_replaces(tmp_path) -> None:
    for value in (1.0, 2.0):
        keep_statistics(tmp_path, some([3], value), "abcd")
    assert read_statistics(tmp_path, 3)["gram"].tolist() == [2.0] * 3
    assert len(list((tmp_path / "statistics").iterdir())) == 1


def test_what_is_missing_or_broken_is_an_input_error(tmp_path) -> None:
    assert kept_names(tmp_path) == {}
    with pytest.raises(InputError, match="keep_statistics"):
        read_statistics(tmp_path, 1)
    keep_statistics(tmp_path, some([1], 1.0), "ab")
    (tmp_path / "statistics" / "1.safetensors").write_bytes(b"\0" * 9)
    with pytest.raises(InputError, match="cannot be read"):
        read_statistics(tmp_path, 1)

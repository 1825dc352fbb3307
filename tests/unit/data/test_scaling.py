"""From a table to rows: by each client's own training rows, by everybody's sums, or as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from fedtl.data.clients import ClientSplit
from fedtl.data.examples import Table
from fedtl.data.scaling import alone, own_moments, summed_moments, table_rows
from fedtl.errors import InputError
from fedtl.scenario.schema import Data
from fedtl.types import Rows


def data(scaling: str = "client") -> Data:
    return Data.model_validate({"source": "table", "path": "a.csv", "scaling": scaling})


def rows_of(*parts: list[int]) -> Rows:
    index = np.concatenate([np.array(part, np.int64) for part in parts])
    return Rows(index, np.cumsum([0, *map(len, parts)]).astype(np.int64))


def make(num: int = 60, seed: int = 0, gaps: float = 0.2) -> tuple[Table, ClientSplit]:
    """Two clients in alternating rows; every fourth row is for testing, the last is nobody's."""
    rng = np.random.default_rng(seed)
    numeric = rng.normal(size=(num, 3)) * [1, 1e4, 1e-3] + [0, 1e6, 5]
    numeric[rng.random(numeric.shape) < gaps] = np.nan
    codes = rng.integers(-1, 3, (num, 1)).astype(np.int32)
    table = Table(numeric, ("a", "b", "c"), codes, ("k",), (("x", "y", "z"),))
    who = [[i for i in range(num - 1) if i % 2 == k] for k in range(2)]
    train = rows_of(*([i for i in mine if i % 4 > 1] for mine in who))
    test = rows_of(*([i for i in mine if i % 4 < 2] for mine in who))
    return table, ClientSplit(train, test, ("p", "q"), ("", ""))


def test_each_client_is_scikit_learns_scaler_and_encoder() -> None:
    table, split = make()
    found = table_rows(table, data(), split)
    names = ("a is missing", "b is missing", "c is missing")
    assert found.columns == ("a", "b", "c", *names, "k=x", "k=y", "k=z")
    assert found.matrix.dtype == np.float32
    for k in range(2):
        rows = np.concatenate([split.train.of(k), split.test.of(k)])
        scaler = StandardScaler().fit(table.numeric[split.train.of(k)])
        scaled = np.nan_to_num(scaler.transform(table.numeric[rows]))
        missing = np.isnan(table.numeric[rows])
        encoder = OneHotEncoder(categories=[[0, 1, 2]], handle_unknown="ignore")
        named = encoder.fit_transform(table.codes[rows]).toarray()
        wanted = np.concatenate([scaled, missing, named], axis=1)
        np.testing.assert_allclose(found.matrix[rows], wanted, atol=2e-6)
    assert not found.matrix[-1, :6].any()  # nobody holds it
    assert found.shared == ""


def test_everybodys_sums_are_a_scaler_over_everybody() -> None:
    table, split = make()
    found = table_rows(table, data("federated"), split)
    scaler = StandardScaler().fit(table.numeric[split.train.index])
    rows = np.concatenate([split.train.index, split.test.index])
    wanted = np.nan_to_num(scaler.transform(table.numeric[rows]))
    np.testing.assert_allclose(found.matrix[rows, :3], wanted, atol=2e-6)
    assert "each of 2 clients shares 9 numbers" in found.shared


@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(0, 0.9))
def test_sums_over_clients_are_sums_over_all(seed: int, num: int, gaps: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(30, 4)) * 10.0 ** rng.integers(-6, 6, 4) + 10.0 ** rng.integers(0, 8)
    values[rng.random(values.shape) < gaps] = np.nan
    parts = [values[np.arange(30) % num == k] for k in range(num)]
    together, whole = summed_moments(parts), own_moments(values)
    assert (together.count == whole.count).all()
    np.testing.assert_allclose(together.mean, whole.mean, rtol=1e-12)
    rounding = 1e-13 * np.abs(whole.mean)
    assert (np.abs(together.deviation - whole.deviation) <= 1e-9 * whole.deviation + rounding).all()


def test_a_deviation_beside_a_large_mean_is_kept() -> None:
    values = 1e9 + np.array([[0.0], [1.0], [2.0], [3.0]])
    found = summed_moments([values[:2], values[2:]])
    np.testing.assert_allclose(found.deviation, np.std(values, axis=0), rtol=1e-9)


@pytest.mark.parametrize("scaling", ["client", "federated"])
def test_test_rows_change_no_training_row(scaling: str) -> None:
    table, split = make()
    before = table_rows(table, data(scaling), split).matrix
    changed = table.numeric.copy()
    changed[split.test.index] = 1e6 * np.random.default_rng(1).random((len(split.test.index), 3))
    other = Table(changed, table.numeric_names, table.codes, ("k",), table.categories)
    after = table_rows(other, data(scaling), split).matrix
    assert (after[split.train.index] == before[split.train.index]).all()
    assert (after[split.test.index] != before[split.test.index]).any()


def test_one_clients_rows_change_no_other_client() -> None:
    table, split = make()
    before = table_rows(table, data(), split).matrix
    changed = table.numeric.copy()
    changed[split.train.of(0)] *= 7
    other = Table(changed, table.numeric_names, table.codes, ("k",), table.categories)
    after = table_rows(other, data(), split).matrix
    rows = np.concatenate([split.train.of(1), split.test.of(1)])
    assert (after[rows] == before[rows]).all()
    own = split.test.of(0)
    assert (after[own] != before[own]).any()


def test_what_has_no_value_or_no_spread_at_a_client() -> None:
    table, split = make(gaps=0.0)
    numeric = table.numeric.copy()
    numeric[split.train.of(0), 0] = 0.1  # no power of two: a mean of it is not exact
    numeric[np.concatenate([split.train.of(1), split.test.of(1)]), 1] = np.nan
    other = Table(numeric, table.numeric_names, table.codes, ("k",), table.categories)
    found = table_rows(other, data(), split)
    assert not found.matrix[split.train.of(0), 0].any()
    assert not found.matrix[split.test.of(0), 0].any()
    assert not found.matrix[split.test.of(1), 1].any()
    assert (found.matrix[split.test.of(1), 4] == 1).all()
    assert found.notes == (
        "column 'a' is constant in the training rows of p: 0 there",
        "column 'b' has no value in the training rows of q: 0 there",
    )
    assert np.isfinite(found.matrix).all()
    everybody = table_rows(other, data("federated"), split)
    assert everybody.notes == ()
    assert everybody.matrix[split.train.of(0), 0].any()


def test_many_such_columns_are_counted() -> None:
    numeric = np.ones((4, 9))
    table = Table(numeric, tuple("abcdefghi"), np.empty((4, 0), np.int32))
    split = ClientSplit(rows_of([0, 1]), rows_of([2, 3]), ("p",), ("",))
    notes = table_rows(table, data(), split).notes
    assert len(notes) == 6
    assert notes[-1] == "... and so are 4 columns more"


def test_as_they_are() -> None:
    table, split = make(gaps=0.0)
    found = table_rows(table, data("none"), split)
    assert found.columns == ("a", "b", "c", "k=x", "k=y", "k=z")
    assert (found.matrix[:, :3] == table.numeric.astype(np.float32)).all()
    table, split = make(gaps=0.2)
    with pytest.raises(InputError, match=r"data.scaling: numbers are missing in 3 columns: 'a'"):
        table_rows(table, data("none"), split)


@pytest.mark.parametrize("scaling", ["client", "none"])
def test_a_public_table_is_one_client_more(scaling: str) -> None:
    table, _ = make(gaps=0.0)
    everything = rows_of(list(range(len(table))))
    split = ClientSplit(everything, rows_of([]), ("all",), ("",))
    wanted: Any = table_rows(table, data(scaling), split).matrix
    assert alone(table, data(scaling)).tobytes() == wanted.tobytes()

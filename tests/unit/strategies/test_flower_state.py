"""What an instance remembers comes back the same, or is refused by name."""

from __future__ import annotations

import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord

from fedtl.errors import InputError
from fedtl.strategies.flower_state import pack_attributes, unpack_attributes


def there_and_back(value: Any) -> Any:
    packed = pack_attributes("Mine", {"it": value}, {})
    assert packed.dtype == np.uint8
    assert packed.ndim == 1
    return unpack_attributes("Mine", packed, {})["it"]


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(2**70), 0.1, -0.0, math.inf, "ü\n", b"\x00\xff", b"",
        [], (), {}, set(), frozenset({1}), {3, 1}, [1, [2.5, ("a", None)]],
        {"a": {1: [2]}, (1, "x"): {"y"}},
    ],
)  # fmt: skip
def test_plain_values(value: Any) -> None:
    back = there_and_back(value)
    assert back == value
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_not_a_number() -> None:
    assert math.isnan(there_and_back(math.nan))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3).T, np.zeros((0, 4)), np.array(3.5), np.array([True, False]),
        np.arange(3, dtype=">i4"), np.float16([1, np.nan]), np.arange(8, dtype=np.uint8)[::2],
    ],
)  # fmt: skip
def test_arrays_come_back_as_copies_that_can_be_written(array: np.ndarray) -> None:
    back = there_and_back(array)
    np.testing.assert_array_equal(back, array)
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")
    back += back.dtype.type(1) if back.dtype != bool else False
    assert not np.shares_memory(back, array)


def test_numbers_of_numpy_keep_their_type() -> None:
    back = there_and_back([np.float64(0.1), np.int32(-3), np.bool_(True)])
    assert [type(number) for number in back] == [np.float64, np.int32, np.bool_]
    assert back == [0.1, -3, True]


def test_flowers_records() -> None:
    arrays = ArrayRecord({"b": Array(np.ones((2, 2), np.float32)), "a": Array(np.zeros(0))})
    back = there_and_back({"best": arrays, "last": arrays["b"]})
    assert list(back["best"]) == ["b", "a"]
    assert back["best"] == arrays
    assert back["last"] == arrays["b"]
    for record in (MetricRecord({"x": [1, 2], "y": 0.5}), ConfigRecord({"x": b"1", "y": [True]})):
        assert there_and_back(record) == record


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937, np.random.Philox])
def test_generators_go_on_where_they_were(bits: type) -> None:
    numpy, python = np.random.Generator(bits(5)), random.Random(6)
    numpy.normal(size=3), python.gauss(0, 1)
    other, one = there_and_back([numpy, python])
    assert other.normal(size=5).tolist() == numpy.normal(size=5).tolist()
    assert [one.gauss(0, 1) for _ in range(3)] == [python.gauss(0, 1) for _ in range(3)]


def test_what_the_constructor_fixed_is_taken_from_it() -> None:
    made = {"rule": max, "path": Path("a"), "half": partial(pow, 2), "kind": dict}
    packed = pack_attributes("Mine", made, made)
    assert unpack_attributes("Mine", packed, made) == made
    with pytest.raises(InputError, match=r"Mine\.rule: .*got builtin"):
        pack_attributes("Mine", {"rule": min}, made)


class Named(dict):
    pass


def test_what_cannot_be_kept_is_named() -> None:
    loop: list[Any] = []
    loop.append(loop)
    cases = {
        "it['a'][1]": {"a": [0, object()]},
        "it: ": Named(),
        "it[0]": [np.array([None])],
        "a key of it": {object(): 1},
        "it[0][0]": loop,
    }
    for where, value in cases.items():
        with pytest.raises(InputError) as caught:
            pack_attributes("Mine", {"it": value}, {})
        assert f"Mine.{where}" in caught.value.line()

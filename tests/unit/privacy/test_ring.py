from __future__ import annotations

import numpy as np
import pytest

from fedtl.errors import InputError
from fedtl.privacy.ring import Beyond, quantise, ring_dtype, scale_for, to_signed, to_values


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("clients", [1, 2, 3, 7, 1000, 2_000_000])
@pytest.mark.parametrize("value_range", [1e-200, 0.3, 1.0, 8.0, 1e6, 1e300])
def test_no_sum_of_limits_can_wrap(bits: int, clients: int, value_range: float) -> None:
    scale, limit = scale_for(value_range, clients, bits)
    assert clients * limit < 2 ** (bits - 1) <= (clients + 1) * (limit + 1)
    assert limit / 4 < scale * value_range <= limit  # no finer power of two fits
    assert np.frexp(scale)[0] == 0.5


@pytest.mark.parametrize("bits", [32, 64])
def test_too_many_clients_are_refused(bits: int) -> None:
    most = (2 ** (bits - 1) - 1) // 2**10
    assert scale_for(1.0, most, bits)[1] == 2**10
    with pytest.raises(InputError, match="does not fit"):
        scale_for(1.0, most * 2, bits)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("clients", [1, 3, 1000])
def test_the_largest_sums_come_out_whole(bits: int, clients: int) -> None:
    _, limit = scale_for(1.0, clients, bits)
    most = np.float64(limit)
    if int(most) > limit:  # 2^63 - 1 is no float64
        most = np.nextafter(most, 0)
    ends = quantise([most, -most, 0.0, -0.5, 0.5, 1.5], 1.0, limit, bits)
    assert ends.dtype == ring_dtype(bits)
    total = (ends[None].repeat(clients, 0)).sum(axis=0, dtype=ends.dtype)
    expected = [clients * v for v in (int(most), -int(most), 0, 0, 0, 2)]
    assert to_signed(total, bits).tolist() == expected


@pytest.mark.parametrize("bits", [32, 64])
def test_what_is_beyond_the_limit_is_refused_and_not_told(bits: int) -> None:
    scale, limit = scale_for(8.0, 10, bits)
    allowed = limit / scale
    secret = allowed * 1.0625
    for value in (secret, -secret, 1e300, 1.7e308):
        with pytest.raises(Beyond) as caught:
            quantise([0.0, value], scale, limit, bits)
        assert f"{secret:g}" not in caught.value.line()
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(Beyond, match="not finite"):
            quantise([0.0, value], scale, limit, bits)


def test_one_above_a_limit_that_no_float_can_hold() -> None:
    limit = 2**60 + 1
    assert to_signed(quantise([2.0**60], 1.0, limit, 64), 64).tolist() == [2**60]
    with pytest.raises(Beyond):
        quantise([2.0**60 + 256], 1.0, limit, 64)
    assert to_signed(quantise([-(2.0**63) + 1024], 1.0, 2**63 - 1, 64), 64) == [1024 - 2**63]
    with pytest.raises(Beyond):
        quantise([2.0**63], 1.0, 2**63 - 1, 64)


def test_class_counts_come_out_exactly() -> None:
    random = np.random.default_rng(1)
    counts = random.integers(0, 10**9, (50, 100)).astype(np.float64)
    scale, limit = scale_for(1e9 + 0.5, 50, 64)
    total = quantise(counts, scale, limit, 64).sum(axis=0, dtype=np.uint64)
    assert to_values(total, scale, 64).tolist() == counts.sum(axis=0).tolist()


def test_no_entries_and_no_axes() -> None:
    assert quantise(np.empty((0, 3)), 1.0, 5, 32).shape == (0, 3)
    assert to_signed(quantise(3.2, 1.0, 5, 32), 32) == 3


@pytest.mark.parametrize("bits", [32, 64])
def test_a_range_next_to_nothing(bits: int) -> None:
    scale, limit = scale_for(5e-324, 3, bits)
    assert scale * 5e-324 <= limit
    assert quantise([5e-324], scale, limit, bits).tolist() == [0]
    with pytest.raises(Beyond, match="too large"):
        quantise([1e300], scale, limit, bits)

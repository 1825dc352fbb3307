"""Noise is normal, repeatable where it must be, and never where it must not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedtl.privacy.noise import AT_A_TIME, SEEDED, SYSTEM, Noise, from_system, seeded

SIZE = 100_001

FALSE_ALARM = 1e-9
"""Of each statistical test here, as the system's noise is new in every run."""


@pytest.mark.parametrize("stream", [seeded(7), from_system()], ids=["seeded", "system"])
def test_deviates_are_standard_normal_and_independent(stream: Noise) -> None:
    drawn = stream.normal(SIZE)
    assert drawn.dtype == np.float64
    squares = float(drawn @ drawn)
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], SIZE)
    assert low < squares < high
    assert abs(drawn.mean()) * SIZE**0.5 < stats.norm.isf(FALSE_ALARM / 2)
    assert stats.kstest(drawn, "norm").pvalue > FALSE_ALARM
    assert stats.pearsonr(drawn[1:], drawn[:-1]).pvalue > FALSE_ALARM
    half = SIZE // 2  # where Box and Muller's pairs would stand
    assert stats.pearsonr(drawn[:half], drawn[half : 2 * half]).pvalue > FALSE_ALARM


def test_a_key_gives_the_same_numbers_and_another_key_others() -> None:
    assert np.array_equal(seeded(3).normal(50), seeded(3).normal(50))
    assert not np.array_equal(seeded(3).normal(50), seeded(4).normal(50))
    assert seeded(3).id == seeded(3).id != seeded(4).id
    assert seeded(2**64 - 1).normal(1).shape == (1,)
    assert (seeded(3).source, from_system().source) == (SEEDED, SYSTEM)


def test_a_stream_goes_on() -> None:
    whole, parts = seeded(3).normal(30), seeded(3)
    assert np.array_equal(np.concatenate([parts.normal(10), parts.normal(20)]), whole)


def test_the_systems_noise_never_comes_again() -> None:
    one, other = from_system(), from_system()
    drawn = np.concatenate([one.normal(20), one.normal(20), other.normal(20)])
    assert len(np.unique(drawn)) == 60
    assert one.id != other.id
    assert "key" not in repr(one)


@pytest.mark.parametrize("size", [0, 1, 3, AT_A_TIME - 1, AT_A_TIME + 1])
def test_any_number_of_deviates(size: int) -> None:
    drawn = from_system().normal(size)
    assert drawn.shape == (size,)
    assert np.isfinite(drawn).all()
    assert len(np.unique(drawn)) == size

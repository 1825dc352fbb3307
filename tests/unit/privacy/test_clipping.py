"""No update is longer than the bound, and none is changed that need not be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedtl.errors import InputError
from fedtl.privacy.clipping import clip_updates

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


def lengths(clipped: dict[str, np.ndarray]) -> np.ndarray:
    """By the slow and obvious way, in extended precision."""
    count = len(next(iter(clipped.values())))
    flat = [np.concatenate([t[i].ravel() for t in clipped.values()]) for i in range(count)]
    return np.array([np.sqrt((own.astype(np.longdouble) ** 2).sum()) for own in flat])


@given(
    arrays(np.float32, (4, 2, 3), elements=FINITE),
    arrays(np.float32, (4,), elements=FINITE),
    st.floats(1e-6, 1e6),
)
def test_none_is_longer_than_the_bound_and_directions_stay(
    weight: np.ndarray, scalar: np.ndarray, bound: float
) -> None:
    given = {"weight": weight, "scalar": scalar}  # over all tensors, one of them without axes
    clipped, norms = clip_updates(given, bound)
    before = lengths(given)
    assert (lengths(clipped) <= bound * (1 + 1e-14)).all()
    np.testing.assert_allclose(norms, before.astype(float), rtol=1e-12)
    for name, tensor in clipped.items():
        assert tensor.dtype == np.float64
        factor = np.minimum(1, bound / np.maximum(before, 1e-300)).astype(float)
        wide = tensor.reshape(4, -1)
        wanted = given[name].reshape(4, -1).astype(float) * factor[:, None]
        np.testing.assert_allclose(wide, wanted, rtol=1e-12, atol=1e-300)
        short = before <= bound * (1 - 1e-12)
        assert np.array_equal(tensor[short], given[name][short].astype(float))


def test_of_several_only_the_long_ones_are_shortened_and_what_was_given_stays() -> None:
    given = {"w": np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])}
    kept = given["w"].copy()
    clipped, norms = clip_updates(given, 1.0)
    np.testing.assert_allclose(clipped["w"], [[0.6, 0.8], [0.3, 0.4], [0, 0]], rtol=1e-14)
    np.testing.assert_allclose(norms, [5, 0.5, 0])
    assert np.array_equal(given["w"], kept)


def test_nobodys_updates_and_no_bound() -> None:
    clipped, norms = clip_updates({"w": np.empty((0, 2))}, 1.0)
    assert clipped["w"].shape == (0, 2)
    assert norms.shape == (0,)
    clipped, norms = clip_updates({"w": np.full((1, 2), 1e9)}, np.inf)
    assert np.array_equal(clipped["w"], np.full((1, 2), 1e9))


def test_what_is_not_finite_stays_so_and_touches_nobody_else() -> None:
    given = np.array([[np.nan, 1.0], [np.inf, 1.0], [3.0, 4.0]])
    clipped, norms = clip_updates({"w": given}, 1.0)
    assert np.isnan(norms[0])
    assert np.isinf(norms[1])
    assert not np.isfinite(clipped["w"][:2]).all(axis=1).any()
    np.testing.assert_allclose(clipped["w"][2], [0.6, 0.8], rtol=1e-14)


def test_whole_numbers_and_no_bound_are_refused() -> None:
    with pytest.raises(InputError, match="whole numbers"):
        clip_updates({"w": np.ones((2, 3), np.int64)}, 1.0)
    for bound in (0.0, -1.0, np.nan):
        with pytest.raises(InputError, match="above 0"):
            clip_updates({"w": np.ones((2, 3))}, bound)

"""Updates shortened to a bound, so that nobody's counts for more: what sensitivity rests on."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.errors import InputError
from fedtl.types import Float64


def clip_updates(
    deltas: Mapping[str, npt.NDArray[Any]], bound: float
) -> tuple[dict[str, Float64], Float64]:
    """Delta_k <- Delta_k min(1, S / |Delta_k|), |.| over all of a client's tensors together.

    Source: McMahan et al. 2018 (arXiv 1710.06963), section 3, flat clipping.

    Args:
        deltas: name -> floating [k, ...], an update per client; a tensor without further axes is
            [k].
        bound: S > 0; infinity only measures.

    Returns:
        The updates, float64, none longer than S (tensors that are so already are given back as they
        are), and their lengths before, float64 [k]. An update that is not finite has no length that
        is, and stays as it is.

    Raises:
        InputError: a tensor of whole numbers, which cannot be shortened, or a bound not above 0.
    """
    if not bound > 0:
        raise InputError("a bound of updates must be above 0", where="privacy.clip", got=bound)
    squares: Float64 | None = None
    wide: dict[str, Float64] = {}
    for name, delta in deltas.items():
        if delta.dtype.kind != "f":
            raise InputError(
                f"{name} holds whole numbers, and only real ones can be shortened",
                got=delta.dtype,
                allowed="floating",
            )
        wide[name] = np.asarray(delta, np.float64)
        flat = wide[name].reshape(len(delta), prod(delta.shape[1:]))
        with np.errstate(over="ignore", invalid="ignore"):
            own = np.einsum("kp,kp->k", flat, flat)
        squares = own if squares is None else squares + own
    norms = np.sqrt(squares if squares is not None else np.empty(0))
    return {name: _shortened(delta, norms, bound) for name, delta in wide.items()}, norms


def _shortened(delta: Float64, norms: Float64, bound: float) -> Float64:
    longer = norms > bound
    if not longer.any():
        return delta
    factors = np.ones(len(delta))
    with np.errstate(invalid="ignore"):  # infinity stays
        # a hair less, so that rounding leaves none above the bound
        factors[longer] = bound / norms[longer] * (1 - 2.0**-50)
        factors[np.isinf(norms)] = 1.0
    return np.asarray(delta * factors.reshape(-1, *[1] * (delta.ndim - 1)))

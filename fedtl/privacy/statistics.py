"""What protects statistics: rows and answers of bounded length, and noise in proportion.

The statistics of rows z with labels y are A = sum z z^T, B = sum y z^T and, where z has no entry
for a bias, the class counts. Lengths are Euclidean in the encoding (diag A, sqrt(2) upper A, B,
counts), in which one row adds (|z|^4 + |z|^2 + 1)^(1/2): sqrt(2) for |z| = 1 where the counts are
left out, sqrt(3) with them. A symmetric matrix holds each entry off its diagonal twice, which is
what the sqrt(2) is for; noise N(0, sigma^2) in the encoding is N(0, sigma^2 / 2) in such an entry.

Rows. A row (x, 1) becomes z = (sqrt(1 - BIAS^2) x / clip, BIAS), and is shortened to length 1 as a
whole. A score w^T x + b of a shortened row is the same score of the row itself, times a positive
number: what is fitted on the first predicts for the second. Without the bias x / clip is shortened.

Answers. Where whole clients are protected the encoded answer is shortened as well.

Counts. With a bias they are the bias entries of B over BIAS (a shortened row counts for less than
one) and cost nothing; else they are noised beside A and B.

Sensitivities. One row more or less: the sum above at its largest, |z| = 1.
Replace one row, c = z^T z' in [-1, 1] between rows of length 1:

    same class     A: 2 - 2 c^2   B: 2 - 2 c   counts: 0      4.5 at c = -1/2; without A 4 at c = -1
    other class    A: 2 - 2 c^2   B: 2         counts: 2      6 at c = 0, without counts 4
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.plans import Protection, Statistics
from fedtl.privacy.noise import Noise
from fedtl.types import Float64

BIAS = 0.1**0.5
"""Entry for the bias in a row of length 1: a tenth of its square. More of it would leave the
features less, and so more noise to them; less would leave the bias and the counts to the noise."""

Tensors = Mapping[str, npt.NDArray[Any]]


def row_scales(asked: Statistics, width: int, row_clip: float) -> Float64:
    """What each entry of a row is multiplied by before it is shortened, float64 [W]."""
    features = 1.0 - BIAS**2 if asked.bias else 1.0
    scales = np.full(width, features**0.5 / row_clip)
    if asked.bias:
        scales[-1] = BIAS
    return scales


def protect_rows(rows: Float64, asked: Statistics, row_clip: float) -> None:
    """Bring rows z [m, W] to length 1 or less, in place.

    A row that is not finite becomes 0: if its client were refused for it, as elsewhere, one row
    would decide over all the others.
    """
    with np.errstate(invalid="ignore"):
        rows *= row_scales(asked, rows.shape[1], row_clip)
        lengths = np.sqrt(np.einsum("mw,mw->m", rows, rows))
        rows /= np.maximum(lengths, 1.0)[:, None]
    rows[~np.isfinite(lengths)] = 0.0


def protect_answer(
    own: Tensors, asked: Statistics, protection: Protection, noise: Noise | None = None
) -> dict[str, npt.NDArray[Any]]:
    """One client's statistics, shortened to ``clip`` and noised, as the protection has it.

    Args:
        own: "gram" packed [W (W + 1) / 2] where it is asked for, "sums" [C, W], "counts" [C].
        noise: of the client; None where it adds none.

    Returns:
        All tensors in float64. Beside noise counts that the sums hold already are 0.
    """
    safe = {name: np.asarray(tensor, np.float64) for name, tensor in own.items()}
    if protection.clip:
        length = encoded_length(safe, asked)
        share = protection.clip / max(protection.clip, length)
        safe = {name: share * tensor for name, tensor in safe.items()}
    if protection.noise:
        assert noise is not None, "noise comes with the plan, or from the system"
        if asked.bias:
            safe["counts"] = np.zeros_like(safe["counts"])
        safe |= noised(safe, asked, protection.noise, noise)
    return safe


def released(asked: Statistics) -> tuple[str, ...]:
    """Names of the tensors that are protected together, in the order in which they are noised."""
    assert not asked.class_grams, "a Gram matrix for each class is no part of any release"
    counts = () if asked.bias else ("counts",)
    return (*(("gram",) if asked.gram else ()), "sums", *counts)


def sensitivity(asked: Statistics, *, replaced: bool = False) -> float:
    """How far one row more or less moves the encoded sums, or another row in its place."""
    counted = not asked.bias
    if not replaced:
        return math.sqrt(asked.gram + 1 + counted)
    same = 4.5 if asked.gram else 4.0
    other = 2.0 * asked.gram + 2 + 2 * counted
    return math.sqrt(max(same, other))


def encoded_length(tensors: Tensors, asked: Statistics) -> float:
    """Euclidean length of an answer in the encoding."""
    squares = 0.0
    for name in released(asked):
        flat = np.asarray(tensors[name], np.float64).ravel()
        squares += float(flat @ flat)
        if name == "gram":  # once more what the matrix holds twice
            squares += float(flat @ flat) - float(np.square(flat[on_diagonal(len(flat))]).sum())
    return math.sqrt(squares)


def noised(tensors: Tensors, asked: Statistics, deviation: float, noise: Noise) -> dict[str, Any]:
    """The released tensors in float64, with N(0, deviation^2) added in the encoding."""
    out: dict[str, Any] = {}
    for name in released(asked):
        drawn = noise.normal(tensors[name].size)
        drawn *= deviation
        if name == "gram":
            diagonal = drawn[on_diagonal(len(drawn))]
            drawn *= 0.5**0.5
            drawn[on_diagonal(len(drawn))] = diagonal
        out[name] = tensors[name] + drawn.reshape(tensors[name].shape)
    return out


def on_diagonal(packed: int) -> npt.NDArray[np.int64]:
    """Places of the diagonal in a packed upper triangle of so many entries, int64 [W]."""
    width = int(np.sqrt(2 * packed))
    return np.cumsum([0, *range(width, 1, -1)])

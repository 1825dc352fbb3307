"""What a head's gradient, a first update or class sums say outright about the rows behind them.

A linear head's gradient of the mean cross-entropy over B rows is dL/dW_c = mean (p_c - y_c) x and
dL/db_c = mean (p_c - y_c). From it follow, without any search:

- label counts n_c = B (mean p_c - dL/db_c): exact where the scores are the same for every row, as
  at a head of zeros (p = 1 / C) (Zhao et al. 2020, arXiv 2001.02610, for one row; counts by sum);
- the features of a single row: x = (dL/dW_j) / (dL/db_j), exact (Geiping et al. 2020, 2003.14053,
  proposition 3.1, for the last layer);
- the features of the one row of a class, which are that class's sum (prototype).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedtl.types import Float64

Real = npt.NDArray[np.floating]


def label_counts(bias_gradient: Real, examples: int, probabilities: Real | None = None) -> Float64:
    """n_c of a batch from the gradient of its mean loss, float64 [C], not rounded.

    Args:
        bias_gradient: dL/db, [C].
        examples: B, of the batch.
        probabilities: mean p_c over the batch, [C]; None for a head of zeros, where it is 1 / C.
    """
    gradient = np.asarray(bias_gradient, np.float64)
    mean = np.full(len(gradient), 1 / len(gradient)) if probabilities is None else probabilities
    return np.asarray(examples * (mean - gradient))


def counts_of_update(bias_update: Real, examples: int, pace: float) -> Float64:
    """n_c from what training moved the bias by, float64 [C], at least 0 and ``examples`` together.

    One step moves b_c by pace (n_c / n - 1 / C): exact. Over more steps the probabilities follow
    the labels, the bias moves less, and the counts come out too even: a stronger attack may tell
    more.

    Args:
        bias_update: b after training - b before, [C], from a head of zeros.
        examples: of the client.
        pace: learning rate times steps: what the mean gradient would have been multiplied by.
    """
    found = np.clip(label_counts(-np.asarray(bias_update, np.float64) / pace, examples), 0, None)
    total = found.sum()
    return np.asarray(found * (examples / total) if total > 0 else found)


def inverted(weight_gradient: Real, bias_gradient: Real) -> Float64:
    """The features of the single row behind a gradient, or behind a client's whole update.

    Every step on one row moves W_j by x times what it moves b_j by. The class with the largest
    dL/db_j is taken. NaN where all are 0: the row left no trace.

    Args:
        weight_gradient: dL/dW, [C, D].
        bias_gradient: dL/db, [C].
    """
    bias = np.asarray(bias_gradient, np.float64)
    surest = int(np.argmax(np.abs(bias)))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.asarray(weight_gradient, np.float64)[surest] / bias[surest]
    return np.where(bias[surest] == 0, np.nan, found)


def lone_classes(counts: Real) -> npt.NDArray[np.intp]:
    """Classes of which a client has a single example: their sum is that example, int [l]."""
    return np.flatnonzero(np.rint(np.asarray(counts)) == 1)


def cosine(one: Real, other: Real) -> Float64:
    """Cosine similarity of rows [..., D]; 0 where one of them has no length."""
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    product = (one * other).sum(axis=-1)
    found = np.divide(product, lengths, out=np.zeros_like(product), where=lengths > 0)
    return np.asarray(np.nan_to_num(found, nan=0.0))


def share_error(found: Real, true: Real) -> float:
    """Share of a client's examples whose class is told wrong by label counts, in [0, 1].

    Half the sum of |difference| over the number of examples (total variation).
    """
    return float(np.abs(np.asarray(found) - true).sum() / 2 / max(1.0, float(np.sum(true))))

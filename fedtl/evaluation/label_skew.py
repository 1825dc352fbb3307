"""Whether clients' labels are alike enough to align their features."""

from __future__ import annotations

import numpy as np

from fedtl.errors import InputError
from fedtl.evaluation.labels import js, to_all
from fedtl.scenario.schema import Adaptation
from fedtl.types import Int32, Int64, Rows

MOST_LABEL_SKEW = 0.05
"""Beyond it aligned features hurt. Measured with ``standardise``, the mildest, and FedAvg at 20
clients, everybody's accuracy against none: PACS -0.3 points at 0.03, -2.1 at 0.08, -5 at 0.15, -18
at 0.41; digits +0.5 at 0.04, -2.7 at 0.12, -21 at 0.49."""


def label_skew(counts: Int64) -> float:
    """Jensen-Shannon divergence from a client to everybody in bits, mean over examples.

    Args:
        counts: training examples of each client and class, [K, C]; one of them at least.
    """
    held = counts.sum(axis=1)
    return float(np.average(to_all(js, counts)[held > 0], weights=held[held > 0]))


def check_label_skew(section: Adaptation, labels: Int32, num_classes: int, train: Rows) -> None:
    """Refuse to align features of clients whose labels differ by more than ``MOST_LABEL_SKEW``.

    Raises:
        InputError: they do, and the scenario does not allow it.
    """
    if section.features == "none" or section.allow_label_skew:
        return
    counts = np.zeros((len(train.counts), num_classes), np.int64)
    np.add.at(counts, (np.repeat(np.arange(len(counts)), train.counts), labels[train.index]), 1)
    skew = label_skew(counts)
    if skew > MOST_LABEL_SKEW:
        raise InputError(
            "the clients' labels differ too much to align their features: with a client's own mean "
            "goes what tells its classes from the others'",
            where="adaptation.features",
            got=f"'{section.features}' at a label distance of {skew:.3f} (Jensen-Shannon in bits, "
            "from a client to all, mean over examples)",
            allowed=f"at most {MOST_LABEL_SKEW:g}",
            do="See it with 'fedtl split'. Use adaptation.prior = 'balanced_softmax', or set "
            "adaptation.allow_label_skew = true to align all the same",
        )

"""The pooled ridge head: the same sums over everybody's rows at once, solved in one place.

With a frozen trunk Fed3R reaches it from any split to rounding; here it is the reference line.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedtl.clients.statistics import statistics
from fedtl.plans import RoundPlan
from fedtl.strategies.closed_form import Fed3R
from fedtl.types import Head, LocalTraining, Population, Rows


def fit_ridge(population: Population, head: Head, ridge: float, threads: int = 1) -> Head:
    """W = (A + ridge I)^-1 B over all clients' training rows, with a bias, as a float32 head.

    Args:
        head: says how many classes there are.
        ridge: on weights and bias, at least 0; at 0 a singular matrix takes its pseudo-inverse.
        threads: CPU threads; the result does not depend on it.

    Returns:
        The regression's own head: no column is scaled. A class without examples is never predicted.
    """
    classes, width = len(head["bias"]), population.features.shape[1]
    linear = {"weight": np.zeros((classes, width), np.float32), "bias": head["bias"]}
    strategy = Fed3R(ridge=ridge, normalise=False, temperature=1.0)
    index = population.train.index
    used = int(population.train.offsets[-1])
    together = Rows(index[:used], np.array([0, used], np.int64))
    pooled = replace(population, train=together, test=together, names=("all",), domains=("",))
    everybody = np.zeros(1, np.int64)
    plan = RoundPlan(1, everybody, np.zeros(1, np.uint64), LocalTraining(0, 1, 0.0))
    state = strategy.init(linear, 1)
    updates = statistics(pooled, linear, strategy.plan(state, plan), threads=threads)
    return strategy.step(state, updates).head

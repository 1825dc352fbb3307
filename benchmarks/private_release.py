"""Accuracy of a ridge head that is released once, against epsilon, with and without its repair.

    uv run python benchmarks/private_release.py                          # quickstart's digits
    uv run python benchmarks/private_release.py --scenario scenarios/pacs-domains.toml --clip 25

Each row is one epsilon (delta 1e-5, single examples), each figure the mean over noise streams on
all test examples: with the repair (projection, then lambda I), with the projection alone, and with
the noised matrix as it is. Shortening rows alone is the row of epsilon infinite.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedtl.build import open_data, population_of
from fedtl.clients.statistics import statistics
from fedtl.plans import RoundPlan
from fedtl.privacy.accounting import Release, noise_for
from fedtl.privacy.noise import seeded
from fedtl.ready_features import make_features
from fedtl.scenario.load import load_scenario
from fedtl.strategies import private_release
from fedtl.strategies.closed_form import Fed3R
from fedtl.strategies.private_release import PrivateRelease, repaired
from fedtl.types import Float64, Head, LocalTraining, Population

EPSILONS = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, math.inf)
DELTA = 1e-5
REPAIRS: dict[str, Callable[[Float64, float], Float64]] = {
    "repaired": repaired,
    "projected only": lambda matrix, radius: repaired(matrix, 0.0),
    "as it is": lambda matrix, radius: matrix,
}


def accuracies(population: Population, clip: float, epsilon: float, streams: int) -> list[float]:
    """Of each repair at one epsilon."""
    noise = 0.0
    if epsilon < math.inf:
        noise = noise_for(epsilon, DELTA, lambda z: [Release(z)], "pld")
    strategy = PrivateRelease(Fed3R(), "example", clip, noise)
    shape = len(population.classes), population.features.shape[1]
    head = {"weight": np.zeros(shape, np.float32), "bias": np.zeros(shape[0], np.float32)}
    state = strategy.init(head, population.num_clients)
    ids = np.arange(population.num_clients)
    plan = RoundPlan(1, ids, ids.astype(np.uint64), LocalTraining(1, 1, 0.0))
    plan = strategy.plan(state, plan)
    summed = strategy.absorb(state, statistics(population, head, plan, threads=2))
    found = []
    for repair in REPAIRS.values():
        setattr(private_release, "repaired", repair)  # noqa: B010
        heads = [strategy.with_noise(seeded(key)).solve(summed).head for key in range(streams)]
        found.append(float(np.mean([accuracy(population, head) for head in heads])))
    return found


def accuracy(population: Population, head: Head) -> float:
    """On everybody's test examples."""
    rows = population.test.index
    scores = population.features[rows] @ head["weight"].T + head["bias"]
    return float((scores.argmax(axis=1) == population.labels[rows]).mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenario", default="quickstart")
    parser.add_argument("--clip", type=float, default=40.0, help="length of a row")
    parser.add_argument("--streams", type=int, default=3, help="of noise")
    given = parser.parse_args()
    population = population_of(make_features(open_data(load_scenario(given.scenario))))
    population = replace(population, features=np.asarray(population.features, np.float32))
    print("| epsilon |", " | ".join(REPAIRS), "|")
    print("|" + "---|" * (1 + len(REPAIRS)))
    for epsilon in EPSILONS:
        figures = accuracies(population, given.clip, epsilon, given.streams)
        shown = "∞" if epsilon == math.inf else f"{epsilon:g}"
        print(
            f"| {shown} |", " | ".join(f"{100 * figure:.1f}" for figure in figures), "|", flush=True
        )


if __name__ == "__main__":
    main()

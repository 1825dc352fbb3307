"""What the server does after the clients: every strategy's step, and a large cohort's memory.

    uv run python benchmarks/strategies_step.py [--memory]

Reference work: 100 clients x 500 examples x 512 features, 10 classes, 5 epochs, batch 50. Each
strategy gets what it asks of these clients, through the same kernels as a run; its step is timed
from accepted updates to the next state and set against the clients' training alone, all within one
run of the script. With --memory: 10,000 updates of a 512 x 100 head through the median and the
trimmed mean, each in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from fedtl import machine
from fedtl.clients.statistics import statistics
from fedtl.clients.tasks import do_task
from fedtl.clients.training import train_clients
from fedtl.plans import RoundPlan
from fedtl.rounds import WAVE_BYTES
from fedtl.scenario import strategies as sections
from fedtl.scenario.schema import Scenario
from fedtl.strategies import STRATEGIES, ServerState, make_strategy
from fedtl.strategies.base import Strategy, Summing
from fedtl.strategies.robust import Median, TrimmedMean
from fedtl.types import ClientUpdates, LocalTraining, Population, Rows

CLIENTS, EXAMPLES, FEATURES, CLASSES = 100, 500, 512, 10
MANY, MANY_CLASSES = 10_000, 100
REPEATS = 11
NEEDED: dict[str, dict[str, Any]] = {
    "fltrust": {"root": "client-000000"},
    "flower": {"class": "FedAvg"},
}
"""Parameters without a default."""


def population() -> Population:
    """The reference clients; the last row of each is a test row."""
    rng = np.random.default_rng(0)
    num = CLIENTS * EXAMPLES
    features = rng.normal(size=(num, FEATURES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, num).astype(np.int32)
    names = tuple(f"client-{i:06d}" for i in range(CLIENTS))
    rows = Rows(np.arange(num), np.arange(CLIENTS + 1) * EXAMPLES)
    classes = tuple("0123456789")
    return Population(features, labels, classes, rows, rows, names, ("",) * CLIENTS)


def seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median over some calls, after one that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def names_of_strategies() -> list[str]:
    """All that a scenario can ask for."""
    union = get_args(sections.Strategy)[0]
    return [
        name
        for section in get_args(union)
        for name in get_args(section.model_fields["name"].annotation)
    ]


def build(name: str, people: Population) -> Strategy:
    """The strategy with its defaults."""
    wanted = {"name": "x", "strategy": {"name": name, **NEEDED.get(name, {})}}
    return make_strategy(Scenario.model_validate(wanted), people.names)


def step_seconds(strategy: Strategy, people: Population, plan: RoundPlan, threads: int) -> float:
    """Of one server step on what the strategy's plan has the clients send."""
    head = {
        "weight": np.zeros((CLASSES, FEATURES), np.float32),
        "bias": np.zeros(CLASSES, np.float32),
    }
    state = strategy.init(head, people.num_clients)
    # what clients do for themselves is not the server's
    plan = replace(strategy.plan(state, plan), personal=None)
    if isinstance(strategy, Summing):
        return summing_seconds(strategy, state, people, plan, threads)
    updates = replace(do_task(people, head, plan, threads=threads), training=plan.training)
    return seconds(lambda: strategy.step(state, updates))


def summing_seconds(
    strategy: Summing, state: ServerState, people: Population, plan: RoundPlan, threads: int
) -> float:
    """Statistics are added up in waves, as the round loop does it."""
    at_a_time = max(1, WAVE_BYTES // plan.up_bytes(state.head))
    taken, summed = 0.0, state
    for first in range(0, len(plan.clients), at_a_time):
        wave = plan.part(np.arange(first, min(first + at_a_time, len(plan.clients))))
        updates = statistics(people, state.head, wave, threads=threads)
        started = time.perf_counter()
        summed = strategy.absorb(summed, updates)
        taken += time.perf_counter() - started
    return taken + seconds(lambda: strategy.solve(summed), 3)


def compare_steps() -> None:
    """All strategies, beside the reference round."""
    threads, people = machine.allowed_cores(), population()
    training = LocalTraining(5, 50, 0.05)
    keys = np.arange(CLIENTS, dtype=np.uint64)
    plan = RoundPlan(1, np.arange(CLIENTS), keys, training)
    head = {
        "weight": np.zeros((CLASSES, FEATURES), np.float32),
        "bias": np.zeros(CLASSES, np.float32),
    }
    reference = seconds(lambda: train_clients(people, head, plan, threads=threads))
    print(f"{machine.cpu_model()}, {threads} threads, medians of {REPEATS}")
    print(f"reference round, clients' training: {1e3 * reference:.1f} ms")
    for name in names_of_strategies():
        if name not in STRATEGIES:
            print(f"{name:18s} not there")
            continue
        taken = step_seconds(build(name, people), people, plan, threads)
        print(f"{name:18s} {1e3 * taken:8.2f} ms  {taken / reference:7.1%} of the round")


def measure_memory() -> None:
    """The updates lie in memory, as after validation; they alone are 1,957 MiB."""
    for rule in ("Median", "TrimmedMean"):
        code = f"from strategies_step import step_of_many; step_of_many({rule!r})"
        here = Path(__file__).parent
        subprocess.run([sys.executable, "-c", code], cwd=here, check=True)


def step_of_many(rule: str) -> None:
    """In a process of its own, so that its peak memory is the step's."""
    strategy = {"Median": Median(), "TrimmedMean": TrimmedMean()}[rule]
    start = machine.peak_rss_mib()
    rng, shapes = np.random.default_rng(0), {"weight": (MANY_CLASSES, FEATURES)}
    shapes["bias"] = (MANY_CLASSES,)
    head = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    tensors = {name: np.empty((MANY, *shape), np.float32) for name, shape in shapes.items()}
    for tensor in tensors.values():
        for one in tensor:
            rng.standard_normal(dtype=np.float32, out=one)
    updates = ClientUpdates(1, np.arange(MANY), tensors, np.full(MANY, 9), np.ones(MANY))
    before = machine.peak_rss_mib()
    started = time.perf_counter()
    strategy.step(strategy.init(head, MANY), updates)
    taken = time.perf_counter() - started
    peak = machine.peak_rss_mib()
    print(
        f"{rule}: {MANY:,} updates of {FEATURES} x {MANY_CLASSES} in {taken:.1f} s; peak "
        f"{peak:,.0f} MiB, of it the updates {before - start:,.0f}, the step {peak - before:.0f}, "
        f"the program {start:.0f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true", help="also the large cohort")
    arguments = parser.parse_args()
    compare_steps()
    if arguments.memory:
        measure_memory()

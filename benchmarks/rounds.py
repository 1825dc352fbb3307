"""The whole round loop against the kernel alone, against FedJAX, and with a large population.

    uv run python benchmarks/rounds.py [--fedjax PYTHON] [--population] [--privacy]

Reference work: 100 clients x 500 examples x 512 features, 10 classes, 5 epochs, batch 50, all
clients in each of 5 rounds. Everything of one run of this script is measured on the same machine
in the same minutes, so the ratios hold where absolute times do not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fedtl import machine
from fedtl.clients.training import train_clients
from fedtl.engines import LocalEngine
from fedtl.interrupts import Interrupts
from fedtl.planning import plan_round
from fedtl.privacy.promise import make_promise
from fedtl.results.runs import RunFolder
from fedtl.rounds import Federation, run_rounds
from fedtl.scenario.schema import Scenario
from fedtl.secure_rounds import simulated_sums
from fedtl.strategies import ServerState, make_strategy, protected
from fedtl.types import Population, Rows

CLIENTS, EXAMPLES, TESTS, FEATURES, CLASSES = 100, 500, 125, 512, 10
POPULATION, TRAIN_EACH, TEST_EACH = 100_000, 10, 2
WORK = {
    "name": "reference",
    "rounds": 5,
    "training": {"local_epochs": 5, "batch_size": 50},
    "evaluation": {"references": []},
}
REPEATS = 7


def rows(counts: np.ndarray, first: int) -> Rows:
    """Consecutive rows for each client."""
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Rows(np.arange(first, first + int(ends[-1]), dtype=np.int64), ends)


def population(features: np.ndarray, clients: int, train: int, test: int) -> Population:
    """Every client with the same number of rows."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, CLASSES, len(features)).astype(np.int32)
    names = tuple(f"client-{i:06d}" for i in range(clients))
    return Population(
        features,
        labels,
        tuple("0123456789"),
        rows(np.full(clients, train), 0),
        rows(np.full(clients, test), clients * train),
        names,
        ("",) * clients,
    )


def federation(people: Population, scenario: Scenario, threads: int) -> Federation:
    """A federation over ready features."""
    width = people.features.shape[1]
    head = {"weight": np.zeros((CLASSES, width), np.float32), "bias": np.zeros(CLASSES, np.float32)}
    roster = people.roster()
    promise = make_promise(scenario, roster)
    strategy = protected(make_strategy(scenario, roster.names), scenario, promise, roster.train)
    return Federation(
        scenario, roster, head, strategy, LocalEngine(people, threads), {},
        promise, simulated_sums(scenario, roster.train),
    )  # fmt: skip


def loop_seconds(made: Federation) -> float:
    """One run of the whole loop: training, aggregation, evaluation, records, commits."""
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder.create(Path(place) / "run", "")
        started = time.perf_counter()
        run_rounds(made, folder, lambda row, updates: None, Interrupts())
        seconds = time.perf_counter() - started
        folder.release()
    return seconds


def kernel_seconds(made: Federation, people: Population, threads: int) -> float:
    """The same rounds, local training only, every time from the same head."""
    started = time.perf_counter()
    for round in range(1, made.scenario.rounds + 1):
        plan = plan_round(
            made.scenario, people.num_clients, made.strategy, ServerState(made.head), round
        )
        train_clients(people, made.head, plan, threads=threads)
    return time.perf_counter() - started


def compare_loop(fedjax: str | None) -> None:
    """Loop and kernel in turn, medians, and FedJAX beside them."""
    threads = machine.allowed_cores()
    features = np.random.default_rng(0).normal(size=(CLIENTS * (EXAMPLES + TESTS), FEATURES))
    people = population(features.astype(np.float32), CLIENTS, EXAMPLES, TESTS)
    made = federation(people, Scenario.model_validate(WORK), threads)
    loop_seconds(made)
    pairs = [(kernel_seconds(made, people, threads), loop_seconds(made)) for _ in range(REPEATS)]
    kernel, loop = (float(np.median(column)) for column in zip(*pairs, strict=True))
    done = CLIENTS * made.scenario.rounds
    print(f"{machine.cpu_model()}, {threads} threads, medians of {REPEATS}")
    print(f"kernel alone      {1e3 * kernel / done:7.3f} ms per client and round")
    print(f"whole round loop  {1e3 * loop / done:7.3f} ms, {done / loop:.0f} client-rounds/s")
    print(f"loop / kernel     {np.median([b / a for a, b in pairs]):7.2f}   (goal: at most 1.3)")
    if fedjax:
        script = Path(__file__).with_name("fedjax_rounds.py")
        out = subprocess.run([fedjax, script], capture_output=True, text=True, check=True).stdout
        found = json.loads(out.splitlines()[-1])
        theirs = found["milliseconds_per_client_round"]
        ratio = theirs / (1e3 * loop / done)
        print(f"FedJAX (jax {found['jax']}) {theirs:.2f} ms, {ratio:.1f} times the whole loop here")


PROTECTED = {
    "central": {"mechanism": "central", "noise_multiplier": 1.0},
    "local": {"mechanism": "local", "noise_multiplier": 1.0},
    "example": {"mechanism": "example", "noise_multiplier": 1.0},
    "secure arithmetic": {"secure_aggregation": "arithmetic"},
    "central, secure arithmetic": {
        "mechanism": "central",
        "noise_multiplier": 1.0,
        "secure_aggregation": "arithmetic",
    },
}
"""``[privacy]`` by what is measured."""


def measure_privacy() -> None:
    """The protected loop against the plain one, in turn; medians of the ratios."""
    threads = machine.allowed_cores()
    features = np.random.default_rng(0).normal(size=(CLIENTS * (EXAMPLES + TESTS), FEATURES))
    people = population(features.astype(np.float32), CLIENTS, EXAMPLES, TESTS)
    uniform = {**WORK, "strategy": {"name": "fedavg", "weighting": "uniform"}}
    plain = federation(people, Scenario.model_validate(uniform), threads)
    for name, section in PROTECTED.items():
        scenario = Scenario.model_validate({**uniform, "privacy": section})
        made = federation(people, scenario, threads)
        loop_seconds(made)
        pairs = [(loop_seconds(plain), loop_seconds(made)) for _ in range(REPEATS)]
        done = CLIENTS * scenario.rounds
        print(
            f"{name:28} {1e3 * np.median([b for _, b in pairs]) / done:7.3f} ms per client and "
            f"round, {np.median([b / a for a, b in pairs]):5.2f} times the plain loop"
        )


def measure_population() -> None:
    """100,000 clients of which a part is sampled in each of 20 rounds; features stay on disk."""
    shape = (POPULATION * (TRAIN_EACH + TEST_EACH), FEATURES)
    with tempfile.TemporaryDirectory(dir=".") as place:
        path = Path(place).resolve() / "features.npy"
        stored = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        block = np.random.default_rng(0).normal(size=(50_000, FEATURES)).astype(np.float32)
        for first in range(0, shape[0], len(block)):
            stored[first : first + len(block)] = block
        stored.flush()
        del stored
        code = f"from rounds import run_population; run_population({str(path)!r})"
        here = Path(__file__).parent
        subprocess.run([sys.executable, "-c", code], cwd=here, check=True)


def run_population(path: str) -> None:
    """In a process of its own, so that its peak memory is the run's."""
    people = population(np.load(path, mmap_mode="r"), POPULATION, TRAIN_EACH, TEST_EACH)
    before = machine.peak_rss_mib()
    for fraction in (0.001, 0.01, 0.05):
        work = {
            **WORK,
            "rounds": 20,
            "clients": {"fraction": fraction},
            "evaluation": {"references": [], "fraction": 0.01},
        }
        made = federation(people, Scenario.model_validate(work), machine.allowed_cores())
        seconds = loop_seconds(made)
        size = people.features.nbytes / 2**30
        print(
            f"{POPULATION:,} clients ({size:.1f} GiB of features), "
            f"{fraction * POPULATION:,.0f} a round: "
            f"{20 * fraction * POPULATION / seconds:,.0f} client-rounds/s, "
            f"peak {machine.peak_rss_mib():.0f} MiB (before the first round {before:.0f})"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fedjax", help="a Python in which fedjax is installed")
    parser.add_argument("--population", action="store_true", help="also the large population")
    parser.add_argument("--privacy", action="store_true", help="also loops that protect")
    arguments = parser.parse_args()
    compare_loop(arguments.fedjax)
    if arguments.population:
        measure_population()
    if arguments.privacy:
        measure_privacy()

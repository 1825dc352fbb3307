"""One closed-form round against the machine's own float32 matrix product, and its peak memory.

    uv run python benchmarks/closed_form.py                  # 100 clients x 10,000 rows x 1,280
    uv run python benchmarks/closed_form.py --clients 20

Features lie memory-mapped on disk. The round is the loop's own: clients in waves, every answer
looked at, summed, committed. A Gram product counts as 2 n W^2 operations, as a float32 product of
the same matrices would need; the rate beside it is such a product's, in the same minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from fedtl.engines import LocalEngine
from fedtl.interrupts import Interrupts
from fedtl.plans import RoundPlan
from fedtl.results.runs import RunFolder
from fedtl.rounds import Federation, run_rounds
from fedtl.scenario.load import dump_scenario
from fedtl.scenario.schema import Scenario
from fedtl.strategies import make_strategy
from fedtl.types import ClientUpdates, Head, Population, Rows


@dataclass
class Anonymous:
    """Memory of our own, without mapped files: sampled, in bytes."""

    peak: int = 0
    start: int = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Sample every two milliseconds."""
        done = threading.Event()
        self.start = anonymous()

        def sample() -> None:
            while not done.wait(0.002):
                self.peak = max(self.peak, anonymous())

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def anonymous() -> int:
    """RssAnon of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@dataclass(frozen=True)
class Timed(LocalEngine):
    """A local engine that notes the seconds it spends on statistics."""

    seconds: list[float] = field(default_factory=list)

    def run_clients(self, plan: RoundPlan, head: Head) -> list[ClientUpdates]:
        """As the local engine."""
        began = time.perf_counter()
        replies = list(super().run_clients(plan, head))
        self.seconds.append(time.perf_counter() - began)
        return replies


def population(options: argparse.Namespace, place: Path) -> Population:
    """Equal clients over features on disk; one test row each."""
    rng = np.random.default_rng(0)
    rows = options.clients * options.rows
    path = place / "features.npy"
    stored = np.lib.format.open_memmap(path, "w+", np.float32, (rows, options.features))
    for first in range(0, rows, options.rows):
        stored[first : first + options.rows] = rng.standard_normal(
            (options.rows, options.features), np.float32
        )
    stored.flush()
    del stored
    ends = np.arange(options.clients + 1)
    return Population(
        np.load(path, mmap_mode="r"),
        rng.integers(0, options.classes, rows).astype(np.int32),
        tuple(map(str, range(options.classes))),
        Rows(np.arange(rows), ends * options.rows),
        Rows(np.arange(options.clients), ends),
        tuple(map(str, ends[:-1])),
        ("",) * options.clients,
    )


def product_rate(options: argparse.Namespace) -> float:
    """Operations a second of a float32 product of the Gram matrix's shape; best of five."""
    x = np.random.default_rng(0).standard_normal((options.rows, options.features), np.float32)
    other, best = x.copy(), np.inf
    with threadpool_limits(options.threads, "blas"):
        for _ in range(5):
            began = time.perf_counter()
            x.T @ other
            best = min(best, time.perf_counter() - began)
    return float(2 * options.rows * options.features**2 / best)


def main() -> None:
    """One run, one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("clients", 100), ("rows", 10_000), ("features", 1280), ("classes", 100), ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--place", default=None, help="folder with room for the features")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.place) as name:
        place = Path(name)
        people = population(options, place)
        scenario = Scenario.model_validate(
            {"name": "x", "rounds": 1, "strategy": {"name": "fed3r"}}
        )
        shape = (options.classes, options.features)
        head = {"weight": np.zeros(shape, np.float32), "bias": np.zeros(shape[0], np.float32)}
        strategy = make_strategy(scenario, people.names)
        engine = Timed(people, options.threads)
        engine.evaluate(head, np.zeros(1, np.int64))  # compiles
        federation = Federation(scenario, people.roster(), head, strategy, engine, {})
        folder = RunFolder.create(place / "run", dump_scenario(scenario))
        before = product_rate(options)
        memory = Anonymous()
        began = time.perf_counter()
        with Interrupts() as interrupts, memory.watched():
            run_rounds(federation, folder, lambda row, updates: None, interrupts)
        seconds = time.perf_counter() - began
        after = product_rate(options)
        folder.release()
    width = options.features + 1
    operations = 2 * options.clients * options.rows * width**2
    fastest, gram = max(before, after), 8 * width**2
    print(f"float32 product: {before / 1e9:.0f} before, {after / 1e9:.0f} Gflop/s after")
    for what, spent in (("statistics", sum(engine.seconds)), ("whole round", seconds)):
        rate = operations / spent
        print(f"{what}: {spent:.2f} s, {rate / 1e9:.0f} Gflop/s, {rate / fastest:.2f} of it")
    own = memory.peak - memory.start
    print(f"memory above the start: {own / 2**20:.0f} MiB = {own / gram:.1f} Gram matrices")


if __name__ == "__main__":
    main()

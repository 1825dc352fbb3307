"""``fedtl gap`` on features of many clients: seconds of each part, and peak memory.

    uv run python benchmarks/gap.py                    # 100 clients x 500 rows x 1,280 (goal 30 s)
    uv run python benchmarks/gap.py --clients 1000     # to the rest only

Features lie memory-mapped on disk, as in the store; the backbone's classifier has 1,000 classes.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedtl.evaluation import gaps
from fedtl.evaluation.source_classes import SourceClassifier
from fedtl.types import Population, Rows

PARTS = ("_add_up", "_one", "_pairs", "sample_gaps", "source_scores")


def population(options: argparse.Namespace, place: Path) -> Population:
    """Equal clients over features on disk, each shifted a little."""
    rng = np.random.default_rng(0)
    rows = options.clients * options.rows
    path = place / "features.npy"
    stored = np.lib.format.open_memmap(path, "w+", np.float32, (rows, options.features))
    for first in range(0, rows, options.rows):
        own = rng.standard_normal((options.rows, options.features), np.float32)
        stored[first : first + options.rows] = own + 0.1 * rng.standard_normal()
    stored.flush()
    del stored
    ends = np.arange(options.clients + 1)
    return Population(
        np.load(path, mmap_mode="r"),
        rng.integers(0, options.classes, rows).astype(np.int32),
        tuple(map(str, range(options.classes))),
        Rows(np.arange(rows), ends * options.rows),
        Rows(np.empty(0, np.int64), np.zeros(options.clients + 1, np.int64)),
        tuple(map(str, ends[:-1])),
        ("",) * options.clients,
    )


def timed(name: str, seconds: dict[str, float], work: Callable[..., Any]) -> Callable[..., Any]:
    """``work``, its wall seconds added up under its name (over threads, where it runs in some)."""

    def measured(*arguments: Any) -> Any:
        began = time.perf_counter()
        found = work(*arguments)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        return found

    return measured


def main() -> None:
    """One measurement, one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("clients", 100), ("rows", 500), ("features", 1280), ("classes", 10), ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--place", default=None, help="folder with room for the features")
    options = parser.parse_args()
    seconds: dict[str, float] = {}
    for name in PARTS:
        setattr(gaps, name, timed(name, seconds, getattr(gaps, name)))
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((1000, options.features)).astype(np.float32) / 30
    classifier = SourceClassifier(weight, np.zeros(1000, np.float32))
    with tempfile.TemporaryDirectory(dir=options.place) as name:
        people = population(options, Path(name))
        wall, cpu = time.perf_counter(), time.process_time()
        found = gaps.measure(people, 1, classifier=classifier, threads=options.threads)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{options.clients} clients: {wall:.1f} s, {cpu:.1f} s of processor time")
    for part, spent in seconds.items():
        print(
            f"  {part.lstrip('_'):14} {spent:6.1f} s" + (" over threads" if part == "_one" else "")
        )
    print(f"pairs compared: {'no' if found['pairs'] is None else 'yes'}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak resident memory: {peak:,.0f} MiB, of which the mapped features may be a part")


if __name__ == "__main__":
    main()

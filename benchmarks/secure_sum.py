"""What a secure sum costs: the whole protocol, all ends in this process, against the plain sum.

    python benchmarks/secure_sum.py [--clients 1000] [--parameters 5130] [--dropouts 0.1]
                                    [--bits 32] [--neighbours N | --all] [--repeats 3] [--json]

Random values; the dropouts fall out after they dealt their shares, which costs most: their keys
are put together again and all their masks taken off. One thread. Of each repeat the parts are
taken once; medians are printed. The plain sum is that of the same integers in the ring, the float
sum that of the values. ``--all`` shares masks between all (SecAgg), else with few (SecAgg+).
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from statistics import median

import numpy as np

from fedtl import seeding
from fedtl.privacy.ring import quantise, scale_for, to_values
from fedtl.privacy.secure_graph import neighbours_for
from fedtl.privacy.secure_simulation import SimulatedSum
from fedtl.privacy.secure_sum import PlainSum, SecureSum


def once(args: argparse.Namespace, taken: dict[str, list[float]]) -> float:
    """One round, each part's seconds into ``taken``; the largest error of the sum."""
    random, clients = seeding.generator(1, "benchmark"), np.arange(args.clients)
    values = random.uniform(-1.0, 1.0, (args.clients, args.parameters))
    gone = random.permutation(clients)[: round(args.dropouts * args.clients)]
    left = np.setdiff1d(clients, gone)
    scale, limit = scale_for(1.0, args.clients, args.bits)
    threshold = max(2, int(0.67 * args.clients))
    few = args.neighbours or neighbours_for(args.clients)

    def part(name: str, start: float) -> float:
        now = time.perf_counter()
        taken.setdefault(name, []).append(now - start)
        return now

    clock = time.perf_counter()
    exact = values[left].sum(axis=0)
    clock = part("float_sum_seconds", clock)
    whole = quantise(values[left], scale, limit, args.bits)
    clock = part("quantise_seconds", clock)
    plain: SecureSum = PlainSum(clients, threshold, args.parameters, args.bits)
    plain.begin()
    plain.add(left, whole)
    expected, _ = plain.finish()
    begun = clock = part("plain_ring_sum_seconds", clock)
    secure = SimulatedSum(
        clients,
        threshold,
        None if args.all else few,
        args.bits,
        size=args.parameters,
        run="benchmark",
        round=1,
        seed=1,
    )
    secure.begin()
    clock = part("keys_and_shares_seconds", clock)
    secure.add(left, whole)
    clock = part("masking_seconds", clock)
    total, survivors = secure.finish()
    part("unmasking_seconds", clock)
    part("secure_sum_seconds", begun)
    assert np.array_equal(total, expected), "the sums differ"
    assert np.array_equal(survivors, left)
    taken["neighbours"] = [float(secure.facts["neighbours"])]
    return float(np.abs(to_values(total, scale, args.bits) - exact).max())


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Cost of a secure sum.")
    sizes = {"clients": 1000, "parameters": 5130, "bits": 32, "repeats": 3}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dropouts", type=float, default=0.1)
    parser.add_argument("--neighbours", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    taken: dict[str, list[float]] = {}
    errors = [once(args, taken) for _ in range(args.repeats)]
    figures = {name: median(values) for name, values in taken.items()}
    seconds = figures["secure_sum_seconds"]
    figures |= {
        "milliseconds_per_client": 1e3 * seconds / args.clients,
        "times_the_plain_ring_sum": seconds / figures["plain_ring_sum_seconds"],
        "largest_error_of_the_sum": max(errors),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:30} {value:.4g}")


if __name__ == "__main__":
    main()

"""How fast DP-SGD is at the clients: against plain training, and against Opacus.

    python benchmarks/private_kernel.py [--clients 100] [--samples 500] [--epochs 5] [--batch 50]
                                        [--repeats 7] [--threads 1] [--json]

Two heads: 512 features x 10 classes, and 1,280 x 100 (a fifth of the clients). Each repeat measures
everything once, after a call unmeasured, so that a machine that slows down slows them all; medians
are printed. "clipping" is without noise; "system" has coins and noise of the operating system, as
with real clients; Opacus trains one client after another, and gets a few only.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from kernel import population, seconds

from fedtl import seeding
from fedtl.clients.private_training import train_private
from fedtl.clients.training import train_clients
from fedtl.plans import Protection, RoundPlan
from fedtl.types import LocalTraining, Population

CLIP, NOISE = 1.0, 1.0
OPACUS_CLIENTS = 2


def with_opacus(people: Population, plan: RoundPlan) -> None:
    """The same work for the first few clients; weights start at zero."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    own = plan.training
    for client in range(OPACUS_CLIENTS):
        data = people.client(client)
        x, y = torch.from_numpy(data.features), torch.from_numpy(data.labels).long()
        layer = torch.nn.Linear(x.shape[1], len(people.classes))
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        module = GradSampleModule(layer)
        optimizer = DPOptimizer(
            torch.optim.SGD(module.parameters(), own.learning_rate),
            noise_multiplier=NOISE / CLIP,
            max_grad_norm=CLIP,
            expected_batch_size=own.batch_size,
        )
        coins = torch.Generator().manual_seed(client)
        for _ in range(own.epochs * -(-len(y) // own.batch_size)):
            chosen = torch.rand(len(y), generator=coins) < own.batch_size / len(y)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x[chosen]), y[chosen]).backward()
            optimizer.step()


def measure(args: argparse.Namespace) -> dict[str, float]:
    """All figures of one head, by name."""
    people, clients = population(args), np.arange(args.clients)
    keys, noise_keys = (
        seeding.client_keys(1, purpose, 1, clients) for purpose in ("batches", "noise")
    )
    plan = RoundPlan(1, clients, keys, LocalTraining(args.epochs, args.batch, 0.05))
    clipping = replace(plan, protection=Protection(example_clip=CLIP))
    protection = Protection(example_clip=CLIP, example_noise=NOISE)
    private = replace(plan, protection=protection, noise_keys=noise_keys)
    few = replace(private.part(clients[:OPACUS_CLIENTS]), noise_keys=None)
    head = {
        "weight": np.zeros((args.classes, args.features), np.float32),
        "bias": np.zeros(args.classes, np.float32),
    }
    threads = args.threads
    torch.set_num_threads(threads)
    work: dict[str, tuple[int, Callable[[], object]]] = {
        "plain": (args.clients, lambda: train_clients(people, head, plan, threads=threads)),
        "clipping": (args.clients, lambda: train_private(people, head, clipping, threads=threads)),
        "private": (args.clients, lambda: train_private(people, head, private, threads=threads)),
        "system": (
            OPACUS_CLIENTS,
            lambda: train_private(people, head, few, threads=threads, secure=True),
        ),
        "opacus": (OPACUS_CLIENTS, lambda: with_opacus(people, plan)),
    }
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(args.repeats):
        for name, (count, action) in work.items():
            taken[name].append(1e3 * seconds(action) / count)
    middle = {name: median(values) for name, values in taken.items()}
    return {f"{name}_milliseconds_per_client_round": value for name, value in middle.items()} | {
        "private_over_plain": middle["private"] / middle["plain"],
        "clipping_over_plain": middle["clipping"] / middle["plain"],
        "system_over_plain": middle["system"] / middle["plain"],
        "times_faster_than_opacus": middle["opacus"] / middle["private"],
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Speed of DP-SGD at the clients.")
    sizes = {"clients": 100, "samples": 500, "epochs": 5, "batch": 50, "repeats": 7, "threads": 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="opacus")
    warnings.filterwarnings("ignore", message=".*hook.*")
    figures = {}
    for features, classes, share in ((512, 10, 1), (1280, 100, 5)):
        own = {"features": features, "classes": classes, "clients": max(2, args.clients // share)}
        figures[f"{features} x {classes}"] = measure(argparse.Namespace(**vars(args) | own))
    if args.json:
        print(json.dumps(figures))
        return
    for head, values in figures.items():
        print(head)
        for name, value in values.items():
            print(f"  {name:43} {value:.4g}")


if __name__ == "__main__":
    main()

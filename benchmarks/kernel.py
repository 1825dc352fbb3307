"""How fast the client kernel is: against the machine's limit and against a plain torch loop.

    python benchmarks/kernel.py [--clients 100] [--samples 500] [--features 512] [--classes 10]
                                [--epochs 5] [--batch 50] [--repeats 7] [--device cuda] [--json]

Each repeat measures everything once, so that a machine that slows down slows them all; each is
called once unmeasured before, as a core that idled takes milliseconds to come back, and in a run
one round follows another. Medians are printed. The loop trains one client after another with
torch autograd and torch.optim.SGD; it gets a few clients only, and the better of its thread counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from fedtl import seeding
from fedtl.clients.batches import batch_order
from fedtl.clients.training import train_clients
from fedtl.plans import RoundPlan
from fedtl.types import ClientUpdates, Float32, LocalTraining, Population, Rows

LOOP_CLIENTS = 4
SQUARE = 2000


def population(args: argparse.Namespace) -> Population:
    """Clients of equal size with random features and labels."""
    random = seeding.generator(1, "benchmark")
    num = args.clients * args.samples
    features = random.standard_normal((num, args.features), dtype=np.float32)
    labels = random.integers(0, args.classes, num).astype(np.int32)
    rows = Rows(random.permutation(num), np.arange(args.clients + 1) * args.samples)
    none = Rows(np.empty(0, np.int64), np.zeros(args.clients + 1, np.int64))
    names = tuple(str(client) for client in range(args.clients))
    classes = tuple(str(c) for c in range(args.classes))
    return Population(features, labels, classes, rows, none, names, ("",) * args.clients)


def loop(
    people: Population, plan: RoundPlan, clients: int, dtype: torch.dtype
) -> tuple[list[Float32], list[Float32]]:
    """The plain way, from a zero head: weights and biases of the first few clients."""
    own = plan.training
    width, num_classes = people.features.shape[1], len(people.classes)
    weights, biases = [], []
    for client in range(clients):
        data = people.client(client)
        x, y = torch.from_numpy(data.features).to(dtype), torch.from_numpy(data.labels).long()
        layer = torch.nn.Linear(width, num_classes, dtype=dtype)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), own.learning_rate)
        for epoch in range(own.epochs):
            order = torch.from_numpy(batch_order(int(plan.batch_keys[client]), len(y), epoch))
            for chosen in order.split(own.batch_size):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(layer(x[chosen]), y[chosen]).backward()
                optimizer.step()
        weights.append(layer.weight.detach().numpy())
        biases.append(layer.bias.detach().numpy())
    return weights, biases


def seconds(action: Callable[[], object]) -> float:
    """How long a second call takes."""
    action()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure(args: argparse.Namespace) -> dict[str, float]:
    """All figures of one run, by name."""
    people = population(args)
    clients = np.arange(args.clients)
    plan = RoundPlan(
        1,
        clients,
        seeding.client_keys(1, "batches", 1, clients),
        LocalTraining(args.epochs, args.batch, 0.05),
    )
    head = {
        "weight": np.zeros((args.classes, args.features), np.float32),
        "bias": np.zeros(args.classes, np.float32),
    }
    square = seeding.generator(2, "benchmark").random((SQUARE, SQUARE), dtype=np.float32)

    def kernel(threads: int) -> ClientUpdates:
        return train_clients(people, head, plan, threads=threads, device=args.device)

    start = time.perf_counter()
    updates = kernel(1)
    first = time.perf_counter() - start
    few = min(LOOP_CLIENTS, args.clients)
    taken: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        taken.setdefault("product", []).append(seconds(lambda: square @ square))
        for threads in (1, 2):
            taken.setdefault(f"kernel{threads}", []).append(seconds(lambda t=threads: kernel(t)))
            torch.set_num_threads(threads)
            taken.setdefault(f"loop{threads}", []).append(
                seconds(lambda: loop(people, plan, few, torch.float32))
            )
    middle = {name: median(values) for name, values in taken.items()}
    rate = 2 * SQUARE**3 / middle["product"]
    work = 4 * args.samples * args.features * args.classes * args.epochs * args.clients
    exact = loop(people, plan, few, torch.float64)
    return {
        "first_call_seconds": first,
        "client_rounds_per_second_1_thread": args.clients / middle["kernel1"],
        "client_rounds_per_second_2_threads": args.clients / middle["kernel2"],
        "milliseconds_per_client_round_2_threads": 1e3 * middle["kernel2"] / args.clients,
        "matrix_product_gflops": rate / 1e9,
        "share_of_matrix_product_rate_2_threads": work / middle["kernel2"] / rate,
        "times_faster_than_torch_loop": min(middle["loop1"], middle["loop2"])
        / few
        / (middle["kernel2"] / args.clients),
        "largest_difference_to_float64_loop": max(
            float(np.abs(updates.tensors[name][client] - exact[which][client]).max())
            for which, name in enumerate(("weight", "bias"))
            for client in range(few)
        ),
        "largest_weight": max(float(np.abs(weight).max()) for weight in exact[0]),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="Speed of the client kernel.")
    sizes = {"clients": 100, "samples": 500, "features": 512, "classes": 10}
    for name, value in (sizes | {"epochs": 5, "batch": 50, "repeats": 7}).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    figures = measure(args)
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:45} {value:.4g}")


if __name__ == "__main__":
    main()

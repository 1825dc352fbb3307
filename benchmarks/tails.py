"""How fast what is behind a cut is trained: against a plain loop that runs the whole network.

    python benchmarks/tails.py --weights FILE [--clients 20] [--samples 100] [--epochs 2]
                               [--batch 32] [--size 96] [--loop-clients 4] [--repeats 3] [--json]

MobileNetV2, its last block trained together with a linear head. The loop is what one writes first:
for each client, each epoch and each batch the whole network runs, its last block with gradients,
in eager torch with torch.optim.SGD on tensors that are in memory already. It gets a few clients
only and the better of one thread and all. Both train on the same batches in the same order; how far
their results are apart is printed. What the frozen part takes, once, is printed beside it: the loop
runs it again in every epoch of every round. Each repeat measures everything once; medians are told.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from fedtl import machine, seeding
from fedtl.clients.batches import batch_order
from fedtl.clients.training import train_clients
from fedtl.plans import RoundPlan
from fedtl.scenario import schema
from fedtl.transfer.backbones import open_backbone
from fedtl.transfer.tails import first_head, open_network
from fedtl.types import TAIL, Float32, Head, LocalTraining, Population, Rows

CLASSES = 7


def seconds(action: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def loop(
    whole: torch.nn.Module, pixels: torch.Tensor, people: Population, plan: RoundPlan, clients: int
) -> list[dict[str, Float32]]:
    """The plain way, from a zero head: the first few clients' tensors, by a head's names."""
    own, ended = plan.training, []
    for client in range(clients):
        network = copy.deepcopy(whole)
        layer = torch.nn.Linear(people.width, CLASSES)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        block = network.get_submodule("body.features.18.0")
        block.requires_grad_(True)
        optimizer = torch.optim.SGD(
            [*block.parameters(), *layer.parameters()], own.learning_rate, own.momentum
        )
        rows = people.train.of(client)
        labels = torch.from_numpy(people.labels[rows]).long()
        mine = pixels[torch.from_numpy(rows)]
        for epoch in range(own.epochs):
            order = torch.from_numpy(batch_order(int(plan.batch_keys[client]), len(rows), epoch))
            for chosen in order.split(own.batch_size):
                optimizer.zero_grad()
                cross_entropy(layer(network(mine[chosen])), labels[chosen]).backward()
                optimizer.step()
        named = {TAIL + "features.18.0.weight": block.weight, **dict(layer.named_parameters())}
        ended.append({name: value.detach().numpy() for name, value in named.items()})
    return ended


def apart(ours: Head, theirs: list[dict[str, Float32]]) -> float:
    """Largest difference of any entry after training."""
    return max(
        float(np.abs(ours[name][client] - value).max())
        for client, tensors in enumerate(theirs)
        for name, value in tensors.items()
    )


def measure(args: argparse.Namespace) -> dict[str, float]:
    """All figures, by name."""
    cores = machine.allowed_cores()
    section = schema.Backbone(name="mobilenet_v2", weights=args.weights, image_size=args.size)
    front, tail = open_network(section, schema.Transfer(mode="last_blocks", cut=1), 1)
    assert tail is not None
    stream, num = seeding.generator(1, "benchmark"), args.clients * args.samples
    pixels = torch.from_numpy(
        stream.integers(0, 256, (num, args.size, args.size, 3), dtype=np.uint8)
    )
    trunk = front.trunk()

    def through() -> Float32:
        with torch.inference_mode():
            parts = [trunk(part) for part in pixels.split(64)]
        return np.asarray(torch.cat(parts).numpy())

    once: list[float] = []
    start = time.perf_counter()
    features = through()
    once.append(time.perf_counter() - start)
    rows = Rows(np.arange(num), np.arange(args.clients + 1) * args.samples)
    none = Rows(np.empty(0, np.int64), np.zeros(args.clients + 1, np.int64))
    labels = stream.integers(0, CLASSES, num).astype(np.int32)
    names = tuple(str(client) for client in range(args.clients))
    classes = tuple(str(c) for c in range(CLASSES))
    people = Population(features, labels, classes, rows, none, names, ("",) * args.clients, tail)
    scenario = schema.Scenario(name="benchmark", data={"source": "arrays", "path": "none.npz"})
    head = first_head(scenario, tail, people.width, CLASSES)
    ids = np.arange(args.clients)
    training = LocalTraining(args.epochs, args.batch, 0.01, 0.9)
    plan = RoundPlan(1, ids, seeding.client_keys(1, "batches", 1, ids), training)
    short = replace(plan, training=replace(training, epochs=1)).part(ids[:1])
    whole = open_backbone(section, 1).trunk()
    train_clients(people, head, short)
    ours: list[float] = []
    theirs: dict[int, list[float]] = {threads: [] for threads in sorted({1, cores})}
    share = args.clients / args.loop_clients
    for _ in range(args.repeats):
        ours.append(seconds(lambda: train_clients(people, head, plan, threads=cores)))
        for threads, found in theirs.items():
            torch.set_num_threads(threads)
            loop(whole, pixels, people, short, 1)
            found.append(
                share * seconds(lambda: loop(whole, pixels, people, plan, args.loop_clients))
            )
    plain = min(median(found) for found in theirs.values())
    torch.set_num_threads(1)
    trained = train_clients(people, head, plan, threads=cores).tensors
    difference = apart(trained, loop(whole, pixels, people, plan, args.loop_clients))
    return {
        "tail_seconds": median(ours),
        "loop_seconds": plain,
        "ratio": plain / median(ours),
        "frozen_part_once_seconds": median(once),
        "largest_difference": difference,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", default="none", help="of MobileNetV2; none are random")
    parser.add_argument("--json", action="store_true")
    sizes = {"clients": 20, "samples": 100, "epochs": 2, "batch": 32, "size": 96}
    for name, default in {**sizes, "loop-clients": 4, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    found = measure(args)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print(
        f"{args.clients} clients of {args.samples} images at {args.size} px, {args.epochs} epochs"
    )
    print(f"behind the cut     {found['tail_seconds']:8.2f} s")
    print(f"plain whole loop   {found['loop_seconds']:8.2f} s, {found['ratio']:.1f} times as long")
    print(f"frozen part, once  {found['frozen_part_once_seconds']:8.2f} s")
    print(f"largest difference {found['largest_difference']:.1e}")


if __name__ == "__main__":
    main()

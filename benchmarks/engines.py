"""The engines with workers of their own: what a client and round costs on each.

    uv run python benchmarks/engines.py                     # all of it, in one run
    uv run python benchmarks/engines.py flower [--clients 1000]
    uv run python benchmarks/engines.py ray [--clients 200]
    uv run python benchmarks/engines.py real

Reference work: clients x 500 examples x 512 features, 10 classes, 5 epochs, batch 50; all clients
in every round, local training and average. All figures of one run are of the same minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from real_clients import compare_real

import fedtl.engines  # noqa: F401  before Flower's import: switches its telemetry off
from fedtl import machine, seeding
from fedtl.clients.training import train_clients
from fedtl.engines.hosting import open_population, save_population
from fedtl.plans import RoundPlan
from fedtl.types import ClientUpdates, Head, LocalTraining, Population, Rows

EXAMPLES, FEATURES, CLASSES = 500, 512, 10
TRAINING = LocalTraining(epochs=5, batch_size=50, learning_rate=0.05)
ROUNDS = 5

TrainClient = Callable[[Population, RoundPlan, Head], ClientUpdates]


def population(clients: int, place: Path, examples: int = EXAMPLES) -> Population:
    """Every client with the same number of rows, features memory-mapped from ``place``."""
    rng = np.random.default_rng(0)
    path = place / "features.npy"
    shape = (clients * examples, FEATURES)
    stored = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for first in range(0, len(stored), examples):
        stored[first : first + examples] = rng.normal(size=(examples, FEATURES))
    stored.flush()
    del stored
    labels = rng.integers(0, CLASSES, shape[0]).astype(np.int32)
    train = Rows(np.arange(shape[0]), np.arange(clients + 1) * examples)
    test = Rows(np.arange(clients), np.arange(clients + 1))
    names = tuple(f"client-{i}" for i in range(clients))
    features = np.load(path, mmap_mode="r")
    return Population(features, labels, tuple("0123456789"), train, test, names, ("",) * clients)


def plan(clients: np.ndarray, round: int) -> RoundPlan:
    """All these clients in one round."""
    keys = seeding.client_keys(0, "batches", round, clients)
    return RoundPlan(round, clients, keys, TRAINING)


def average(replies: list[ClientUpdates]) -> Head:
    """FedAvg over clients of the same size."""
    filled = [reply for reply in replies if len(reply.clients)]
    return {
        name: np.concatenate([reply.tensors[name] for reply in filled]).mean(axis=0)
        for name in filled[0].tensors
    }


def zeros() -> Head:
    """The first head."""
    weight = np.zeros((CLASSES, FEATURES), np.float32)
    return {"weight": weight, "bias": np.zeros(CLASSES, np.float32)}


def seconds_per_round(step: Callable[[int, Head], Head]) -> float:
    """The median over rounds of one that trains everybody and averages; the first is not timed."""
    head, taken = step(0, zeros()), []
    for round in range(1, ROUNDS + 1):
        started = time.perf_counter()
        head = step(round, head)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def kernel_alone(people: Population) -> float:
    """All cores of this process, no messages."""
    everybody = np.arange(people.num_clients)
    threads = machine.allowed_cores()
    return seconds_per_round(
        lambda round, head: average(
            [train_clients(people, head, plan(everybody, round), threads=threads)]
        )
    )


def our_flower(people: Population) -> float:
    """Our engine on Flower's simulation: one message per node and round."""
    from fedtl.engines.flower_simulation import flower_engine

    engine = flower_engine(people)
    everybody = np.arange(people.num_clients)
    try:
        engine.start(zeros())
        return seconds_per_round(
            lambda round, head: average(list(engine.run_clients(plan(everybody, round), head)))
        )
    finally:
        engine.close()


def torch_loop(people: Population, plan: RoundPlan, head: Head) -> ClientUpdates:
    """What a Flower app usually does at a client: an ordinary training loop in torch."""
    import torch

    (client,) = plan.clients.tolist()
    data = people.client(client)
    x, y = torch.from_numpy(data.features), torch.from_numpy(data.labels).long()
    model = torch.nn.Linear(FEATURES, CLASSES)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in head.items()})
    optimizer = torch.optim.SGD(model.parameters(), TRAINING.learning_rate)
    for _ in range(TRAINING.epochs):
        for batch in torch.randperm(len(y)).split(TRAINING.batch_size):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    tensors = {name: t.detach().numpy()[None] for name, t in model.named_parameters()}
    return ClientUpdates(plan.round, plan.clients, tensors, np.array([len(y)]), np.zeros(1))


def plain_flower(
    people: Population, place: Path, train_client: TrainClient, rounds: int = ROUNDS
) -> float:
    """A plain Flower app on the same cores: one node and one message per client, its FedAvg."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    from fedtl.engines import ray_cluster

    folder = place / "population"
    if not folder.exists():
        folder.mkdir()
        save_population(people, folder)
    client, server, began = ClientApp(), ServerApp(), []

    @client.train()
    def train(message: Message, context: Context) -> Message:
        own = np.array([context.node_config["partition-id"]])
        weight, bias = message.content["arrays"].to_numpy_ndarrays()
        head = {"weight": weight, "bias": bias}
        step = plan(own, message.content["config"]["server-round"])
        update = train_client(open_population(folder), step, head)
        arrays = ArrayRecord([update.tensors["weight"][0], update.tensors["bias"][0]])
        count = MetricRecord({"num-examples": int(update.num_examples[0])})
        return Message(RecordDict({"arrays": arrays, "metrics": count}), reply_to=message)

    class Timed(FedAvg):
        def configure_train(self, server_round: int, *rest: Any) -> Iterable[Message]:
            began.append(time.perf_counter())
            return super().configure_train(server_round, *rest)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Timed(
            fraction_evaluate=0.0,
            min_train_nodes=people.num_clients,
            min_available_nodes=people.num_clients,
        )
        arrays = ArrayRecord([zeros()["weight"], zeros()["bias"]])
        strategy.start(grid, arrays, num_rounds=rounds + 2, timeout=None)

    cluster = ray_cluster.join()
    try:
        resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        run_simulation(server, client, people.num_clients, backend_config=resources)
    finally:
        cluster.leave()
    return float(np.median(np.diff(began)[1:]))


def compare_flower(clients: int) -> None:
    """Kernel, our engine and a plain app, per client and round."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        place = Path(name).resolve()
        people = population(clients, place)
        kernel, ours = kernel_alone(people), our_flower(people)
        plain = plain_flower(people, place, lambda own, step, head: train_clients(own, head, step))
        usual = plain_flower(people, place, torch_loop, rounds=1)
    print(f"{machine.cpu_model()}, {machine.allowed_cores()} cores, {clients} clients")
    for name, seconds in (
        ("the kernel alone, in this process", kernel),
        ("Flower engine, one message per node", ours),
        ("plain Flower, same kernel, one message per client", plain),
        ("plain Flower, torch loop, one message per client", usual),
    ):
        each = 1e3 * seconds / clients
        print(f"{name:50} {each:8.3f} ms per client and round, {seconds / ours:6.1f} times ours")
    print("goal: one message per client costs at least 20 times as much")


def compare_ray(clients: int) -> None:
    """Two workers against one thread of this process, in turn; then many small clients."""
    with tempfile.TemporaryDirectory(dir=".") as name:
        place = Path(name).resolve()
        print(f"{machine.cpu_model()}, {machine.allowed_cores()} cores")
        one_thread_and_two_workers(f"{clients} clients", population(clients, place))
        many = population(10_000, place, examples=5)
        one_thread_and_two_workers("10,000 clients of 5 examples", many)


def one_thread_and_two_workers(what: str, people: Population) -> None:
    """A few lines of the table."""
    from fedtl.engines import LocalEngine
    from fedtl.engines.ray_workers import RayEngine

    everybody = np.arange(people.num_clients)
    engines = {
        "one thread": LocalEngine(people, 1),
        "Ray, two workers": RayEngine(people, num_cpus=2),
    }
    taken: dict[str, list[float]] = {name: [] for name in engines}
    try:
        for name, engine in engines.items():
            started = time.perf_counter()
            engine.start(zeros())
            print(f"{what}: {name} starts in {time.perf_counter() - started:.1f} s")
        for round in range(ROUNDS + 1):
            for name, engine in engines.items():
                started = time.perf_counter()
                average(list(engine.run_clients(plan(everybody, round), zeros())))
                taken[name].append(time.perf_counter() - started)
    finally:
        for engine in engines.values():
            engine.close()
    rounds = np.array(list(taken.values()))[:, 1:]  # the first is not timed
    for name, seconds in zip(engines, np.median(rounds, axis=1), strict=True):
        print(f"{what}: {name:17} {1e3 * seconds / people.num_clients:8.3f} ms a client and round")
    ratios = rounds[0] / rounds[1]
    print(f"{what}: {np.median(ratios):.2f} times ({ratios.min():.2f} to {ratios.max():.2f})")


PARTS = {"flower": (compare_flower, 1000), "ray": (compare_ray, 200)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=[*PARTS, "real", "all"], nargs="?", default="all")
    parser.add_argument("--clients", type=int)
    arguments = parser.parse_args()
    for part, (compare, usual_clients) in PARTS.items():
        if arguments.part in (part, "all"):
            compare(arguments.clients or usual_clients)
            print()
    if arguments.part in ("real", "all"):
        compare_real()

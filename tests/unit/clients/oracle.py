"""The slow obvious version: torch autograd and torch.optim.SGD, one client after another."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from fedtl.clients.batches import batch_order
from fedtl.plans import RoundPlan
from fedtl.types import Float32, Head, LocalTraining, Population, Rows


def scores(tensors: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    for i in range(sum(name.endswith("weight") for name in tensors) - 1):
        x = torch.relu(x @ tensors[f"hidden.{i}.weight"].T + tensors[f"hidden.{i}.bias"])
    return x @ tensors["weight"].T + tensors["bias"]


def train_one(
    features: npt.NDArray[np.floating],
    labels: npt.NDArray[np.int32],
    head: Head,
    key: int,
    training: LocalTraining,
    dtype: torch.dtype,
) -> tuple[dict[str, npt.NDArray[np.floating]], float]:
    """One client's head after local training and its mean loss over the first epoch."""
    x = torch.from_numpy(features.astype(np.float32)).to(dtype)
    y = torch.from_numpy(labels.astype(np.int64))
    start = {name: torch.tensor(tensor).to(dtype) for name, tensor in head.items()}
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    optimizer = torch.optim.SGD(
        list(tensors.values()),
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )
    first = 0.0
    for epoch in range(training.epochs):
        order = torch.from_numpy(batch_order(key, len(y), epoch))
        for chosen in order.split(training.batch_size) if len(y) else ():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(scores(tensors, x[chosen]), y[chosen])
            pull = sum((tensors[n] - start[n]).square().sum() for n in tensors)
            (loss + training.proximal / 2 * pull).backward()
            optimizer.step()
            first += loss.item() * len(chosen) if epoch == 0 else 0.0
    trained = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    return trained, first / len(y) if len(y) else float("nan")


def train_all(
    population: Population,
    head: Head,
    plan: RoundPlan,
    dtype: torch.dtype = torch.float64,
    initial: Mapping[str, Float32] | None = None,
) -> tuple[dict[str, npt.NDArray[np.floating]], npt.NDArray[np.float64]]:
    """Every client of the plan: name -> [k, ...] and first-epoch losses [k]."""
    trained = []
    for i, client in enumerate(plan.clients.tolist()):
        data = population.client(client)
        start = {n: t[i] for n, t in initial.items()} if initial is not None else head
        key = int(plan.batch_keys[i])
        trained.append(train_one(data.features, data.labels, start, key, plan.training, dtype))
    tensors = {name: np.stack([one[name] for one, _ in trained]) for name in head}
    return tensors, np.array([loss for _, loss in trained])


def federation(
    sizes: list[int], width: int, num_classes: int, seed: int = 0, dtype: type = np.float32
) -> Population:
    """Clients of the given sizes with random rows, scattered over the matrix."""
    random = np.random.default_rng(seed)
    num = sum(sizes)
    features = random.standard_normal((num + 3, width)).astype(dtype)
    labels = random.integers(0, num_classes, num + 3).astype(np.int32)
    rows = Rows(random.permutation(num + 3)[:num], np.cumsum([0, *sizes]))
    names = tuple(f"c{i}" for i in range(len(sizes)))
    classes = tuple(str(c) for c in range(num_classes))
    return Population(features, labels, classes, rows, rows, names, ("",) * len(sizes))


def linear_head(width: int, num_classes: int, seed: int = 1) -> dict[str, Float32]:
    random = np.random.default_rng(seed)
    return {
        "weight": (0.1 * random.standard_normal((num_classes, width))).astype(np.float32),
        "bias": (0.1 * random.standard_normal(num_classes)).astype(np.float32),
    }


def mlp_head(width: int, hidden: list[int], num_classes: int, seed: int = 2) -> dict[str, Float32]:
    random = np.random.default_rng(seed)
    head: dict[str, Float32] = {}
    for i, size in enumerate(hidden):
        matrix = random.standard_normal((size, width)) / np.sqrt(width)
        head[f"hidden.{i}.weight"] = matrix.astype(np.float32)
        head[f"hidden.{i}.bias"] = (0.1 * random.standard_normal(size)).astype(np.float32)
        width = size
    return head | linear_head(width, num_classes, seed)


def plan_for(population: Population, training: LocalTraining, seed: int = 3) -> RoundPlan:
    keys = np.random.default_rng(seed).integers(0, 2**64, population.num_clients, dtype=np.uint64)
    return RoundPlan(1, np.arange(population.num_clients), keys, training)

"""The slow obvious version of DP-SGD: whole numbers, one row at a time, float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fedtl.plans import Protection, RoundPlan
from fedtl.types import ClientUpdates, Head, LocalTraining, Population

Real = npt.NDArray[np.float64]
MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def number(key: int, step: int, place: int) -> int:
    """Number ``place`` (0 for the first) of a step's stream."""
    start = mix(key ^ mix(((step + 1) * GAMMA) & MASK))
    return mix((start + (place + 1) * GAMMA) & MASK)


def pair(bits: int) -> tuple[float, float]:
    """Two normals by Box and Muller: a radius and a point on the circle."""
    radius = math.sqrt(-2 * math.log((float(np.float32(bits >> 33)) + 0.5) / 2**31))
    low = bits & 0xFFFFFFFF
    within = (low - 2**32 if low >= 2**31 else low) >> 2
    angle = within * math.pi / 2 / 2**30
    cosine, sine = math.cos(angle) * (-1 if low & 1 else 1), math.sin(angle)
    return (radius * sine, radius * cosine) if low & 2 else (radius * cosine, radius * sine)


def seeded_noise(key: int, step: int, num_classes: int, width: int) -> Real:
    """[C, D + 1]; the first half of a row from one of each pair, the other from the other."""
    half = (width + 2) // 2
    rows = []
    for c in range(num_classes):
        pairs = [pair(number(key, step, c * half + j)) for j in range(half)]
        rows.append([first for first, _ in pairs] + [second for _, second in pairs])
    return np.array(rows)[:, : width + 1]


def seeded_batch(key: int, step: int, size: int, num: int) -> list[int]:
    """Rows of a step: gaps between them are geometric, by the inverse of their distribution."""
    rows, row, place = [], -1, 0
    while True:
        chance = ((number(key, step, place) >> 11) + 0.5) * 2.0**-53
        row += 1 if size >= num else 1 + math.floor(math.log(chance) / math.log1p(-size / num))
        if row >= num:
            return rows
        rows.append(row)
        place += 1


def tossed(coins: npt.NDArray[np.uint32], size: int) -> list[int]:
    """Rows whose coin, a 32-bit number, falls below the rate."""
    return [row for row, coin in enumerate(coins.tolist()) if coin * len(coins) < size * 2**32]


def gradient(row: Real, label: int, weight: Real, bias: Real) -> Real:
    """Of one example's cross-entropy, [C, D + 1], the bias last."""
    scores = weight @ row + bias
    chances = np.exp(scores - scores.max())
    chances /= chances.sum()
    chances[label] -= 1
    return np.outer(chances, np.append(row, 1.0))


def train_one(
    features: Real, labels: npt.NDArray[np.int32], head: Head, plan: RoundPlan, client: int,
    batch: Callable[[int], list[int]], noise: Callable[[int], Real],
) -> Real:  # fmt: skip
    """One client's head [C, D + 1] after its steps."""
    own, asked = plan.training, plan.protection
    assert asked is not None
    start = np.column_stack([head["weight"], head["bias"]]).astype(np.float64)
    extra = np.zeros_like(start)
    if plan.corrections:
        extra = np.column_stack(
            [plan.corrections["weight"][client], plan.corrections["bias"][client]]
        ).astype(np.float64)
    weights, speed, num = start.copy(), np.zeros_like(start), len(labels)
    for step in range(own.epochs * math.ceil(num / own.batch_size)):
        size = min(own.batch_size, num)
        summed = np.zeros_like(start)
        for i in batch(step):
            g = gradient(features[i], int(labels[i]), weights[:, :-1], weights[:, -1])
            summed += g * (asked.example_clip / max(asked.example_clip, np.linalg.norm(g)))
        summed += asked.example_noise * noise(step) if asked.example_noise else 0.0
        move = summed / size + extra
        move += own.weight_decay * weights + own.proximal * (weights - start)
        speed = own.momentum * speed + move
        weights = weights - own.learning_rate * speed
    return weights


def train_all(population: Population, head: Head, plan: RoundPlan) -> dict[str, Real]:
    """Every client of the plan, by its seeded batches and noise: name -> [k, ...]."""
    shape, heads = head["weight"].shape, []
    keys = plan.batch_keys if plan.noise_keys is None else plan.noise_keys
    for i, client in enumerate(plan.clients.tolist()):
        data = population.client(client)
        key, noise_key, num = int(plan.batch_keys[i]), int(keys[i]), len(data.labels)
        size = min(num, plan.training.batch_size)
        heads.append(
            train_one(
                data.features.astype(np.float64), data.labels, head, plan, i,
                lambda step, key=key, size=size, num=num: seeded_batch(key, step, size, num),
                lambda step, key=noise_key: seeded_noise(key, step, *shape),
            )
        )  # fmt: skip
    stacked = np.stack(heads)
    return {"weight": stacked[:, :, :-1], "bias": stacked[:, :, -1]}


def private_plan(
    people: Population, training: LocalTraining, clip: float = 1.0, noise: float = 0.5
) -> RoundPlan:
    keys = np.random.default_rng(3).integers(0, 2**64, people.num_clients, dtype=np.uint64)
    return RoundPlan(
        1, np.arange(people.num_clients), keys, training,
        protection=Protection(example_clip=clip, example_noise=noise),
        noise_keys=keys[::-1] ^ np.uint64(1),
    )  # fmt: skip


def agree(updates: ClientUpdates, expected: dict[str, np.ndarray], atol: float = 5e-6) -> None:
    for name, tensor in expected.items():
        np.testing.assert_allclose(updates.tensors[name], tensor, rtol=0, atol=atol)


def moved(updates: ClientUpdates, head: Head, client: int) -> np.ndarray:
    """A client's start less its head, [C * (D + 1)]."""
    parts = [head[name].astype(np.float64) - updates.tensors[name][client] for name in head]
    return np.concatenate([part.ravel() for part in parts])

"""Clients in plain float64 numpy, and strategies that round nothing: what equations say exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

from fedtl.plans import RoundPlan
from fedtl.strategies import base, drift
from fedtl.strategies.base import ServerState
from fedtl.types import ClientUpdates, LocalTraining

LAZY = 10**6
"""A batch that holds everything."""


def round_nothing(monkeypatch) -> None:
    """Have heads and corrections stay in float64 (see ``start`` for the variates)."""
    monkeypatch.setattr(base, "float32", lambda values: values)
    monkeypatch.setattr(drift, "_difference", lambda mean, own: mean - own)


@dataclass(frozen=True)
class World:
    """K clients' rows padded to one length: x [K, n, D], one-hot y [K, n, C], 1 / n_k or 0 [K, n].

    The head is one matrix ``weight`` [C, D]; x ends with a 1.
    """

    x: np.ndarray
    y: np.ndarray
    share: np.ndarray
    counts: np.ndarray

    @property
    def head(self) -> dict[str, np.ndarray]:
        return {"weight": np.zeros((self.y.shape[2], self.x.shape[2]))}

    def gradients(self, heads: np.ndarray) -> np.ndarray:
        """Of each client's mean cross-entropy at its own head, [K, C, D]."""
        scores = self.x @ heads.transpose(0, 2, 1)
        scores -= scores.max(2, keepdims=True)
        p = np.exp(scores)
        p /= p.sum(2, keepdims=True)
        return ((p - self.y) * self.share[..., None]).transpose(0, 2, 1) @ self.x

    def losses(self, head: np.ndarray) -> np.ndarray:
        scores = self.x @ head.T
        top = scores.max(2)
        logs = np.log(np.exp(scores - top[..., None]).sum(2)) + top - (scores * self.y).sum(2)
        return (logs * self.share).sum(1)

    def pooled(self, head: np.ndarray, decay: float) -> tuple[float, np.ndarray]:
        """Objective and gradient on everybody's rows."""
        weights = self.counts / self.counts.sum()
        all_alike = np.broadcast_to(head, (len(weights), *head.shape))
        value = weights @ self.losses(head) + decay / 2 * np.square(head).sum()
        return value, np.tensordot(weights, self.gradients(all_alike), 1) + decay * head

    def optimum(self, decay: float) -> np.ndarray:
        """By quasi-Newton, and then Newton's method on finite differences of the gradient."""
        shape = self.head["weight"].shape

        def gradient(vector: np.ndarray) -> np.ndarray:
            return self.pooled(vector.reshape(shape), decay)[1].ravel()

        found = minimize(
            lambda v: (self.pooled(v.reshape(shape), decay)[0], gradient(v)),
            np.zeros(np.prod(shape)),
            jac=True,
            method="L-BFGS-B",
            options={"ftol": 0.0, "gtol": 1e-9, "maxiter": 1000},
        ).x
        size = 1e-5
        hessian = np.array(
            [
                (gradient(found + size * e) - gradient(found - size * e)) / (2 * size)
                for e in np.eye(len(found))
            ]
        )
        for _ in range(2):
            found = found - np.linalg.solve(hessian, gradient(found))
        assert np.abs(gradient(found)).max() < 1e-14
        return found.reshape(shape)


def world(labels: list[np.ndarray], features: list[np.ndarray], num_classes: int) -> World:
    """From each client's labels [n_k] and features [n_k, D]."""
    counts = np.array([len(own) for own in labels])
    shape = len(labels), max(counts)
    x = np.zeros((*shape, features[0].shape[1] + 1))
    y, share = np.zeros((*shape, num_classes)), np.zeros(shape)
    for k, num in enumerate(counts.tolist()):
        x[k, :num, :-1], x[k, :num, -1] = features[k], 1
        y[k, np.arange(num), labels[k]] = 1
        share[k, :num] = 1 / max(1, num)
    return World(x, y, share, counts)


def start(strategy, people: World) -> ServerState:
    """The initial state with all its slots in float64."""
    state = strategy.init(people.head, len(people.counts))
    slots = {
        name: slot.astype(np.float64) if slot.dtype == np.float32 else slot
        for name, slot in state.slots.items()
    }
    return replace(state, slots=slots)


def train(people: World, plan: RoundPlan, state: ServerState, batches=None) -> ClientUpdates:
    """Full-batch local steps of the plan's clients; ``reports`` included."""
    own, first = plan.training, state.head["weight"]
    part = World(*(array[plan.clients] for array in vars(people).values()))
    heads = np.repeat(first[None], len(plan.clients), axis=0).astype(np.float64)
    extra, speed = plan.corrections.get("weight", 0.0), 0.0
    begun = part.gradients(heads)
    for _ in range(own.epochs):
        step = part.gradients(heads) + extra + own.weight_decay * heads
        speed = own.momentum * speed + step + own.proximal * (heads - first)
        heads = heads - own.learning_rate * speed
    tensors = {"weight": heads}
    if "start_gradient" in plan.reports:
        tensors["start_gradient.weight"] = begun
    loss = part.losses(first)
    return ClientUpdates(plan.round, plan.clients, tensors, part.counts, loss, (), own)


def rounds(
    strategy,
    people: World,
    training: LocalTraining,
    num: int,
    cohort: Callable[[int], np.ndarray] | None = None,
    trained: Callable[[World, RoundPlan, ServerState], ClientUpdates] = train,
) -> Iterator[ServerState]:
    """The state after each round; ``cohort`` of a round's number, default everybody."""
    state = start(strategy, people)
    for round in range(1, num + 1):
        clients = cohort(round) if cohort else np.arange(len(people.counts))
        plan = RoundPlan(round, clients, np.zeros(len(clients), np.uint64), training)
        state = strategy.step(state, trained(people, strategy.plan(state, plan), state))
        yield state

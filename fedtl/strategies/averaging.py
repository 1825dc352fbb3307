"""The FedAvg family: w <- w + eta_g * ServerOpt(Delta), Delta = sum_k p_k (w_k - w).

Sources: FedAvg, McMahan et al. 2017 (arXiv 1602.05629), Algorithm 1; FedProx, Li et al. 2020
(1812.06127), eq. 2; FedAvgM, Hsu et al. 2019 (1909.06335), section 3; FedAdagrad, FedAdam and
FedYogi, Reddi et al. 2021 (2003.00295), Algorithm 2. Deviations: sums are in float64; the adaptive
methods start their accumulator at 0 (the authors' released code) instead of tau**2, and correct
no bias, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedtl.plans import RoundPlan
from fedtl.strategies.base import (
    EveryRound,
    ServerState,
    Weighting,
    client_weights,
    mean_delta,
    moved,
    refuse_overshooting,
)
from fedtl.types import ClientUpdates, Float64, Head


@dataclass(frozen=True)
class FedAvg(EveryRound):
    """Weighted mean of the clients' heads; with a server rate of 1 exactly McMahan's."""

    weighting: Weighting = "examples"
    server_learning_rate: float = 1.0

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """w + eta_g * Delta."""
        delta = self._delta(state, updates)
        step = {name: self.server_learning_rate * value for name, value in delta.items()}
        return replace(state, head=moved(state, step))

    def _delta(self, state: ServerState, updates: ClientUpdates) -> dict[str, Float64]:
        return mean_delta(state.head, updates, client_weights(updates, self.weighting))


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg whose clients are held near the round's head by mu/2 * |w - w_t|^2."""

    mu: float = 0.01

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Adds the proximal term; mu = 0 is FedAvg bit for bit.

        Raises InputError for a mu that would overshoot.
        """
        refuse_overshooting(self.mu, plan, "mu")
        return replace(plan, training=replace(plan.training, proximal=self.mu))


@dataclass(frozen=True)
class FedAvgM(FedAvg):
    """FedAvg with server momentum: v <- beta v + Delta; w <- w + eta_g v."""

    momentum: float = 0.9

    def init(self, head: Head, num_clients: int) -> ServerState:
        """v starts at zero."""
        return ServerState(head, _zeros("momentum", head))

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """Heavy-ball step along the averaged update."""
        delta = self._delta(state, updates)
        velocity = {
            name: self.momentum * state.slots[f"momentum.{name}"] + value
            for name, value in delta.items()
        }
        step = {name: self.server_learning_rate * value for name, value in velocity.items()}
        slots = {f"momentum.{name}": value for name, value in velocity.items()}
        return ServerState(moved(state, step), slots)


@dataclass(frozen=True)
class FedAdagrad(FedAvg):
    """Adaptive server step eta_g m / (sqrt(v) + tau) with v the sum of squared updates.

    Base of FedAdam and FedYogi, which differ only in how v is accumulated.
    """

    server_learning_rate: float = 0.03
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def init(self, head: Head, num_clients: int) -> ServerState:
        """Both moments start at zero."""
        return ServerState(head, {**_zeros("first", head), **_zeros("second", head)})

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """m <- beta_1 m + (1 - beta_1) Delta; v by the method; w <- w + eta_g m/(sqrt(v)+tau)."""
        slots: dict[str, Float64] = {}
        step: dict[str, Float64] = {}
        for name, delta in self._delta(state, updates).items():
            first = self.beta_1 * state.slots[f"first.{name}"] + (1 - self.beta_1) * delta
            second = self.accumulate(state.slots[f"second.{name}"], np.square(delta))
            slots[f"first.{name}"], slots[f"second.{name}"] = first, second
            step[name] = self.server_learning_rate * first / (np.sqrt(second) + self.tau)
        return ServerState(moved(state, step), slots)

    def accumulate(self, second: Float64, square: Float64) -> Float64:
        """v + Delta^2."""
        return second + square


@dataclass(frozen=True)
class FedAdam(FedAdagrad):
    """v <- beta_2 v + (1 - beta_2) Delta^2."""

    def accumulate(self, second: Float64, square: Float64) -> Float64:
        """An exponential mean of the squares."""
        return self.beta_2 * second + (1 - self.beta_2) * square


@dataclass(frozen=True)
class FedYogi(FedAdagrad):
    """v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2)."""

    def accumulate(self, second: Float64, square: Float64) -> Float64:
        """Moves towards the square by at most (1 - beta_2) of it."""
        return second - (1 - self.beta_2) * square * np.sign(second - square)


def _zeros(slot: str, head: Head) -> dict[str, Float64]:
    return {f"{slot}.{name}": np.zeros(tensor.shape) for name, tensor in head.items()}

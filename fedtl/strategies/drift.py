"""Strategies against client drift, and the fair q-FedAvg.

With a frozen trunk and a linear head the pooled loss sum_k p_k F_k is convex. Clients that take
several steps each pull towards an optimum of their own, so FedAvg comes to rest beside the pooled
one; SCAFFOLD and FedDyn come to rest on it.

Sources: SCAFFOLD, Karimireddy et al. 2020 (arXiv 1910.06378), Algorithm 1 with option II; FedDyn,
Acar et al. 2021 (2111.04263), Algorithm 1; FedNova, Wang et al. 2020 (2007.07481), eq. 7; FedExP,
Jhunjhunwala et al. 2023 (2301.09604), eq. 4; MimeLite, Karimireddy et al. 2021 (2008.03606),
Algorithm 2 with SGD with momentum; q-FedAvg, Li et al. 2020 (1905.10497), Algorithm 2.

Deviations. Clients keep nothing: SCAFFOLD's c_k and FedDyn's h_k follow from the heads that clients
send, so the server computes and keeps them (K times the head) and sends each client what its
gradients shall gain. That halves SCAFFOLD's uplink, a client can lose nothing, and a resumed run
goes on exactly. All averages have one weighting p_k: the papers weigh clients alike, and a mix (c
alike, the model by examples) is worse than no correction. Until each client has answered once, the
population's examples are estimated from those that have. With local momentum a step counts as often
as it is applied (|a_k|_1 of FedNova's eq. 4) wherever the papers divide by the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.plans import RoundPlan
from fedtl.strategies.averaging import FedAvg
from fedtl.strategies.base import (
    RESULT,
    EveryRound,
    ServerState,
    Weighting,
    client_weights,
    mean_delta,
    moved,
    refuse_overshooting,
)
from fedtl.types import ClientUpdates, Float32, Float64, Head, LocalTraining

Slots = dict[str, npt.NDArray[Any]]

OWN = "clients."
"""Before the slots that hold each client's variate, float32 [K, ...]."""
TOTAL = "total."
"""Before the slots that hold the variates' sum over all clients, times their mass, float64."""
MASS = "mass"
"""Slot of each client's unnormalised weight, int64 [K]: its examples, or 1; -1 while unknown."""
UNKNOWN = -1
BLOCK = 8
"""Clients whose variates are renewed at once: the work on 8 heads of 512 x 10 stays in a cache."""
LEAST_LOSS = 1e-10
"""A loss of 0 has no power below 1; the authors' code adds as much."""


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """Gradients gain c - c_k, the difference of everybody's mean gradient and the client's own.

    c_k <- (w - w_k) / (tau_k eta) - (c - c_k) sent; c = sum_k p_k c_k over the whole population.
    """

    def init(self, head: Head, num_clients: int) -> ServerState:
        """c_k starts at zero."""
        return ServerState(head, _variates(head, num_clients))

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Sends c - c_k along."""
        mean = _mean_variate(state)
        sent = {
            name: _difference(mean[name], state.slots[OWN + name][plan.clients])
            for name in state.head
        }
        return replace(plan, corrections=sent)

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """FedAvg's step, and the variates of who answered."""
        mean, steps = _mean_variate(state), applied_steps(updates) * _rate(updates)

        def own(name: str, part: slice, before: Float32) -> npt.NDArray[np.floating]:
            way: Float64 = np.subtract(
                state.head[name], updates.tensors[name][part], dtype=np.float64
            )
            way *= (1 / steps[part]).reshape(-1, *[1] * (way.ndim - 1))
            way -= _difference(mean[name], before)
            idle = updates.num_examples[part] == 0  # no step, so no gradient to learn of
            way[idle] = before[idle]
            return way

        kept = _keep(state, updates, self.weighting, own)
        return replace(super().step(state, updates), slots=kept)


@dataclass(frozen=True)
class FedDyn(EveryRound):
    """Clients minimise F_k - <h_k, w> + alpha/2 |w - w_t|^2; h_k <- h_k - alpha (w_k - w_t).

    w <- sum_k p_k w_k - h / alpha with h = sum_k p_k h_k over the whole population. Deviation: for
    unequal weights the paper's form is met by scaling F_k by p_k K; here alpha is scaled along with
    it, which clients see as the equations above, at the same strength for large and small ones.
    Both forms rest at the pooled optimum and are the same for equal weights.
    """

    weighting: Weighting = "examples"
    alpha: float = 0.1

    def init(self, head: Head, num_clients: int) -> ServerState:
        """h_k starts at zero."""
        return ServerState(head, _variates(head, num_clients))

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Sends -h_k along, and holds clients near the round's head.

        Raises InputError for an alpha that would overshoot.
        """
        refuse_overshooting(self.alpha, plan, "alpha")
        return replace(
            plan,
            training=replace(plan.training, proximal=self.alpha),
            corrections={name: -state.slots[OWN + name][plan.clients] for name in state.head},
        )

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """The variates of who answered, and then the head from the mean of all of them."""

        def own(name: str, part: slice, before: Float32) -> npt.NDArray[np.floating]:
            way: Float64 = np.subtract(
                updates.tensors[name][part], state.head[name], dtype=np.float64
            )
            way *= -self.alpha
            way += before
            return way

        kept = _keep(state, updates, self.weighting, own)
        mean = _mean_variate(ServerState(state.head, kept))
        delta = mean_delta(state.head, updates, client_weights(updates, self.weighting))
        step = {name: delta[name] - mean[name] / self.alpha for name in delta}
        return ServerState(moved(state, step), kept)


@dataclass(frozen=True)
class FedNova(FedAvg):
    """w <- w + eta_g (sum_k p_k |a_k|_1) sum_k p_k (w_k - w) / |a_k|_1.

    Clients that take more steps count no more than their p_k; with as many steps each it is FedAvg.
    """

    def _delta(self, state: ServerState, updates: ClientUpdates) -> dict[str, Float64]:
        weights, pull = client_weights(updates, self.weighting), applied_steps(updates)
        return mean_delta(state.head, updates, float(weights @ pull) * weights / pull)


@dataclass(frozen=True)
class FedExP(EveryRound):
    """FedAvg with server rate max(1, sum_k p_k |Delta_k|^2 / (2 (|Delta|^2 + epsilon))).

    As many clients disagree, the mean is shorter than they are, and the step is extrapolated. What
    is judged and kept is the mean of the last two heads, as the paper has it. Deviation: p_k stands
    for the paper's 1/M.
    """

    weighting: Weighting = "examples"
    epsilon: float = 1e-3

    def init(self, head: Head, num_clients: int) -> ServerState:
        """Judged is at first the head itself."""
        return ServerState(head, {RESULT + n: t.astype(np.float64) for n, t in head.items()})

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """An extrapolated step, never shorter than FedAvg's."""
        weights = client_weights(updates, self.weighting)
        delta = mean_delta(state.head, updates, weights)
        length = sum(float(np.square(tensor).sum()) for tensor in delta.values())
        spread = float(weights @ _squares(state.head, updates))
        bound = 2 * (length + self.epsilon)
        rate = max(1.0, spread / bound) if bound > 0 else 1.0
        head = moved(state, {name: rate * tensor for name, tensor in delta.items()})
        return ServerState(
            head, {RESULT + n: (t.astype(np.float64) + head[n]) / 2 for n, t in state.head.items()}
        )


@dataclass(frozen=True)
class Mime(FedAvg):
    """Clients step along (1 - beta) g + beta m with the server's momentum m, frozen for the round.

    m <- (1 - beta) sum_k p_k grad F_k(w) + beta m, with the clients' full gradients at the round's
    head and the weight decay that their steps have. Clients see a rate of (1 - beta) eta and
    gradients that gain beta / (1 - beta) m.
    """

    momentum: float = 0.9

    def init(self, head: Head, num_clients: int) -> ServerState:
        """m starts at zero."""
        return ServerState(head, {"momentum." + n: np.zeros(t.shape) for n, t in head.items()})

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Sends the momentum along; asks for gradients at the round's head."""
        rest, num = 1 - self.momentum, len(plan.clients)
        sent = {}
        for name in state.head if self.momentum else ():
            mine = (self.momentum / rest * state.slots["momentum." + name]).astype(np.float32)
            sent[name] = np.broadcast_to(mine, (num, *mine.shape))
        training = replace(plan.training, learning_rate=rest * plan.training.learning_rate)
        return replace(plan, training=training, corrections=sent, reports=("start_gradient",))

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """FedAvg's step, and then the momentum of the gradient it started from."""
        weights = client_weights(updates, self.weighting)
        decay, slots = _training(updates).weight_decay, {}
        for name, head in state.head.items():
            gradient = decay * head.astype(np.float64)
            for weight, own in zip(
                weights.tolist(), updates.tensors["start_gradient." + name], strict=True
            ):
                gradient += weight * own.astype(np.float64)
            before = state.slots["momentum." + name]
            slots["momentum." + name] = (1 - self.momentum) * gradient + self.momentum * before
        return replace(super().step(state, updates), slots=slots)


@dataclass(frozen=True)
class QFedAvg(EveryRound):
    """Clients count the more the worse their loss: w <- w - sum_k Delta_k / sum_k h_k.

    Delta_k = F_k^q L (w - w_k), h_k = q F_k^(q-1) |L (w - w_k)|^2 + L F_k^q, L = 1 / eta, F_k the
    loss at the round's head. q = 0 is FedAvg with uniform weights.
    """

    q: float = 1.0

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Asks for the loss at the round's head."""
        return replace(plan, reports=("start_loss",))

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """One step along the mean, each client weighted by its loss to the power q."""
        steepness = 1 / _rate(updates)
        # A client without examples has no loss; it did not move either.
        loss = np.where(updates.num_examples > 0, updates.loss, 0.0)
        loss = np.maximum(loss, LEAST_LOSS)
        power = loss**self.q
        squares = steepness**2 * _squares(state.head, updates)
        scale = float((self.q * power / loss * squares + steepness * power).sum())
        delta = mean_delta(state.head, updates, power * steepness / scale)
        return replace(state, head=moved(state, delta))


def applied_steps(updates: ClientUpdates) -> Float64:
    """|a_k|_1: how often a client's learning rate times its gradients went into its way.

    float64 [k], at least 1; tau_k without momentum (FedNova, section 3).
    """
    beta, steps = _training(updates).momentum, np.maximum(updates.steps, 1).astype(np.float64)
    if beta == 0:
        return steps
    return np.asarray((steps - beta * (1 - beta**steps) / (1 - beta)) / (1 - beta))


def _training(updates: ClientUpdates) -> LocalTraining:
    assert updates.training is not None, "known once updates are accepted"
    return updates.training


def _rate(updates: ClientUpdates) -> float:
    return _training(updates).learning_rate


def _squares(head: Head, updates: ClientUpdates) -> Float64:
    """|w_k - w|^2, float64 [k]."""
    squares = np.zeros(len(updates.clients))
    for name, start in head.items():
        base = start.astype(np.float64)
        for place, own in enumerate(updates.tensors[name]):
            way = (own - base).reshape(-1)
            squares[place] += way @ way
    return squares


def _difference(mean: Float64, own: Float32) -> Float32:
    """Theirs from one, subtracted in float64 and rounded once."""
    return np.subtract(mean, own, out=np.empty_like(own), casting="same_kind")


def _variates(head: Head, num_clients: int) -> Slots:
    """Variates of zero for everybody."""
    slots: Slots = {MASS: np.full(num_clients, UNKNOWN, np.int64)}
    for name, tensor in head.items():
        slots[OWN + name] = np.zeros((num_clients, *tensor.shape), np.float32)
        slots[TOTAL + name] = np.zeros(tensor.shape)
    return slots


def _mean_variate(state: ServerState) -> dict[str, Float64]:
    """sum_k p_k times the variate of client k, over the whole population."""
    mass = state.slots[MASS]
    known = mass[mass != UNKNOWN]
    everybody = float(known.mean()) * len(mass) if known.any() else 1.0
    return {name: state.slots[TOTAL + name] / everybody for name in state.head}


def _keep(
    state: ServerState,
    updates: ClientUpdates,
    weighting: Weighting,
    own: Callable[[str, slice, Float32], npt.NDArray[np.floating]],
) -> Slots:
    """The slots with new variates for who answered.

    Args:
        own: new variates [b, ...] from a tensor's name, places among the updates and the variates
            before.
    """
    mass = state.slots[MASS].copy()
    mass[updates.clients] = updates.num_examples if weighting == "examples" else 1
    slots: Slots = {MASS: mass}
    for name in state.head:
        variates, total = state.slots[OWN + name].copy(), state.slots[TOTAL + name].copy()
        for first in range(0, len(updates.clients), BLOCK):
            part = slice(first, first + BLOCK)
            clients = updates.clients[part]
            before = variates[clients]
            variates[clients] = own(name, part, before)
            gained = variates[clients].astype(np.float64)
            gained -= before
            total += np.einsum("k,k...->...", mass[clients].astype(np.float64), gained)
        slots[OWN + name], slots[TOTAL + name] = variates, total
    return slots

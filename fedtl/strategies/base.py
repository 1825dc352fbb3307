"""What every strategy is: pure server mathematics, state in, state out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fedtl.errors import InputError
from fedtl.plans import Personal, RoundPlan
from fedtl.types import DOMAIN, ClientUpdates, Float64, Head, float32

Weighting = Literal["examples", "uniform"]


RESULT = "result."
"""Before the names of slots that hold a head to be judged and kept in place of the one sent."""


@dataclass(frozen=True)
class ServerState:
    """All a strategy remembers between rounds.

    Attributes:
        head: float32 tensors, exactly what clients receive.
        slots: a strategy's other tensors (float64, float32 or int64), by name; their shapes never
            change from ``init`` on, so that a commit can be checked against them. Bytes (uint8) may
            have any length.
    """

    head: Head
    slots: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    @property
    def result(self) -> Head:
        """The head that is judged and kept: slots ``result.<name>`` where a strategy has them.

        A classifier of domains is no part of it.
        """
        return {
            name: float32(self.slots[RESULT + name]) if RESULT + name in self.slots else tensor
            for name, tensor in self.head.items()
            if not name.startswith(DOMAIN)
        }


class Strategy(Protocol):
    """Combines what clients send. Pure: no hidden state, no input or output, no own randomness."""

    def init(self, head: Head, num_clients: int) -> ServerState:
        """The state before round 1, for a population of ``num_clients``."""
        ...

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """What clients shall do this round, from the round as the scenario has it."""
        ...

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """The next state from valid updates, sorted by client id; at least one."""
        ...

    def finished(self, state: ServerState) -> bool:
        """Whether another round could change nothing."""
        ...


class EveryRound:
    """A strategy that remembers nothing at first, changes no plan and never finishes, unless it
    says otherwise: what most of them have in common."""

    def init(self, head: Head, num_clients: int) -> ServerState:
        """Nothing but the head."""
        return ServerState(head)

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Clients train as the scenario says."""
        return plan

    def finished(self, state: ServerState) -> bool:
        """Never: it goes on for as many rounds as the scenario has."""
        return False


@runtime_checkable
class Summing(Strategy, Protocol):
    """A strategy whose clients send statistics, too large to be held all at once.

    The loop hands them over a few clients at a time, in the order of their ids, and then has the
    sums solved: ``step`` is ``solve`` of ``absorb``.
    """

    def absorb(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """Add some clients' statistics to the sums."""
        ...

    def solve(self, state: ServerState) -> ServerState:
        """The head that follows from the sums."""
        ...


def personal_of(strategy: Strategy, state: ServerState) -> Personal | None:
    """What each client makes of the last head for itself; None where all keep it as it is."""
    own = getattr(strategy, "personal", None)
    return own(state) if own is not None else None


def refuse_overshooting(strength: float, plan: RoundPlan, key: str) -> None:
    """A step that is pulled to more than twice its distance diverges, whatever the data.

    Args:
        key: of the strategy's section, for the error.

    Raises:
        InputError: such a pull to the shared head.
    """
    rate = plan.training.learning_rate
    pull = rate * (strength + plan.training.weight_decay)
    if pull >= 2:
        raise InputError(
            f"the pull to the shared head overshoots: learning rate times {key}",
            where=f"strategy.{key}",
            got=f"{strength:g}, times {rate:g} is {pull:.3g}",
            allowed="a product below 2",
            do=f"Lower strategy.{key} or training.learning_rate",
        )


def client_weights(updates: ClientUpdates, weighting: Weighting) -> Float64:
    """p_k: each client's weight in every average of the run, float64 [k], sums to 1."""
    if weighting == "uniform":
        return np.full(len(updates.clients), 1.0 / len(updates.clients))
    examples: Float64 = updates.num_examples.astype(np.float64)
    return np.asarray(examples / examples.sum())


def mean_delta(head: Head, updates: ClientUpdates, weights: Float64) -> dict[str, Float64]:
    """Delta = sum_k p_k (w_k - w), added in float64 in client order, one tensor per name.

    The order is fixed so that the sum has the same bits whatever order replies came in.
    """
    total: dict[str, Float64] = {}
    for name, start in head.items():
        base = start.astype(np.float64)
        acc = np.zeros_like(base)
        for weight, client_head in zip(weights.tolist(), updates.tensors[name], strict=True):
            acc += weight * (client_head - base)
        total[name] = acc
    return total


def moved(state: ServerState, step: Mapping[str, Float64]) -> Head:
    """The head after adding a float64 step, rounded once to float32."""
    return {name: float32(tensor + step[name]) for name, tensor in state.head.items()}

"""A closed-form head first, any other strategy from there on: ``head.initial``.

Round 1 asks for statistics and solves them; whoever does not answer in that round has no part in
the start. Every later round is the other strategy's own.

- ``fed3r``: Fanì et al. 2024 (arXiv 2406.01116), section 4.3: Fed3R as the initialiser of
  fine-tuning, columns normalised, temperature 0.1.
- ``class_means``: everybody's class means, from FedNCM's sums and counts. A prototype head begins
  at Snell et al. 2017 (1703.05175): each point the mean of its class, by the squared distance. A
  cosine head's weights are the means at length 1, and a linear head classifies by the nearest mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedtl.plans import Personal, RoundPlan
from fedtl.scenario import schema
from fedtl.strategies.base import ServerState, Strategy, Summing, personal_of
from fedtl.strategies.class_means import FedNCM, class_means
from fedtl.strategies.closed_form import Fed3R, Solved, Sums
from fedtl.types import ClientUpdates, Head, float32

FIRST, STARTED = "closed_form.", "closed_form_started"
START = STARTED + "."
"""Before the names of the start's tensors, kept to be judged; zeros until there is one."""


@dataclass(frozen=True)
class NearestMean(FedNCM):
    """<x, mu_c> - |mu_c|^2 / 2: minus half the squared distance, but for |x|^2 of all classes."""

    def solved(self, slots: Sums) -> Solved:
        """mu_c and -|mu_c|^2 / 2."""
        means = class_means(slots["sums"], slots["counts"])
        return Solved(means, -np.square(means).sum(axis=1) / 2)


def started_from(section: schema.Head, then: Strategy) -> Strategy:
    """The strategy, after a round that makes its start where the head's section wants one."""
    if not section.from_statistics:
        return then
    if section.initial == "fed3r":
        return WarmStart(Fed3R(), then)
    if section.kind == "linear":
        return WarmStart(NearestMean(), then)
    return WarmStart(FedNCM(normalise=section.kind == "cosine", temperature=1.0), then)


def start_of(state: ServerState) -> Head | None:
    """The head that a first round of statistics made; None where there was none."""
    if STARTED not in state.slots or not state.slots[STARTED][0]:
        return None
    slots = state.slots.items()
    return {n.removeprefix(START): float32(t) for n, t in slots if n.startswith(START)}


@dataclass(frozen=True)
class WarmStart:
    """``first`` for one round, then ``then`` from the head it found."""

    first: Summing
    then: Strategy

    def init(self, head: Head, num_clients: int) -> ServerState:
        """The slots of both; the other strategy's are made anew when its head is there."""
        sums = self.first.init(head, num_clients).slots
        slots = {FIRST + name: tensor for name, tensor in sums.items()}
        own = self.then.init(head, num_clients)
        begun = {START + name: np.zeros_like(tensor) for name, tensor in own.result.items()}
        counts = {STARTED: np.array([0, num_clients], np.int64)}
        return ServerState(head, {**slots, **own.slots, **begun, **counts})

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Statistics first."""
        if self._started(state):
            return self.then.plan(self._own(state), plan)
        return self.first.plan(self._sums(state), plan)

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """One round of whichever strategy is at it."""
        if not self._started(state):
            return self.solve(self.absorb(state, updates))
        own = self.then.step(self._own(state), updates)
        return ServerState(own.head, {**state.slots, **own.slots})

    def absorb(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """Add some clients' statistics."""
        sums = self.first.absorb(self._sums(state), updates).slots
        return replace(state, slots={**state.slots, **{FIRST + n: t for n, t in sums.items()}})

    def solve(self, state: ServerState) -> ServerState:
        """The closed-form head, as the other strategy's start; the sums are let go."""
        head = self.first.solve(self._sums(state)).head
        num_clients = int(state.slots[STARTED][1])
        own = self.then.init(head, num_clients)
        slots = {n: np.zeros_like(t) if n.startswith(FIRST) else t for n, t in state.slots.items()}
        begun = {START + name: tensor for name, tensor in own.result.items()}
        counts = {STARTED: np.array([1, num_clients], np.int64)}
        return ServerState(own.head, {**slots, **own.slots, **begun, **counts})

    def finished(self, state: ServerState) -> bool:
        """When the other strategy is."""
        return self._started(state) and self.then.finished(self._own(state))

    def personal(self, state: ServerState) -> Personal | None:
        """What the other strategy has clients do for themselves."""
        return personal_of(self.then, self._own(state))

    def _started(self, state: ServerState) -> bool:
        return bool(state.slots[STARTED][0])

    def _sums(self, state: ServerState) -> ServerState:
        kept = {n.removeprefix(FIRST): t for n, t in state.slots.items() if n.startswith(FIRST)}
        return replace(state, slots=kept)

    def _own(self, state: ServerState) -> ServerState:
        kept = {n: t for n, t in state.slots.items() if not n.startswith((FIRST, STARTED))}
        return replace(state, slots=kept)

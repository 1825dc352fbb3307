"""Any strategy, with a classifier of domains that travels and is averaged beside the head.

What clients do with it is in ``clients.adversarial``; it is no part of what is judged and kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedtl.clients.adversarial import with_domains
from fedtl.plans import Personal, RoundPlan
from fedtl.strategies.base import ServerState, Strategy, personal_of
from fedtl.types import ClientUpdates, Head


@dataclass(frozen=True)
class Adversarial:
    """``then`` on a head with a classifier of ``num_domains``; ``weight`` is DANN's lambda."""

    then: Strategy
    num_domains: int
    weight: float

    def init(self, head: Head, num_clients: int) -> ServerState:
        """The classifier starts at zero."""
        return self.then.init(with_domains(head, self.num_domains), num_clients)

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Clients train against it."""
        plan = self.then.plan(state, plan)
        return replace(plan, training=replace(plan.training, adversarial=self.weight))

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """The other strategy's, the classifier with the head."""
        return self.then.step(state, updates)

    def finished(self, state: ServerState) -> bool:
        """When the other strategy is."""
        return self.then.finished(state)

    def personal(self, state: ServerState) -> Personal | None:
        """What the other strategy has clients do for themselves."""
        return personal_of(self.then, state)

"""Any average of heads, while batch norm behind the cut stays with each client (FedBN).

Li et al. 2021 (arXiv 2102.07623), Algorithm 1: weights, biases and running statistics of batch norm
are trained at home, kept there and never sent; all else is averaged. There is no shared model then:
what is judged are the clients' own. A client that never took part trains its own at the end, on the
shared rest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedtl.plans import Personal, RoundPlan
from fedtl.strategies.base import ServerState, Strategy
from fedtl.types import ClientUpdates, Head

MEAN = ".running_mean"
"""How the name of one of a batch norm's tensors ends; all that begin alike are its own."""


def norms_of(head: Head) -> tuple[str, ...]:
    """The names of a head's tensors that belong to batch norm."""
    layers = tuple(name.removesuffix(MEAN) + "." for name in head if name.endswith(MEAN))
    return tuple(name for name in head if name.startswith(layers))


@dataclass(frozen=True)
class LocalNorms:
    """``then`` on all tensors but batch norm's, which stand in the head as at the start."""

    then: Strategy

    def init(self, head: Head, num_clients: int) -> ServerState:
        """The other strategy remembers nothing of what it will never see."""
        return replace(self.then.init(_shared(head), num_clients), head=head)

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Clients keep batch norm's tensors."""
        plan = self.then.plan(replace(state, head=_shared(state.head)), plan)
        return replace(plan, personal=self.personal(state))

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """The other strategy's, of what is shared."""
        stepped = self.then.step(replace(state, head=_shared(state.head)), updates)
        return replace(stepped, head={**state.head, **stepped.head})

    def finished(self, state: ServerState) -> bool:
        """When the other strategy is."""
        return self.then.finished(state)

    def personal(self, state: ServerState) -> Personal:
        """Batch norm's tensors stay."""
        return Personal("partial", local=norms_of(state.head))


def _shared(head: Head) -> Head:
    own = set(norms_of(head))
    return {name: tensor for name, tensor in head.items() if name not in own}

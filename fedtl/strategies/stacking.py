"""FLoRA: low-rank additions of all clients, summed exactly (Wang et al. 2024, arXiv 2409.05976).

Averages of factors are not the average of their products: mean(B) mean(A) != mean(B A). Stacked
factors are (section 3.2, equation 5): the server adds eta_g sum_k p_k scale B_k A_k to what all
clients' weights are given, and the next round starts with B = 0.

Deviations: the paper sends the stack itself and has clients add it up. Clients here remember
nothing, so each round they are given the sum of all rounds, as one matrix per layer; stacks of all
rounds would be larger after in * out / (r (in + out)) answers. A is drawn anew by the server, the
same for all clients, so that it is known what they start from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedtl.plans import RoundPlan
from fedtl.strategies.averaging import FedAvg
from fedtl.strategies.base import ServerState, client_weights
from fedtl.transfer.factors import SUM, A, B, layers, stacked, started
from fedtl.types import ClientUpdates, Head, float32


@dataclass(frozen=True)
class Stacking:
    """``then`` for all other tensors, and stacked factors.

    Attributes:
        then: FedAvg or FedProx.
        scale: alpha / r.
        seed: the scenario's, for fresh factors.
    """

    then: FedAvg
    scale: float
    seed: int

    def init(self, head: Head, num_clients: int) -> ServerState:
        """As it is given: B and the sum are zero."""
        return self.then.init(head, num_clients)

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """The other strategy's."""
        return self.then.plan(state, plan)

    def finished(self, state: ServerState) -> bool:
        """When the other strategy is."""
        return self.then.finished(state)

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """Adds the products to the sum, and draws new factors for the next round."""
        weights = client_weights(updates, self.then.weighting).tolist()
        rate, own = self.then.server_learning_rate, updates.tensors
        factors: dict[str, np.typing.NDArray[np.float32]] = {}
        for layer in layers(state.head):
            first, second, merged = layer + A, layer + B, layer + SUM
            product = stacked(weights, list(own[first]), list(own[second]), self.scale)
            shape = state.head[first].shape
            factors[first] = started(self.seed, layer, (shape[0], shape[1]), updates.round)
            factors[second] = np.zeros_like(state.head[second])
            factors[merged] = float32(state.head[merged] + rate * product)
        rest = {name: own for name, own in state.head.items() if name not in factors}
        stepped = self.then.step(replace(state, head=rest), updates)
        after = {**factors, **stepped.head}
        return replace(stepped, head={name: after[name] for name in state.head})

"""Personalised strategies: FedAvg of what is shared, and something of each client's own on top.

What is a client's own never comes here: the server adds up the tensors that clients send, and those
that stay with them stand in its head as they did at the start. What clients do is in
``clients.personal_training`` (in the rounds) and ``clients.personal`` (at the end), with equations
and deviations; here is only what they are told. Sources: FedPer (arXiv 1912.00818), LG-FedAvg
(2001.01523), FedRep (2102.07078), FedBABU (2106.06042), Ditto (2012.04221), pFedMe (2006.08848),
APFL (2003.13461), kNN-Per (2111.09360); the personal ridge head has no paper.

Deviations: Ditto's and pFedMe's pull is an explicit step, so eta lambda must be below 2; towards
the shared head itself comes who lets lambda grow with eta lambda = 1. FedBABU's last layer starts
random (uniform, +-1/sqrt(fan-in)) for an MLP head, as one of zeros would teach the layers below
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fedtl import seeding
from fedtl.plans import Personal, RoundPlan
from fedtl.strategies.averaging import FedAvg
from fedtl.strategies.base import ServerState, refuse_overshooting
from fedtl.strategies.closed_form import Fed3R
from fedtl.types import LAST, ClientUpdates, Float64, Head, Int64


def last_layer(head: Head) -> tuple[str, ...]:
    """The names of the tensors of a head's last layer; a linear head has no others."""
    return tuple(name for name in head if name in LAST)


@dataclass(frozen=True)
class Personalised(FedAvg):
    """FedAvg whose clients make something of their own of the last head."""

    def personal(self, state: ServerState) -> Personal:
        """What that is."""
        raise NotImplementedError


@dataclass(frozen=True)
class InRounds(Personalised):
    """A personalised strategy whose clients do something for themselves in every round."""

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Says what."""
        return replace(plan, personal=self.personal(state))

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """FedAvg of the tensors that were sent; the others stay."""
        sent = {n: tensor for n, tensor in state.head.items() if n in updates.tensors}
        stepped = super().step(replace(state, head=sent), updates)
        return replace(stepped, head={**state.head, **stepped.head})


@dataclass(frozen=True)
class FineTune(Personalised):
    """FedAvg, then each client trains the head on its own rows."""

    epochs: int = 5

    def personal(self, state: ServerState) -> Personal:
        """Fine-tuning of all layers."""
        return Personal("finetune", epochs=self.epochs)


@dataclass(frozen=True)
class FedPer(InRounds):
    """The hidden layers are shared, the last one is each client's own."""

    def personal(self, state: ServerState) -> Personal:
        """The last layer stays."""
        return Personal("partial", local=last_layer(state.head))


@dataclass(frozen=True)
class LGFedAvg(InRounds):
    """The last layer is shared, the hidden ones are each client's own."""

    def personal(self, state: ServerState) -> Personal:
        """The hidden layers stay."""
        return Personal("partial", local=tuple(n for n in state.head if n not in LAST))


@dataclass(frozen=True)
class FedRep(InRounds):
    """FedPer whose clients first train their own layer, then the shared ones below it."""

    head_epochs: int = 5

    def personal(self, state: ServerState) -> Personal:
        """The last layer stays."""
        return Personal("fedrep", local=last_layer(state.head), epochs=self.head_epochs)


@dataclass(frozen=True)
class FedBABU(InRounds):
    """The last layer is the same random one for all and is not trained; at the end all layers are.

    A linear head has no other layer: nothing is trained before the end.
    """

    epochs: int = 5
    seed: int = 0

    def init(self, head: Head, num_clients: int) -> ServerState:
        """Draws the last layer of an MLP head."""
        if len(last_layer(head)) == len(head):
            return super().init(head, num_clients)
        stream, bound = seeding.generator(self.seed, "fedbabu"), head["weight"].shape[1] ** -0.5
        drawn = {
            name: stream.uniform(-bound, bound, head[name].shape).astype(np.float32)
            for name in ("weight", "bias")
        }
        return super().init({**head, **drawn}, num_clients)

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Only hidden layers are trained and sent."""
        plan = super().plan(state, plan)
        return replace(plan, training=replace(plan.training, layers="hidden"))

    def personal(self, state: ServerState) -> Personal:
        """Fine-tuning of all layers at the end."""
        return Personal("fedbabu", local=last_layer(state.head), epochs=self.epochs)


@dataclass(frozen=True)
class Ditto(InRounds):
    """FedAvg; beside it each client trains a head of its own, pulled towards the shared one."""

    strength: float = 0.1
    epochs: int | None = None

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Says so. Raises InputError for a pull that would overshoot."""
        refuse_overshooting(self.strength, plan, "strength")
        return super().plan(state, plan)

    def personal(self, state: ServerState) -> Personal:
        """lambda; 0 epochs are as many as the shared head's."""
        return Personal("ditto", strength=self.strength, epochs=self.epochs or 0)


@dataclass(frozen=True)
class PFedMe(InRounds):
    """Clients send the w_k that their pulled theta led to; w <- (1 - beta) w + beta mean(w_k)."""

    strength: float = 15.0
    inner_steps: int = 5
    beta: float = 1.0

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Says so. Raises InputError for a pull that would overshoot."""
        refuse_overshooting(self.strength, plan, "strength")
        return super().plan(state, plan)

    def personal(self, state: ServerState) -> Personal:
        """lambda and K."""
        return Personal("pfedme", strength=self.strength, inner_steps=self.inner_steps)

    def _delta(self, state: ServerState, updates: ClientUpdates) -> dict[str, Float64]:
        return {name: self.beta * value for name, value in super()._delta(state, updates).items()}


@dataclass(frozen=True)
class APFL(InRounds):
    """FedAvg; beside it each client trains a mixture of the shared head and one of its own."""

    alpha: float = 0.5
    adaptive: bool = True

    def personal(self, state: ServerState) -> Personal:
        """alpha, fixed or as a start."""
        return Personal("apfl", alpha=self.alpha, adaptive=self.adaptive)


@dataclass(frozen=True)
class KnnPer(Personalised):
    """FedAvg, whose predictions each client mixes with the labels of its nearest examples."""

    neighbours: int = 10
    scale: float = 1.0
    weights: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8])

    def personal(self, state: ServerState) -> Personal:
        """k, the kernel's scale and the lambdas to choose from."""
        return Personal(
            "knnper",
            neighbours=self.neighbours,
            scale=self.scale,
            choices=tuple(self.weights),
        )


@dataclass(frozen=True)
class PersonalRidge(Fed3R):
    """Fed3R's ridge head, unnormalised; each client then goes some of the way to its own (F3)."""

    normalise: bool = False
    keep_statistics: bool = False
    pulls: list[float] = field(default_factory=lambda: [1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4])

    def personal(self, state: ServerState) -> Personal:
        """The rhos to choose from; ``scale`` is the temperature, ``local`` what is solved for."""
        local = LAST[:2] if self.bias else LAST[:1]
        return Personal("ridge", local=local, scale=self.temperature, choices=tuple(self.pulls))


def client_prior(counts: Int64) -> Personal:
    """Each client judges with its own class frequencies in place of everybody's.

    Args:
        counts: N_c, int64 [C], at least one example in all.
    """
    share = counts / counts.sum()
    logs = np.log(np.where(counts > 0, share, 1.0))  # as FedLDA's own bias has it
    return Personal("prior", choices=tuple(logs.tolist()))


def degenerate(name: str, head_kind: str, mode: str = "head") -> str | None:
    """Where, with a frozen trunk and a linear head, a strategy is the same as another; else None.

    Args:
        name: of the strategy, as in a scenario.
        head_kind: as in a scenario; only "mlp" has more than one layer.
        mode: ``transfer.mode``; what is trained behind a cut are layers below the head.
    """
    return None if head_kind == "mlp" or mode != "head" else _SAME.get(name)


_SAME = {
    "fedper": "With a frozen trunk and a linear head fedper shares nothing: each client trains "
    "alone. It needs an MLP head (head.kind) to be more than that.",
    "fedrep": "With a frozen trunk and a linear head fedrep shares nothing: each client trains "
    "alone, strategy.head_epochs epochs a round. It needs an MLP head (head.kind) to be more.",
    "lgfedavg": "With a frozen trunk and a linear head lgfedavg shares all of it: it is fedavg. It "
    "needs an MLP head (head.kind) to be more than that.",
    "fedbabu": "With a frozen trunk and a linear head fedbabu has nothing to train together: until "
    "the clients fine-tune at the end, the head stays as it was. It needs an MLP head (head.kind).",
}

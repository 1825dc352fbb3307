"""Any strategy of Flower's (``flwr.serverapp.strategy.Strategy``), unchanged, on any engine.

Flower's ``Strategy.start`` is replaced by our loop; ``configure_train`` and ``aggregate_train`` are
called as it would. What differs, each for a reason:

- The cohort is sampled by the scenario; the strategy sees its clients as all the nodes there are
  (node id = client id + 1) and may ask fewer. Its ``random`` and NumPy generators are seeded for
  each call, and replies come in the order of clients: the same bits on every engine.
- Minimum numbers of nodes that were left at Flower's default of 2 give way to a cohort of 1.
- The train config starts with ``lr``, ``local-epochs`` and ``batch-size`` of the scenario. What the
  strategy makes of these and of ``learning-rate`` and ``proximal-mu`` is done, the same for every
  client of a round; all other keys are ignored. It is kept from round to round, as in Flower.
- Clients that failed are absent from the replies. A reply's metrics are the number of examples,
  also under ``weighted_by_key``, and ``train_loss`` (or ``train_loss_key``): the mean over the
  first local epoch, or, for a strategy with a ``train_loss_key``, the loss before training.
- Heads are float32: what a strategy gives in float64 (FedAdam, q-FedAvg) is rounded once a round.
- Evaluation is the loop's: ``configure_evaluate`` and ``aggregate_evaluate`` are never called.
- What an instance remembers is read off it after each call and put back before the next, so that a
  run can be resumed; globals and class attributes are not seen. A round below its quorum leaves no
  trace in it.

A class given by its path is imported, and importing runs code: a scenario is to be read before it
is run, like any program. With real clients only the server imports it. The code is no part of
the scenario's hash: do not change it between a run and its resumption.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtl import seeding
from fedtl.errors import InputError
from fedtl.plans import RoundPlan
from fedtl.strategies.base import ServerState
from fedtl.types import ClientUpdates, Head, LocalTraining

if TYPE_CHECKING:  # importing Flower takes a second
    from flwr.serverapp.strategy import Strategy

    from fedtl.strategies.flower_state import UInt8

SLOT = "flower.state"
"""Everything the instance remembers; the one slot whose length varies."""

CONFIG, OFFERED = "train config", "offered config"
"""Kept beside the attributes; no attribute has such a name."""

MINIMA = ("min_train_nodes", "min_available_nodes")


@dataclass(frozen=True)
class FlowerStrategy:
    """A strategy of Flower's as one of ours.

    Args:
        class_: a name of ``flwr.serverapp.strategy``, ``module:Class`` or ``package.module.Class``.
        parameters: its constructor's keyword arguments.
        seed: the scenario's.

    Raises:
        InputError: no such class, one that cannot run here, wrong parameters, or an attribute that
            cannot be committed and restored.
    """

    class_: str
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    # What ``configure_train`` left in the instance, until the round's ``step``: it depends on the
    # whole cohort, of which a step sees only those that were asked.
    _planned: dict[bytes, UInt8] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        self.init({}, 0)

    def init(self, head: Head, num_clients: int) -> ServerState:
        """The instance as its constructor left it."""
        return ServerState(head, {SLOT: self._packed({**self._made, CONFIG: {}, OFFERED: {}})})

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """``configure_train``: which of the cohort train, and with what hyper-parameters.

        Raises:
            InputError: the strategy fails, waits for more clients than there are, or asks for
                something that clients here do not do.
        """
        memory, planned = self._configured(state, plan)
        self._planned.clear()
        self._planned[_digest(state, plan.round)] = memory
        return planned

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """``aggregate_train``; where it gives nothing, the head stays.

        Raises:
            InputError: the strategy fails, or gives another head or values that are not finite.
        """
        from fedtl.strategies.flower_calls import calling, head_of, replies

        memory = self._planned.get(_digest(state, updates.round))
        if memory is None:  # nobody planned this round: all who were asked are its cohort
            memory, _ = self._configured(state, _plan_of(updates))
        strategy, kept = self._restored(memory)
        key = seeding.key(self.seed, "flower", updates.round, 1)
        with calling(f"{self._name}.aggregate_train", key, f"round {updates.round}"):
            messages = replies(
                updates,
                list(state.head),
                updates.clients + 1,
                str(getattr(strategy, "arrayrecord_key", "arrays")),
                str(getattr(strategy, "weighted_by_key", "num-examples")),
                str(getattr(strategy, "train_loss_key", "train_loss")),
            )
            arrays, _ = strategy.aggregate_train(updates.round, messages)
            head = state.head
            if arrays is not None:
                head = head_of(arrays, state.head, self._name, updates.round)
        return ServerState(head, {SLOT: self._packed({**vars(strategy), **kept})})

    def finished(self, state: ServerState) -> bool:
        """Never: Flower's strategies run for as many rounds as they are told."""
        return False

    def _configured(self, state: ServerState, plan: RoundPlan) -> tuple[UInt8, RoundPlan]:
        """What the instance remembers after ``configure_train``, and the plan it makes."""
        from fedtl.strategies.flower_calls import (
            Cohort,
            calling,
            changed_training,
            config_record,
            read_messages,
            record_of,
        )

        strategy, kept = self._restored(state.slots[SLOT])
        self._fit(strategy, len(plan.clients), plan.round)
        training = plan.training
        offered = {
            "lr": training.learning_rate,
            "local-epochs": training.epochs,
            "batch-size": training.batch_size,
        }
        before = kept[OFFERED]
        own = {k: v for k, v in kept[CONFIG].items() if k not in before or v != before[k]}
        config = config_record({**offered, **own})
        arrays = record_of(state.head)
        nodes = (plan.clients + 1).tolist()
        key = seeding.key(self.seed, "flower", plan.round, 0)
        with calling(f"{self._name}.configure_train", key, f"round {plan.round}"):
            sent = strategy.configure_train(plan.round, arrays, config, Cohort(nodes))
            asked = read_messages(sent, arrays, nodes, self._name, plan.round)
        wanted = list(asked.values())
        if any(one != wanted[0] for one in wanted):
            raise InputError(
                f"{self._name}.configure_train gives clients different hyper-parameters",
                where=f"round {plan.round}",
                allowed="the same for every client of a round",
            )
        changes = {k: v for one in wanted[:1] for k, v in one.items() if offered.get(k) != v}
        memory = {**vars(strategy), CONFIG: dict(config), OFFERED: offered}
        chosen = plan.part(np.isin(plan.clients + 1, list(asked)))
        training = changed_training(training, changes, self._name, plan.round)
        loss_before = hasattr(strategy, "train_loss_key")
        return self._packed(memory), replace(
            chosen, training=training, reports=("start_loss",) if loss_before else plan.reports
        )

    def _fit(self, strategy: Strategy, clients: int, round: int) -> None:
        """Flower would wait for ever for nodes that a round does not have."""
        for name in MINIMA:
            value = getattr(strategy, name, None)
            if value == 2 and name not in self.parameters:
                setattr(strategy, name, min(2, clients))
            elif isinstance(value, int) and value > clients:
                raise InputError(
                    f"{self._name} waits for more clients than a round has",
                    where=f"strategy.parameters.{name}, round {round}",
                    got=value,
                    allowed=f"at most {clients}",
                    do="Lower it, or raise clients.fraction",
                )

    @property
    def _name(self) -> str:
        return type(self._instance).__name__

    @cached_property
    def _instance(self) -> Strategy:
        """Its attributes are put back before each use."""
        from fedtl.strategies.flower_calls import calling, find_class, make_instance

        kind = find_class(self.class_)
        key = seeding.key(self.seed, "flower", 0, 0)
        with calling(f"{kind.__name__}'s constructor", key, "strategy.parameters"):
            return make_instance(kind, copy.deepcopy(self.parameters))

    @cached_property
    def _made(self) -> dict[str, Any]:
        """The attributes as the constructor left them; only what is never changed is used."""
        return dict(vars(self._instance))

    def _packed(self, attributes: dict[str, Any]) -> UInt8:
        from fedtl.strategies.flower_state import pack_attributes

        return pack_attributes(self._name, attributes, self._made)

    def _restored(self, memory: UInt8) -> tuple[Strategy, dict[str, Any]]:
        """The instance as it was, and what is kept beside its attributes."""
        from fedtl.strategies.flower_state import unpack_attributes

        attributes = unpack_attributes(self._name, memory, self._made)
        kept = {name: attributes.pop(name) for name in (CONFIG, OFFERED)}
        vars(self._instance).clear()
        vars(self._instance).update(attributes)
        return self._instance, kept


def _plan_of(updates: ClientUpdates) -> RoundPlan:
    """A round as its answers show it."""
    failed = [failure.client for failure in updates.failures]
    clients = np.sort(np.concatenate([updates.clients, np.array(failed, np.int64)]))
    training = updates.training or LocalTraining(1, 1, 1.0)
    return RoundPlan(updates.round, clients, np.zeros(len(clients), np.uint64), training)


def _digest(state: ServerState, round: int) -> bytes:
    """Tells one round's beginning from every other."""
    digest = hashlib.blake2b(str(round).encode())
    for tensor in (*state.head.values(), *state.slots.values()):
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.digest()

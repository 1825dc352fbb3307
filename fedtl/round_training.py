"""What comes of a round's clients: updates, statistics, or one sum in secret.

Every answer is looked at before any of it counts. The loop (``rounds``) decides what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fedtl.clients.attacks import lie
from fedtl.clients.compression import expand
from fedtl.engines.base import Engine
from fedtl.errors import PolicyStop
from fedtl.planning import absent_clients, first_answers, liars_of
from fedtl.plans import RoundPlan, no_updates
from fedtl.privacy.promise import Promise
from fedtl.privacy.secure_sum import SecureSum
from fedtl.results.runs import RunFolder
from fedtl.results.statistics import KEPT_BYTES, keep_statistics
from fedtl.scenario.schema import Scenario
from fedtl.secure_rounds import empty_sum, joined, sum_in_secret
from fedtl.spending import Spending
from fedtl.strategies.base import ServerState, Strategy, Summing
from fedtl.strategies.private import Private
from fedtl.strategies.validation import accept_updates
from fedtl.types import ClientFailure, ClientUpdates, Float64, Head, Roster

WAVE_BYTES = 2**23
"""Statistics of clients that are held at once; a single client's may be larger."""


@dataclass(frozen=True)
class Federation:
    """Everything the loop needs, ready made.

    Attributes:
        roster: who takes part; their data are the engine's business.
        identity: what must not change between a run and its resumption (scenario hash, data
            fingerprint, features' key, versions), JSON values.
        promise: of differential privacy; None promises nothing.
        secure: makes a round's secure sum, where clients are summed in secret.
        noise: where it comes from: the seed in simulation, the operating system elsewhere.
    """

    scenario: Scenario
    roster: Roster
    head: Head
    strategy: Strategy
    engine: Engine
    identity: Mapping[str, Any]
    promise: Promise | None = None
    secure: Callable[[RoundPlan, Head], SecureSum] | None = None
    noise: Literal["seeded", "system"] = "seeded"


@dataclass(frozen=True)
class Trained:
    """What came of a round's clients.

    Attributes:
        after: takes the state over the round, with the strategy as it is given its noise; None
            where a secure sum was given up.
        updates: the valid ones, of statistics and secret sums without what was sent.
        norms: of the updates, float64 [k]; NaN where they are not known.
        dropouts: clients that went missing in a secure sum.
    """

    after: Callable[[Strategy], ServerState] | None
    updates: ClientUpdates
    norms: Float64
    dropouts: int = 0


def train_round(
    federation: Federation,
    folder: RunFolder,
    plan: RoundPlan,
    state: ServerState,
    spending: Spending,
) -> Trained:
    """What takes the state over the round, the valid updates and their norms.

    Statistics come a few clients at a time and are summed at once: they are too large to be held
    together. Those that a strategy wants kept go to disk, one file per client.
    """
    strategy = federation.strategy
    sums = plan.task == "statistics" and isinstance(strategy, Summing)
    if plan.protection is not None and plan.protection.ring_bits:
        return _summed_in_secret(federation, plan, state, spending)
    if not sums:
        updates, norms = _answers(federation, plan, state.head)
        return Trained(lambda noised: noised.step(state, updates), updates, norms)
    assert isinstance(strategy, Summing)
    parts: list[ClientUpdates] = []
    summed = state
    at_a_time = _at_a_time(federation, plan, state.head)
    everybody = plan.up_bytes(state.head) * federation.roster.num_clients
    keeps = getattr(strategy, "keep_statistics", False) and everybody <= KEPT_BYTES
    for wave in plan.waves(at_a_time):
        updates, _ = _answers(federation, wave, state.head, whole=False)
        if len(updates.clients):
            summed = strategy.absorb(summed, updates)
            if keeps:
                keep_statistics(folder.path, updates, federation.roster.names)
        parts.append(replace(updates, tensors={}))
        del updates  # or two waves would be held at once
    updates = joined(plan, parts)
    return Trained(lambda noised: _solved(noised, summed), updates, _unknown(updates))


def _summed_in_secret(
    federation: Federation, plan: RoundPlan, state: ServerState, spending: Spending
) -> Trained:
    """The same where the server learns nothing but the sum."""
    statistics = plan.task == "statistics"
    if len(plan.clients):
        assert federation.secure is not None
        found = sum_in_secret(
            federation.secure(plan, state.head),
            plan,
            state.head,
            lambda wave: _answers(federation, wave, state.head, whole=not statistics)[0],
            _at_a_time(federation, plan, state.head) if statistics else len(plan.clients),
            spending.release,
        )
    else:
        found = empty_sum(plan, state.head)
    updates, total = found.updates, found.total

    def after(noised: Strategy) -> ServerState:
        assert total is not None
        if not statistics:
            assert isinstance(noised, Private)
            return noised.step_sum(state, total, found.weight, plan)
        assert isinstance(noised, Summing)
        one = {name: tensor[None] for name, tensor in total.items()}
        return noised.solve(noised.absorb(state, replace(updates, tensors=one)))

    step = after if total is not None else None
    return Trained(step, updates, _unknown(updates), found.dropouts)


def _solved(noised: Strategy, summed: ServerState) -> ServerState:
    assert isinstance(noised, Summing)
    return noised.solve(summed)


def _unknown(updates: ClientUpdates) -> Float64:
    """Norms of updates that were not seen."""
    return np.full(len(updates.clients), np.nan)


def _at_a_time(federation: Federation, plan: RoundPlan, head: Head) -> int:
    """Clients whose statistics are held together."""
    held: int = getattr(federation.engine, "held_bytes", WAVE_BYTES)
    return max(1, held // plan.up_bytes(head))


def _answers(
    federation: Federation, plan: RoundPlan, head: Head, *, whole: bool = True
) -> tuple[ClientUpdates, Float64]:
    """The round's valid updates, with a failure for each planned client that has none.

    Args:
        whole: they are all that counts; else, that nobody's can be used stops nothing.
    """
    scenario, roster = federation.scenario, federation.roster
    absent = absent_clients(scenario, roster.names, plan.round)
    asked = plan.without(absent)
    replies = list(federation.engine.run_clients(asked, head)) if len(asked.clients) else []
    answered = {client for reply in replies for client in reply.clients.tolist()}
    if left := set(plan.clients.tolist()) & set(absent.tolist()):
        away = tuple(ClientFailure(client, "absent, as the scenario has it") for client in left)
        replies.append(no_updates(plan, head, away))
    unpacked = replace(plan, compression=None)
    if plan.reply(head) != unpacked.reply(head):  # in a ring clients unpack themselves
        replies = [expand(reply, head, plan) for reply in replies]
    lying = liars_of(scenario, roster.names)
    replies = lie(replies, unpacked, head, scenario.attack, lying, scenario.seed)
    ratio = scenario.validation.max_norm_ratio
    if scenario.privacy.mechanism == "central":  # nobody's part may hang on the others' lengths
        ratio = float("inf")
    updates, norms = accept_updates(replies, unpacked, head, roster.train, ratio)
    useless = len(updates.clients) == 0 and answered >= set(asked.clients.tolist())
    if whole and useless and answered:
        raise PolicyStop(
            f"no update of round {plan.round} could be used, that of "
            f"{roster.names[updates.failures[0].client]} because {updates.failures[0].reason}; "
            f"{plan.round - 1} rounds are kept",
            do="The training diverged or the data are broken: lower training.learning_rate",
        )
    return first_answers(updates, norms, plan, scenario.seed)

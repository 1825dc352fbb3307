"""A round whose clients are summed in secret: the loop learns the sum and who is in it.

Answers come in waves, each of which is added at once, so that a single client's is held no longer
than needed. Too few survivors, and the round has no sum: the model stays, nothing is charged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.plans import RING, RoundPlan
from fedtl.privacy.ring import Ring, to_values
from fedtl.privacy.secure_graph import asked_neighbours
from fedtl.privacy.secure_sum import PlainSum, SecureAbort, SecureSum
from fedtl.scenario.schema import Scenario
from fedtl.strategies import secure_ring
from fedtl.types import ClientFailure, ClientUpdates, Float64, Head, Int64


@dataclass(frozen=True)
class SecretSum:
    """What a round's secure sum came to.

    Attributes:
        total: by the names of ``plan.plain_reply``, each tensor the survivors' weighted sum
            (counts: int64); None where the round was given up.
        weight: of the survivors together.
        updates: who answered, without what they sent; nobody where the round was given up.
        dropouts: clients that were asked and are not in the sum.
    """

    total: Mapping[str, npt.NDArray[Any]] | None
    weight: float
    updates: ClientUpdates
    dropouts: int


Answers = Callable[[RoundPlan], ClientUpdates]
"""The valid answers of a plan's clients, with a failure for each that has none."""


def sum_in_secret(
    secure: SecureSum,
    plan: RoundPlan,
    head: Head,
    answers: Answers,
    at_a_time: int,
    before: Callable[[], None],
) -> SecretSum:
    """One round's sum.

    Args:
        secure: the sum, not yet begun.
        plan: the round, with its protection.
        head: the round's.
        answers: asks clients; called with parts of the plan.
        at_a_time: clients whose answers are held together.
        before: called when enough have answered, before their sum is seen.
    """
    parts: list[ClientUpdates] = []
    try:
        agreed = secure.begin()
        parts.append(_silent(plan, np.setdiff1d(plan.clients, agreed), secure.failures))
        here = plan.part(np.isin(plan.clients, agreed))
        for wave in here.waves(at_a_time):
            updates = answers(wave)
            if len(updates.clients):
                secure.add(updates.clients, updates.tensors[RING])
            parts.append(replace(updates, tensors={}))
        answered = joined(plan, parts)
        if len(answered.clients) >= secure.facts["threshold"]:
            before()
        total, survivors = secure.finish()
    except SecureAbort as abort:
        return _given_up(plan, parts, abort, secure.failures)
    assert np.array_equal(survivors, answered.clients), "the sum is of those who answered"
    weight = float(len(survivors))
    if plan.weights is not None:
        weight = float(plan.weights[np.isin(plan.clients, survivors)].sum())
    return SecretSum(_tensors(total, plan, head), weight, answered, int(secure.facts["dropouts"]))


def joined(plan: RoundPlan, parts: Sequence[ClientUpdates]) -> ClientUpdates:
    """Who answered in all the waves, without what they sent."""
    return ClientUpdates(
        plan.round,
        np.concatenate([p.clients for p in parts] or [np.empty(0, np.int64)]),
        {},
        np.concatenate([p.num_examples for p in parts] or [np.empty(0, np.int64)]),
        np.concatenate([p.loss for p in parts] or [np.empty(0)]),
        tuple(failure for p in parts for failure in p.failures),
        plan.training,
    )


def empty_sum(plan: RoundPlan, head: Head) -> SecretSum:
    """The sum of a round that nobody was asked in."""
    shapes = replace(plan, compression=None).plain_reply(head)
    total = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    return SecretSum(total, 0.0, joined(plan, []), 0)


def _given_up(
    plan: RoundPlan,
    parts: Sequence[ClientUpdates],
    abort: SecureAbort,
    why: Mapping[int, str],
) -> SecretSum:
    """Nobody is in the round, those that failed by themselves for their own reason."""
    answered = joined(plan, parts)
    own = {**why, **{failure.client: failure.reason for failure in answered.failures}}
    reason = f"the round has no secure sum: {abort.reason}"
    failures = tuple(ClientFailure(k, own.get(k, reason)) for k in plan.clients.tolist())
    dropouts = len(plan.clients) - len(answered.clients)
    return SecretSum(None, 0.0, replace(joined(plan, []), failures=failures), dropouts)


def _silent(plan: RoundPlan, clients: Int64, why: Mapping[int, str]) -> ClientUpdates:
    """Who fell out before anything was asked of it."""
    reason = "it did not agree on keys for the secure sum"
    failures = tuple(ClientFailure(k, why.get(k, reason)) for k in clients.tolist())
    return replace(joined(plan, []), failures=failures)


def _tensors(total: Ring, plan: RoundPlan, head: Head) -> dict[str, npt.NDArray[Any]]:
    """The ring's entries as real numbers (whole ones where they were), tensor by tensor."""
    own = plan.protection
    assert own is not None
    values: Float64 = to_values(total, own.scale, own.ring_bits)
    shapes = replace(plan, compression=None).plain_reply(head)
    exact = not (own.clip or own.noise)  # else no count is whole
    found, first = {}, 0
    for name in sorted(shapes):
        shape, dtype = shapes[name]
        part = values[first : first + prod(shape)].reshape(shape)
        found[name] = np.rint(part).astype(dtype) if dtype.kind == "i" and exact else part
        first += part.size
    return found


def simulated_sums(
    scenario: Scenario, examples: Int64
) -> Callable[[RoundPlan, Head], SecureSum] | None:
    """Makes the secure sum of a simulated round: its arithmetic, or the whole protocol.

    Args:
        examples: that each client trains on, int64 [K].
    """
    ring, section = secure_ring(scenario, examples), scenario.privacy
    if ring is None:
        return None

    def make(plan: RoundPlan, head: Head) -> SecureSum:
        assert plan.protection is not None
        ((size,), _), bits = plan.reply(head)[RING], plan.protection.ring_bits
        clients, least = plan.clients, ring.least(len(plan.clients))
        if not plan.protection.masked:
            return PlainSum(clients, least, size, bits)
        from fedtl.privacy.secure_simulation import SimulatedSum

        neighbours = asked_neighbours(section, len(clients))
        return SimulatedSum(
            clients, least, neighbours, bits,
            size=size, run=scenario.hash(), round=plan.round, seed=scenario.seed,
        )  # fmt: skip

    return make

"""What a server promises real clients, and how it sums them in secret.

The client's end of it is ``pledge``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from typing import Any

from fedtl.engines.masking import CarriedSum, Carrying
from fedtl.plans import RoundPlan
from fedtl.privacy.promise import Promise, make_promise
from fedtl.privacy.secure_graph import asked_neighbours
from fedtl.privacy.secure_sum import SecureSum
from fedtl.scenario.schema import Scenario
from fedtl.strategies import secure_ring
from fedtl.strategies.base import Strategy
from fedtl.strategies.private import Private
from fedtl.strategies.private_release import PrivateRelease
from fedtl.types import Head, Roster

KNOWN = (
    "the server is told each client's classes and how many examples it has: these are no part of "
    "the promise"
)
NOT_HIDDEN = (
    "who takes part in a round follows from the scenario's seed, which the clients are told: what "
    "is gained by sampling counts against those who see the result, not against clients"
)


def promise_to(scenario: Scenario, roster: Roster) -> Promise | None:
    """The scenario's promise, with what else it rests on where clients are real."""
    promise = make_promise(scenario, roster)
    if promise is None:
        return None
    more = [KNOWN, *([NOT_HIDDEN] if promise.sampling in ("poisson", "fixed") else [])]
    return replace(promise, assumptions=(*promise.assumptions, *more))


def settlement(promise: Promise, strategy: Strategy) -> dict[str, Any]:
    """What clients are told once everybody has gathered; see ``pledge.Pledge``.

    Args:
        strategy: the run's, under the promise.
    """
    return {
        "noise_multiplier": promise.noise_multiplier,
        "client_noise": _client_noise(promise, strategy),
        "epsilon": promise.epsilon_after(promise.rounds),
    }


def _client_noise(promise: Promise, strategy: Strategy) -> float:
    """See ``pledge.Pledge``: the least that any round's plan may ask a client for."""
    if promise.mechanism in ("local", "example"):
        return promise.noise_multiplier
    if not isinstance(strategy, Private) or strategy.ring is None:
        return 0.0
    ring, release = strategy.ring, strategy.then
    if isinstance(release, PrivateRelease):
        bound = promise.clip if promise.unit == "client" else 1.0
        return release.deviation / bound / sqrt(ring.least(promise.population))
    assert strategy.central is not None, "its noise is central"
    return strategy.central.deviation / sqrt(ring.threshold * promise.population)


Sums = Callable[[RoundPlan, Head], SecureSum]
"""Makes a round's secure sum."""

Tell = Callable[[int, int, str], None]
"""Told (round, client, what it did) of who broke the rules of a secure sum."""


def carried_sums(
    scenario: Scenario, roster: Roster, engine: Carrying, run: str, tell: Tell
) -> Sums | None:
    """The sums of real clients; None where they are not summed in secret.

    Args:
        engine: reaches the clients.
        run: names the run.
    """
    ring, section = secure_ring(scenario, roster.train), scenario.privacy
    if ring is None:
        return None

    def make(plan: RoundPlan, head: Head) -> SecureSum:
        asked = len(plan.clients)
        return CarriedSum(
            engine,
            plan,
            head,
            ring.least(asked),
            asked_neighbours(section, asked),
            run=run,
            tell=lambda client, what: tell(plan.round, client, what),
        )

    return make

"""The promise in words: whose data, what else has to hold, what to be warned of."""

from __future__ import annotations

from collections.abc import Iterator

from fedtl.scenario.privacy import unit_of
from fedtl.scenario.schema import Scenario
from fedtl.types import Int64

UNITS = {"client": "all the data of one client", "example": "one training example of one client"}
"""Whose presence stays hidden, by unit."""


def assumptions_of(scenario: Scenario, unit: str, sampling: str) -> tuple[str, ...]:
    """What the figures rest on, in sentences."""
    return tuple(_assumptions(scenario, unit, sampling))


def _assumptions(scenario: Scenario, unit: str, sampling: str) -> Iterator[str]:
    asked = scenario.privacy
    if sampling == "fixed":
        yield f"neighbours: {UNITS[unit]} in another's place"
    elif sampling == "cyclic":
        yield f"neighbours: {UNITS[unit]}, or nothing in its turn"
    elif asked.mechanism == "local":
        yield "neighbours: any other data of one client"
    else:
        yield f"neighbours: {UNITS[unit]} more or less"
    if asked.mechanism in ("central", "release"):
        yield (
            "clients clip, and add their share of the noise, as they were told"
            if asked.secure_aggregation != "none"
            else "the server sees what clients send, and adds the noise: it is trusted with both"
        )
    if sampling in ("poisson", "fixed"):
        how = "by a coin each" if sampling == "poisson" else "without replacement"
        yield (
            f"who takes part in a round, drawn {how} from the scenario's seed, stays secret, and "
            "so does the seed"
        )
    if asked.secure_aggregation == "arithmetic":
        yield "the clients mask what they send; here only the arithmetic of that is run"
    if unit_of(asked) == "example":
        yield "how many examples each client has is public"
    if asked.mechanism == "example":
        yield "batches are drawn by a coin for each example, and stay secret"
    if asked.mechanism == "local":
        yield "how many examples each client has is known to the server"
    if scenario.adaptation.features == "none" and asked.mechanism == "release":
        yield "which classes there are is public"
    yield "what the shared head is judged on, metrics and references, is outside of the promise"
    yield "heads that clients keep for themselves are outside of the promise: they stay at home"


def notes_of(scenario: Scenario, unit: str, noise: float, sizes: Int64) -> tuple[str, ...]:
    """What a user should know before relying on it, in sentences."""
    return tuple(_notes(scenario, unit, noise, sizes))


def _notes(scenario: Scenario, unit: str, noise: float, sizes: Int64) -> Iterator[str]:
    asked = scenario.privacy
    if noise == 0:
        yield "there is no noise, so nothing is promised"
    if len(sizes) == 1:
        yield "there is one client: what is learned is learned from it alone"
    if unit == "client":
        among, what = len(sizes), "clients"
    elif asked.mechanism == "release":
        among, what = int(sizes.sum()), "examples"
    else:
        among = int(sizes[sizes > 0].min()) if (sizes > 0).any() else 0
        what = "examples of the smallest client"
    if among and asked.delta >= 1 / among:
        yield (
            f"delta = {asked.delta:g} is not below one over the {what} (1/{among:,} = "
            f"{1 / among:.2g}): giving one of them away in full would be within it"
        )

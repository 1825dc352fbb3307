"""What a secure sum can carry, and why the rest does not go with it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario
from fedtl.scenario.strategies import CLOSED_FORMS

NEEDS_SINGLE = {
    **dict.fromkeys(("krum", "multikrum", "bulyan"), "compares single updates with each other"),
    **dict.fromkeys(("median", "trimmed_mean"), "sorts single updates"),
    **dict.fromkeys(("geometric_median", "fltrust"), "weighs single updates"),
    "norm_clip": "measures single updates",
    "fedexp": "measures single updates",
    "fednova": "divides each update by its client's number of steps",
    **dict.fromkeys(("scaffold", "feddyn"), "keeps a variate of each client, from its own update"),
    "qfedavg": "weighs single updates by their clients' losses",
    "mime": "needs each client's gradient beside its update",
    "lbfgs": "needs exact gradients",
    "fedcof": "needs the class means of single clients",
    "flower": "may do anything with single updates",
}
"""Strategies that a noisy or masked sum is not enough for, and why."""

KNOWS_OTHERS = ("inner_product", "alie", "min_max")
"""Attacks that are made of the honest clients' updates."""


def secure_sums(scenario: Scenario) -> Iterator[Problem]:
    """What a server that sees the sum alone cannot do."""
    asked, name = scenario.privacy, scenario.strategy.name
    kind = asked.secure_aggregation
    if kind == "none":
        return
    if asked.mechanism != "central" and name in NEEDS_SINGLE:
        yield Problem(
            "strategy.name",
            f"under secure aggregation the server sees the sum alone: it {NEEDS_SINGLE[name]}",
            f'"{name}"',
            do='Use "fedavg" or another that averages, or a closed form of sums',
        )
    if asked.adaptive_clip:
        yield Problem(
            "privacy.adaptive_clip",
            "the count of updates inside the clip is no part of the secure sum",
            "true",
            "false",
        )
    if scenario.attack.kind in ("sign_flip", "gaussian", *KNOWS_OTHERS):
        yield Problem(
            "attack.kind",
            "what liars send would have to be put under masks again",
            repr(scenario.attack.kind),
            "label_flip, backdoor",
        )
    if name in CLOSED_FORMS and scenario.clients.fraction < 1:
        yield Problem(
            "clients.fraction",
            "each client sends its statistics once, and a last one that had not would be alone in "
            "its sum",
            f"{scenario.clients.fraction:g}",
            "1",
        )
    by_examples = getattr(scenario.strategy, "weighting", "uniform") == "examples"
    if asked.canaries and asked.unit == "client" and asked.mechanism == "none" and by_examples:
        yield Problem(
            "strategy.weighting",
            "a canary that is left out has no examples, and so no weight in the sum",
            '"examples"',
            '"uniform"',
        )
    if kind != "arithmetic" and asked.threshold <= 0.5:
        yield Problem(
            "privacy.threshold",
            "with half of the clients or fewer the server could unmask two sums of one round",
            f"{asked.threshold:g}",
            "above 0.5",
        )
    if scenario.clients.num is not None:
        yield from secure_cohort(scenario, scenario.clients.num)


def secure_cohort(scenario: Scenario, num_clients: int) -> Iterator[Problem]:
    """What is wrong with a round's clients once their number is known."""
    asked = scenario.privacy
    if asked.secure_aggregation == "none":
        return
    cohort = max(1, math.floor(scenario.clients.fraction * num_clients + 0.5))
    if cohort < 2:
        yield Problem(
            "privacy.secure_aggregation",
            "the sum of one client is that client's",
            f"{cohort} client a round",
            "at least 2",
        )
    elif asked.neighbours is not None and asked.neighbours >= cohort:
        yield Problem(
            "privacy.neighbours",
            "are more than there are other clients in a round",
            str(asked.neighbours),
            f"1 to {cohort - 1}",
            'Or set privacy.secure_aggregation = "secagg", where all share masks with all',
        )

"""What a server says will be done to protect a client's answers, told in words and kept to.

The client hears of it twice. When it joins: what the scenario asks for. When everybody has
gathered: how much noise that takes, and epsilon, as the server computes it. After that it refuses
every request that would protect less. What the server does with what it is sent (noise it adds to a
sum it sees) cannot be seen from here, and the words say so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from fedtl.errors import InputError, SecurityRefusal
from fedtl.plans import Protection, RoundPlan
from fedtl.scenario.privacy import Privacy, unit_of
from fedtl.scenario.schema import Scenario

SECAGG, DP = "secagg", "dp"

DEMANDS: Mapping[str, str] = {
    SECAGG: "secure aggregation",
    DP: "differential privacy with an epsilon",
}
"""What a client can insist on."""

MASKS = ("secagg", "secagg_plus")
AT_CLIENTS = ("local", "example")
"""Mechanisms whose noise is added at the clients, masks or not."""

ROUNDING = 1e-6
"""Relative: as much as numbers that were computed elsewhere may differ."""

UNITS: Mapping[str, str] = {"client": "whole clients", "example": "single examples"}


@dataclass(frozen=True)
class Pledge:
    """What the server said.

    Attributes:
        asked: the scenario's section on privacy.
        rounds: at most so many answers are asked for.
        settled: whether the numbers below were told.
        noise_multiplier: deviation of the noise in a sum over its sensitivity.
        client_noise: least deviation of what is added to one answer here, over its bound (of
            statistics of rows that are divided by theirs, over 1); 0 where the server adds it.
        epsilon: of the whole run as planned; None where nothing is promised.
    """

    asked: Privacy
    rounds: int
    settled: bool = False
    noise_multiplier: float = 0.0
    client_noise: float = 0.0
    epsilon: float | None = None

    @property
    def masked(self) -> bool:
        """Whether the server shall see sums alone."""
        return self.asked.secure_aggregation in MASKS

    def settle(self, facts: Mapping[str, Any]) -> Pledge:
        """The pledge with the numbers that are known once everybody has gathered.

        Raises:
            InputError: they are none.
            SecurityRefusal: they are weaker than what was said before.
        """
        noise, here = _number(facts, "noise_multiplier"), _number(facts, "client_noise")
        epsilon = None if facts.get("epsilon") is None else _number(facts, "epsilon")
        settled = replace(
            self, settled=True, noise_multiplier=noise, client_noise=here, epsilon=epsilon
        )
        said, limit = self.asked.noise_multiplier, self.asked.epsilon
        if self.settled and settled != self:
            raise SecurityRefusal("the server says another epsilon or noise than before")
        if not _at_least(noise, said or 0.0) or (noise and self.noisy_here and not here):
            raise SecurityRefusal("the server settled on less noise than it said before")
        if limit is not None and not _at_least(limit, math.inf if epsilon is None else epsilon):
            raise SecurityRefusal("the server settled on a larger epsilon than it said before")
        if self.asked.mechanism in AT_CLIENTS and not _at_least(here, noise):
            raise SecurityRefusal("the server settled on less noise here than it says there is")
        return settled

    def insist(self, demands: Collection[str]) -> None:
        """Raises SecurityRefusal where this is less than the client demands."""
        noisy = bool(self.asked.epsilon or self.asked.noise_multiplier)
        bounded = self.epsilon is not None if self.settled else noisy
        given = {SECAGG: self.masked, DP: self.asked.mechanism != "none" and bounded}
        if missing := [name for name in demands if not given[name]]:
            raise SecurityRefusal(
                f"this client takes part only with {DEMANDS[missing[0]]}, and the server's "
                "scenario has none"
            )

    def words(self) -> list[str]:
        """What a client's user is told when it joins."""
        return [*_promised(self), *_summed(self.asked, self.masked)]

    def numbers(self) -> str:
        """What its user is told of epsilon, as far as it is known."""
        asked = self.asked
        if not self.settled and asked.epsilon is not None:
            return f"epsilon will be at most {asked.epsilon:g} (delta {asked.delta:g})"
        noise = self.noise_multiplier if self.settled else asked.noise_multiplier or 0.0
        if not noise:
            return "no noise is added, so nothing is promised: epsilon is not bounded"
        said = f"the noise has a deviation of {noise:.4g} times that length"
        if self.epsilon is None:
            return said
        return (
            f"{said}; as the server computes it, epsilon is {self.epsilon:.4g} "
            f"(delta {asked.delta:g}) over {self.rounds} rounds"
        )

    def hold(self, plan: RoundPlan) -> None:
        """Refuse to answer with less protection than was said; what is to be settled is.

        Raises:
            SecurityRefusal: what is missing.
        """
        asked, given = self.asked, plan.protection or Protection()
        if self.masked and not (given.masked and given.ring_bits):
            raise _less("the bare answer, and it said that masks would hide it")
        if plan.task == "statistics" and given.least_per_class < asked.min_class_examples:
            raise _less("statistics of classes with fewer examples than it said")
        if asked.mechanism == "none":
            return
        if plan.round > self.rounds:
            raise _less(f"an answer after the last of {self.rounds} rounds")
        rows = asked.mechanism == "release" and unit_of(asked) == "example"
        bound, noise = given.row_clip if rows else given.clip, given.noise
        if asked.mechanism == "example":
            bound, noise = given.example_clip, given.example_noise
        short = bound > 0 and (_at_least(asked.clip, bound) or asked.adaptive_clip)
        if (self.noisy_here or rows) and not short:
            raise _less("a longer answer than it said")
        if not _at_least(noise, self.client_noise * (1.0 if rows else bound)):
            raise _less("an answer with less noise than it said")

    @property
    def noisy_here(self) -> bool:
        """Whether noise is added at the clients."""
        return self.asked.mechanism in AT_CLIENTS or self.masked


def pledge_facts(scenario: Scenario, settled: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a request to join says of privacy.

    Args:
        settled: noise_multiplier, client_noise and epsilon, once they are known.
    """
    section = scenario.privacy.model_dump(mode="json")
    facts = {"privacy": section, "rounds": scenario.rounds}
    return facts if settled is None else {**facts, "settled": dict(settled)}


def read_pledge(facts: Mapping[str, Any]) -> Pledge:
    """What a request to join says of privacy, before anything is settled. Raises InputError."""
    rounds = facts.get("rounds")
    try:
        asked = Privacy.model_validate(facts.get("privacy"))
    except ValidationError as error:
        raise InputError("the server's terms of privacy are none that fedtl knows") from error
    if type(rounds) is not int or rounds < 1:
        raise InputError("the server does not say how many rounds there will be")
    return Pledge(asked, rounds)


def check_demands(demands: Collection[str]) -> tuple[str, ...]:
    """What a client insists on, as its user typed it. Raises InputError."""
    for demand in demands:
        if demand not in DEMANDS:
            raise InputError(
                "nothing that can be required", where="--require", got=repr(demand),
                allowed=", ".join(DEMANDS),
            )  # fmt: skip
    return tuple(sorted(set(demands)))


def _promised(pledge: Pledge) -> list[str]:
    """Of differential privacy."""
    asked = pledge.asked
    if asked.mechanism == "none":
        return ["no differential privacy is applied"]
    trusted = "the server, which is trusted with that, adds the noise"
    share = "each client adds its share of the noise" if pledge.masked else trusted
    ways = {
        "central": f"updates are shortened to {_clip(asked)}, and to their sum {share}",
        "local": f"before it leaves, the update is shortened to {_clip(asked)} and noise is added "
        "here",
        "example": f"in each step here, every example's gradient is shortened to {_clip(asked)} "
        "and noise is added",
        "release": f"statistics are bounded to {_clip(asked)} here, and to their sum {share}",
    }
    unit = UNITS[str(unit_of(asked))]
    return [f"differential privacy of {unit}: {ways[asked.mechanism]}", pledge.numbers()]


def _summed(asked: Privacy, masked: bool) -> list[str]:
    """Of secure aggregation."""
    if not masked:
        return ["no secure aggregation: the server sees this client's answers"]
    return [
        "secure aggregation: what is trained here leaves under masks, and the server learns the "
        f"sum alone, over at least {asked.threshold:.0%} of the clients asked"
    ]


def _clip(asked: Privacy) -> str:
    return f"length {asked.clip:g}" + (" at first" if asked.adaptive_clip else "")


def _at_least(value: float, wanted: float) -> bool:
    return value >= wanted * (1 - ROUNDING)


def _number(facts: Mapping[str, Any], name: str) -> float:
    """A finite number that is not negative. Raises InputError."""
    value: Any = facts.get(name)
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise InputError(f"the server says no proper {name}")
    return float(value)


def _less(what: str) -> SecurityRefusal:
    return SecurityRefusal(f"the server asks for {what}")

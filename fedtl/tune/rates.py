"""The learning-rate range test: the rate grows from round to round until the loss bursts.

Source: Smith 2017 (arXiv 1506.01186), section 3.3, with the exponential growth and the end of
fastai's ``lr_find``. The suggestion is a third of the rate at which the smoothed loss is lowest, as
the paper takes a third or a quarter of the largest rate that converges. Deviations: what
grows is the clients' rate, from round to round of one local epoch each, and the loss is the mean
over all clients' batches of a round. As in the original, the model goes on from rate to rate, so
part of the fall is progress, not the rate's merit: the test finds the order of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedtl.errors import InputError, PolicyStop
from fedtl.plans import Personal, RoundPlan
from fedtl.rounds import Federation
from fedtl.scenario.load import validate
from fedtl.scenario.schema import Scenario
from fedtl.scenario.strategies import CLOSED_FORMS
from fedtl.strategies.base import ServerState, Strategy, personal_of
from fedtl.tune.validation import Trials, plain
from fedtl.types import ClientUpdates, Head

LOWEST, HIGHEST, STEPS = 1e-4, 10.0, 40
BURST = 4.0
"""A loss this many times the lowest ends the test (as fastai's stop_div)."""

MEMORY = 0.6
"""Of the exponential moving average that smooths the losses."""

BELOW = 3.0
"""The suggestion is the rate of the lowest loss, divided by this."""


@dataclass(frozen=True)
class Curve:
    """What the test found.

    Attributes:
        rates, losses: of each round.
        smooth: the losses, smoothed.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def smooth(self) -> list[float]:
        """Exponential moving average without bias towards zero."""
        found, mean = [], 0.0
        for i, loss in enumerate(self.losses, 1):
            mean = MEMORY * mean + (1 - MEMORY) * loss
            found.append(mean / (1 - MEMORY**i))
        return found

    @property
    def lowest(self) -> float:
        """The rate with the lowest smoothed loss."""
        smooth = self.smooth
        return self.rates[smooth.index(min(smooth))]

    @property
    def steepest(self) -> float:
        """The rate, up to the lowest, at which the smoothed loss falls most per factor."""
        smooth = self.smooth
        last = smooth.index(min(smooth))
        falls = [after - before for before, after in pairwise(smooth[: last + 1])]
        return self.rates[falls.index(min(falls)) + 1] if falls else self.rates[0]

    @property
    def suggestion(self) -> float:
        """The rate to begin with, two digits."""
        return float(f"{self.lowest / BELOW:.2g}")

    @property
    def facts(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "rates": list(self.rates),
            "losses": list(self.losses),
            "smooth": self.smooth,
            "lowest": self.lowest,
            "steepest": self.steepest,
            "suggestion": self.suggestion,
            "set": [f"training.learning_rate={self.suggestion:g}"],
        }

    def draw(self, path: Path) -> None:
        """The curve as a picture."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, ".", color="0.6", label="each round")
        axes.plot(self.rates, self.smooth, color="C0", label="smoothed")
        axes.axvline(self.suggestion, color="C1", linestyle="--", label="suggestion")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss on validation parts (nats)")
        axes.legend()
        figure.savefig(path, dpi=150)


class _Burst(Exception):
    """The loss is far above its lowest."""


@dataclass(frozen=True)
class Ramp:
    """A strategy whose clients have another learning rate in every round."""

    inner: Strategy
    rates: tuple[float, ...]

    def init(self, head: Head, num_clients: int) -> ServerState:
        """The strategy's own."""
        return self.inner.init(head, num_clients)

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """The strategy's own, at the round's rate."""
        training = replace(plan.training, learning_rate=self.rates[plan.round - 1])
        return self.inner.plan(state, replace(plan, training=training))

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """The strategy's own."""
        return self.inner.step(state, updates)

    def finished(self, state: ServerState) -> bool:
        """When the strategy is."""
        return self.inner.finished(state)

    def personal(self, state: ServerState) -> Personal | None:
        """The strategy's own."""
        return personal_of(self.inner, state)


def find_rates(
    scenario: Scenario,
    trials: Trials,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    steps: int = STEPS,
) -> Curve:
    """The curve of a scenario; without noise, if it has any.

    Raises:
        InputError: a range that is none, or a strategy whose clients take no steps.
    """
    if not 0 < lowest < highest < math.inf or steps < 3:
        raise InputError(
            "not a range of learning rates",
            where="--from, --to, --steps",
            got=f"{lowest:g} to {highest:g} in {steps} steps",
            allowed="0 < from < to, 3 steps or more",
        )
    name = scenario.strategy.name
    if name in (*CLOSED_FORMS, "lbfgs"):
        raise InputError(
            f'clients of "{name}" take no steps, so there is no learning rate',
            where="strategy.name",
            do="Search over strategy's own keys with --over",
        )
    grow = (highest / lowest) ** (1 / (steps - 1))
    rates = tuple(lowest * grow**i for i in range(steps))
    losses: dict[float, float] = {}

    def observe(row: Mapping[str, Any], updates: ClientUpdates) -> None:
        loss = row["loss"]
        if loss is None:
            raise InputError(
                "the test goes by the shared head's loss, and here only clients' own heads have "
                "one",
                where="strategy.name",
                got=repr(name),
            )
        losses[rates[row["round"] - 1]] = float(loss)
        if loss > BURST * min(losses.values()):
            raise _Burst

    def changed(federation: Federation) -> Federation:
        return replace(federation, strategy=Ramp(federation.strategy, rates))

    try:
        trials.run(_ramped(scenario, steps), observe, changed)
    except _Burst:
        pass
    except PolicyStop as stop:  # all updates had values that are not finite
        if not losses:
            raise InputError(
                "the loss was not finite at the lowest rate already",
                where="--from",
                got=f"{lowest:g}",
                do="Give a lower one",
            ) from stop
    return Curve(tuple(losses), tuple(losses.values()))


def _ramped(scenario: Scenario, steps: int) -> Scenario:
    """The scenario with one local epoch a round, so many rounds, and nothing that hides losses."""
    steady = {"local_epochs": 1, "schedule": "constant"}
    whole = {"validation_fraction": 0.0, "early_stopping": 0}
    content = plain(scenario, **steady, **whole).model_dump(exclude_none=True)
    content.update(rounds=steps, privacy={})
    return validate(content, scenario.name, {})

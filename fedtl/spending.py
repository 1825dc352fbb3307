"""What the rounds spend of privacy: written down before noise is made, and stopped in time.

A round is charged before anything noised of it can be seen: where clients add the noise to their
own answers before they are asked, else when enough of them have answered. A round that is given up
before costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fedtl import seeding
from fedtl.checkpoints import Progress
from fedtl.errors import PolicyStop, SecurityRefusal
from fedtl.plans import RoundPlan
from fedtl.privacy.ledger import LEDGER, Entry, Ledger
from fedtl.privacy.noise import Noise, from_system, seeded
from fedtl.privacy.promise import Promise
from fedtl.scenario.schema import Scenario
from fedtl.strategies.base import ServerState, Strategy
from fedtl.types import Int64

TOLD = 20
"""Rounds of which epsilon is told, at most: where sampling counts, each takes a while to know."""


class BudgetSpent(PolicyStop):
    """The next round would spend more privacy than there is.

    Attributes:
        ended: the state and the progress that the rounds ended with, once they are known.
    """

    ended: tuple[ServerState, Progress] | None = None


@dataclass
class Spending:
    """The promise, and what was spent of it.

    Attributes:
        promise: None where nothing is promised, and nothing below does anything.
        scenario: the run's.
        source: of noise, "seeded" or "system".
        ledger: the run's.
    """

    promise: Promise | None
    scenario: Scenario
    source: Literal["seeded", "system"]
    ledger: Ledger
    _noise: Noise | None = None
    _entry: Entry | None = None
    _within: int = -1

    @classmethod
    def of(
        cls,
        promise: Promise | None,
        folder: Path,
        scenario: Scenario,
        source: Literal["seeded", "system"],
    ) -> Spending:
        """What was spent in a run's folder so far."""
        return cls(promise, scenario, source, Ledger(folder / LEDGER))

    @property
    def always(self) -> bool:
        """Whether a round has noise although nobody answered it: that nobody did is no secret
        else."""
        return self.promise is not None and self.promise.mechanism == "central"

    def require(self, charged: int) -> None:
        """Refuse to go on with a ledger of fewer lines than a commit says it had.

        Raises:
            SecurityRefusal: what was spent cannot be known.
        """
        if self.promise is not None and len(self.ledger.entries) < charged:
            raise SecurityRefusal(
                "the privacy ledger has lost lines, so nobody knows what was spent",
                where=self.ledger.path,
                got=f"{len(self.ledger.entries)} lines",
                allowed=f"at least {charged}",
                do="Bring the file back as it was; without it start a new run, but what the old "
                "one released stays released",
            )

    def begin(self, plan: RoundPlan, away: Int64) -> None:
        """Make ready for a round; charges it where the clients make the noise of their own answers.

        Args:
            away: clients that are known not to answer.

        Raises:
            BudgetSpent: the round would spend more than ``privacy.budget``.
        """
        if self.promise is None:
            return
        key = seeding.key(self.scenario.seed, "noise", plan.round)
        self._noise = seeded(key) if self.source == "seeded" else from_system()
        there = np.setdiff1d(plan.clients, away).tolist()
        self._entry = self.promise.entry(plan.round, there, self._noise.id)
        self._refuse_beyond(self._entry)
        if self.promise.mechanism in ("local", "example"):
            self.release()

    def release(self) -> None:
        """Charge the round, if it is not charged yet; call before what is noised can be seen."""
        if self._entry is not None:
            self.ledger.charge(self._entry)

    def noised(self, strategy: Strategy) -> Strategy:
        """The strategy with the round's noise, where its step makes any."""
        given = getattr(strategy, "with_noise", None)
        return strategy if given is None or self._noise is None else given(self._noise)

    def epsilon(self, round: int) -> float | None:
        """Spent up to a round; None where nothing is promised, or in most rounds of a long run."""
        last = self.scenario.rounds
        if self.promise is None or (round % -(-last // TOLD) and round != last):
            return None
        return self.promise.epsilon(self.ledger.entries)

    @property
    def nearly_spent(self) -> bool:
        """Whether the round at hand may be the last that the budget allows."""
        budget = self.scenario.privacy.budget
        if self.promise is None or budget is None:
            return False
        if self._within < 0:
            self._within = self.promise.rounds_within(budget)
        own, charged = self.promise, self.ledger.entries
        as_planned = all(  # none given up, none twice, all with the noise of now
            (entry.round, entry.noise_multiplier, entry.sampling, entry.rate)
            == (round, own.noise_multiplier, own.sampling, own.rate)
            for round, entry in enumerate(charged, 1)
        )
        return not as_planned or len(charged) >= self._within

    def _refuse_beyond(self, entry: Entry) -> None:
        budget, ledger = self.scenario.privacy.budget, self.ledger
        assert self.promise is not None
        if budget is None or ledger.holds(entry.round, entry.noise_id):
            return
        if not self.nearly_spent:  # no need to add everything up
            return
        spent = self.promise.epsilon((*ledger.entries, entry))
        if spent is not None and spent <= budget:
            return
        before = self.promise.epsilon(ledger.entries)
        had = "without bound" if before is None else f"{before:.4g}"
        would = "without bound" if spent is None else f"epsilon = {spent:.4g}"
        raise BudgetSpent(
            f"round {entry.round} would bring what is spent to {would}; "
            f"{entry.round - 1} rounds are kept, they spent {had}",
            where="privacy.budget",
            got=f"{budget:g}",
            do="The run's folder has the head of the last round; for more rounds raise "
            "privacy.noise_multiplier, or ask fewer clients in each",
        )

"""What a scenario promises, to whom, under which assumptions, and what of it is spent.

A ``Promise`` is made before the first round, with the noise that it takes. What was released is the
ledger's business; ``Promise.epsilon`` says what that cost the member who lost most.

How each mechanism is accounted, z the noise multiplier (deviation over the clip):

- central: one Gaussian a round. Sampled by coins at rate q: neighbours are one client more or less,
  multiplier z. A fixed number without replacement: one client in another's place moves a sum by
  twice the clip, multiplier z / 2. In turns: a client pays for its own rounds alone.
- central, banded: one Gaussian for all rounds together, z its deviation over clip and sensitivity.
- local: any two updates differ by at most twice the clip, so z / 2 in each round of the client's.
- example: every local step is a Gaussian on a batch drawn by coins at rate B / n_k.
- release: one Gaussian, z its deviation over the sensitivity of the statistics.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedtl import seeding
from fedtl.privacy.accounting import (
    Release,
    Sampling,
    accountant_for,
    epsilon_of,
    noise_for,
)
from fedtl.privacy.ledger import Entry
from fedtl.privacy.matrix import coefficients, sensitivity
from fedtl.privacy.words import assumptions_of, notes_of
from fedtl.privacy.worst import Cost, worst_cost
from fedtl.scenario.privacy import unit_of
from fedtl.scenario.schema import Scenario
from fedtl.types import Float64, Int64, Roster

MOST_COHORTS = 20_000
"""Rounds whose cohorts are drawn beforehand to count turns; of more, everybody is in each."""


@dataclass(frozen=True)
class Promise:
    """Differential privacy of a run.

    Attributes:
        mechanism: "central", "local", "example" or "release".
        unit: whose data are protected, a whole "client" or one "example".
        delta: chance that epsilon does not hold.
        accountant: the one that is really used, "pld" or "rdp".
        noise_multiplier: z; 0 promises nothing.
        clip: S, where it is adaptive that of the first round.
        sampling: how clients come into a round: "none" (all do), "poisson", "fixed", "cyclic".
        rate: share of the clients in a round, on average.
        denominator: m, what sums are divided by.
        rounds: planned.
        population: K clients.
        cohort: clients in a round, without coins.
        separation: b, rounds from one turn of a client to its next at least.
        coefficients: c_0, c_1, ... of banded noise, float64 [bands]; empty for independent noise.
        sensitivity: of them, over the clip; 1 for independent noise.
        secure: whether the server sees nothing but the sum.
        seed: of the cohorts.
        sizes: training examples of each client, int64 [K].
        batch_size, epochs: of local training.
        assumptions: what else has to hold, in sentences.
        notes: what to warn of, in sentences.
    """

    mechanism: str
    unit: str
    delta: float
    accountant: str
    noise_multiplier: float
    clip: float
    sampling: str
    rate: float
    denominator: float
    rounds: int
    population: int
    cohort: int
    separation: int
    coefficients: Float64 = field(compare=False)
    sensitivity: float
    secure: bool
    seed: int
    sizes: Int64 = field(compare=False, repr=False)
    batch_size: int
    epochs: int
    assumptions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def banded(self) -> bool:
        """Whether noise is correlated over rounds."""
        return len(self.coefficients) > 0

    @property
    def terms(self) -> dict[str, Any]:
        """What may not change within a run, JSON values: the ledger's entries of before are
        accounted by what holds now, but for their noise, rate and clients."""
        found: dict[str, Any] = {"mechanism": self.mechanism, "unit": self.unit, "seed": self.seed}
        if self.mechanism == "central":
            found["replaced"] = self.sampling == "fixed"
        if self.banded:
            found |= {"rounds": self.rounds, "separation": self.separation}
            found["bands"] = len(self.coefficients)
        if self.mechanism == "example":
            sizes = hashlib.blake2b(self.sizes.astype("<i8").tobytes(), digest_size=16)
            found |= {"batch_size": self.batch_size, "epochs": self.epochs}
            found["sizes"] = sizes.hexdigest()
        return found

    def entry(self, round: int, clients: Iterable[int], noise_id: str) -> Entry:
        """What the ledger shall hold of a round's release.

        Args:
            clients: who takes part.
        """
        kind = "statistics" if self.mechanism == "release" else "updates"
        return Entry(
            round,
            kind,
            self.noise_multiplier,
            self.sampling,
            self.rate,
            clients=tuple(map(int, clients)),
            noise_id=noise_id,
        )

    def releases(self, entries: Sequence[Entry]) -> list[Release]:
        """What of the ledger's entries touched the member who lost most by them."""
        found: list[Release] = []
        for (noise, sampling, rate), alike in _alike(entries).items():
            own = self  # but for a resumed run whose scenario was changed
            if (sampling, rate) != (self.sampling, self.rate):
                cohort = math.floor(rate * self.population + 0.5)
                own = replace(self, sampling=sampling, rate=rate, cohort=cohort)
            rounds = max(entry.round for entry in alike) if self.banded else _count(alike)
            found += own._releases(noise, self._turns_in(alike), rounds)
            if self.banded:
                found += self._again(noise, alike)
        return found

    def epsilon(self, entries: Sequence[Entry]) -> float | None:
        """What the entries cost the member who lost most; None where there is no noise."""
        return _finite(epsilon_of(self.releases(entries), self.delta, self.accountant))

    def against_server(self, entries: Sequence[Entry]) -> float | None:
        """The same against a server that also knows who took part; None where it sees all."""
        if self.mechanism in ("local", "example"):
            return self.epsilon(entries)
        if not self.secure:
            return None
        if self.mechanism == "release" or self.banded:
            return self.epsilon(entries)
        found = [
            Release(noise, int(self._turns_in(alike).max(initial=0)))
            for (noise, _, _), alike in _alike(entries).items()
        ]
        return _finite(epsilon_of(found, self.delta, self.accountant))

    def epsilon_after(self, rounds: int) -> float | None:
        """What so many rounds cost, before any has run; None where there is no noise."""
        spent = self._releases(self.noise_multiplier, self._turns(rounds), rounds)
        return _finite(epsilon_of(spent, self.delta, self.accountant))

    def server_after(self, rounds: int) -> float | None:
        """``against_server`` of so many rounds, before any has run."""
        if self.mechanism in ("local", "example", "release") or self.banded:
            own = self.mechanism in ("local", "example") or self.secure
            return self.epsilon_after(rounds) if own else None
        if not self.secure:
            return None
        turns = int(self._turns(rounds).max(initial=0))
        spent = [Release(self.noise_multiplier, turns)]
        return _finite(epsilon_of(spent, self.delta, self.accountant))

    def rounds_within(self, budget: float) -> int:
        """How many of the planned rounds may run before ``budget`` would be exceeded."""

        def fits(rounds: int) -> bool:
            spent = self.epsilon_after(rounds)
            return spent is not None and spent <= budget

        low, high = 0, self.rounds
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def noise_within(self, epsilon: float) -> float:
        """The least noise multiplier with which all rounds cost no more than ``epsilon``.

        Raises:
            InputError: no noise is enough.
        """
        turns = self._turns(self.rounds)
        if self.mechanism != "example":
            return noise_for(
                epsilon,
                self.delta,
                lambda noise: self._releases(noise, turns, self.rounds),
                self.accountant,
            )
        costs, noise = self._costs(turns), 0.0
        worst: Cost | None = max(costs, key=lambda cost: cost.rate**2 * cost.steps)
        while worst is not None:  # which is the worst depends on the noise, and that only grows
            needed = noise_for(epsilon, self.delta, worst.releases, self.accountant)
            if needed <= noise:
                break
            noise, before = needed, worst
            worst = worst_cost(costs, noise, self.delta, self.accountant)
            if worst == before:
                break
        return noise

    def worst_clients(self, rounds: int) -> Int64:
        """Ids of the clients whose members lose most in so many rounds, int64."""
        turns = self._turns(rounds)
        if self.mechanism != "example":
            one_for_all = self.mechanism == "release" or self.sampling in ("poisson", "fixed")
            worst = (
                turns >= 0 if one_for_all and self.mechanism != "local" else turns == turns.max()
            )
            return np.flatnonzero(worst)
        worst_one = worst_cost(
            self._costs(turns), self.noise_multiplier, self.delta, self.accountant
        )
        steps, rates = self._steps(turns), self._rates()
        if worst_one is None:
            return np.flatnonzero(steps < 0)
        return np.flatnonzero((steps == worst_one.steps) & (rates == worst_one.rate))

    def _releases(self, noise: float, turns: Int64, rounds: int) -> list[Release]:
        """Of so many rounds, with each client in ``turns`` of them, int64 [K]."""
        most = int(turns.max(initial=0))
        if self.banded:
            if not rounds:
                return []
            begun = sensitivity(self.coefficients, min(rounds, self.rounds), self.separation)
            return [Release(noise * self.sensitivity / begun)]
        if self.mechanism == "local":
            return [Release(noise / 2, most)]
        if self.mechanism == "example":
            worst = worst_cost(self._costs(turns), noise, self.delta, self.accountant)
            return worst.releases(noise) if worst is not None else []
        if self.sampling == "cyclic":
            return [Release(noise, most)]
        if self.sampling == "poisson":
            return [Release(noise, rounds, "poisson", self.rate)]
        if self.sampling == "fixed":
            return [Release(noise / 2, rounds, "fixed", 1.0, self.population, self.cohort)]
        return [Release(noise, rounds)]

    def _again(self, noise: float, entries: Sequence[Entry]) -> list[Release]:
        """Rounds of banded noise that a resumed run released once more, with other noise.

        A second row t of C beside the first is one more Gaussian; a client moves it by the sum of
        the coefficients of its turns at most.
        """
        extra = _count(entries) - len({entry.round for entry in entries})
        moved = float(self.coefficients[:: self.separation].sum())
        return [Release(noise * self.sensitivity / moved, extra)] if extra else []

    def _costs(self, turns: Int64) -> list[Cost]:
        pairs = sorted(set(zip(self._rates().tolist(), self._steps(turns).tolist(), strict=True)))
        return [Cost(rate, steps) for rate, steps in pairs if steps]

    def _rates(self) -> Float64:
        """Chance of an example to be in a step's batch, by client, float64 [K]."""
        return np.minimum(1.0, self.batch_size / np.maximum(self.sizes, 1))

    def _steps(self, turns: Int64) -> Int64:
        """Noisy steps of each client, int64 [K]."""
        return turns * self.epochs * -(-self.sizes // self.batch_size)

    def _turns_in(self, entries: Sequence[Entry]) -> Int64:
        """Releases that each client took part in, int64 [K]."""
        turns = np.zeros(self.population, np.int64)
        for entry in entries:
            np.add.at(turns, np.array(entry.clients, np.int64), entry.count)
        return turns

    def _turns(self, rounds: int) -> Int64:
        """Rounds that each client will have taken part in, from the seeded cohorts, int64 [K]."""
        everybody = np.full(self.population, rounds, np.int64)
        if self.sampling == "none" and self.cohort >= self.population:
            return everybody
        if self.sampling == "cyclic":
            return np.minimum(everybody, -(-rounds // self.separation))
        counted = self.mechanism in ("local", "example") or self.secure
        if not counted or rounds > MOST_COHORTS:
            return everybody
        turns = np.zeros(self.population, np.int64)
        for round in range(1, rounds + 1):
            turns[self._drawn(round)] += 1
        return turns

    def _drawn(self, round: int) -> Int64:
        """A round's clients: ``planning`` draws the very same."""
        stream = seeding.generator(self.seed, "cohort", round)
        if self.sampling == "poisson":
            return np.flatnonzero(stream.random(self.population) < self.rate)
        return stream.choice(self.population, self.cohort, replace=False)


def make_promise(scenario: Scenario, roster: Roster) -> Promise | None:
    """The promise of a scenario to these clients; None where it makes none.

    Raises:
        InputError: no noise is enough for the epsilon that is asked for.
    """
    asked, clients = scenario.privacy, roster.num_clients
    unit = unit_of(asked)
    if unit is None:
        return None
    fraction = scenario.clients.fraction
    cohort = min(clients, max(1, math.floor(fraction * clients + 0.5)))
    sampling = asked.sampling if asked.mechanism == "central" else "none"
    coins = sampling == "poisson" and fraction < 1
    if not coins and cohort == clients:
        sampling = "none"
    over = scenario.participation.over_selection if asked.mechanism != "central" else 1.0
    cohort = min(clients, math.ceil(cohort * over))
    separation = -(-clients // cohort) if sampling == "cyclic" else 1
    bands = min(asked.bands or separation, scenario.rounds) if asked.noise == "banded" else 0
    column = coefficients(bands) if bands else np.empty(0)
    promise = Promise(
        mechanism=asked.mechanism,
        unit=unit,
        delta=asked.delta,
        accountant=accountant_for([_kind(sampling, clients, cohort)], asked.accountant),
        noise_multiplier=asked.noise_multiplier or 0.0,
        clip=asked.clip,
        sampling=sampling,
        rate=fraction if coins else cohort / clients,
        denominator=fraction * clients if coins else float(cohort),
        rounds=scenario.rounds,
        population=clients,
        cohort=cohort,
        separation=separation,
        coefficients=column,
        sensitivity=sensitivity(column, scenario.rounds, separation) if bands else 1.0,
        secure=asked.secure_aggregation != "none",
        seed=scenario.seed,
        sizes=roster.train,
        batch_size=scenario.training.batch_size,
        epochs=scenario.training.local_epochs,
    )
    if asked.epsilon is not None:
        promise = replace(promise, noise_multiplier=promise.noise_within(asked.epsilon))
    return replace(
        promise,
        assumptions=assumptions_of(scenario, unit, sampling),
        notes=notes_of(scenario, unit, promise.noise_multiplier, roster.train),
    )


def _kind(sampling: str, clients: int, cohort: int) -> Release:
    kinds: dict[str, Sampling] = {"poisson": "poisson", "fixed": "fixed"}
    return Release(1.0, 1, kinds.get(sampling, "none"), 0.5, clients, cohort)


def _alike(entries: Sequence[Entry]) -> dict[tuple[float, str, float], list[Entry]]:
    """Entries by noise multiplier, sampling and rate."""
    groups: dict[tuple[float, str, float], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.noise_multiplier, entry.sampling, entry.rate), []).append(entry)
    return groups


def _count(entries: Sequence[Entry]) -> int:
    return sum(entry.count for entry in entries)


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None

"""Any strategy whose step rests on the clients' mean alone, given that mean under protection.

``Private`` turns a round's updates, or their secure sum, into one pseudo-update w + Delta and hands
it to the strategy as that of a single client; what that strategy does with it is post-processing.

Central differential privacy (DP-FedAvg, McMahan et al. 2018, arXiv 1710.06963, algorithm 1, fixed
denominator, flat clipping):

    Delta = (sum_k clip_S(w_k - w) + z S N(0, I)) / m,    m = q K

over all tensors that are sent together, uniform over clients. The server clips, and so does not
rest on clients that do; in a secure sum, where it cannot, the clients clip, and add the noise
among them: N(0, (z S)^2 / (t n)) each of the n asked, t the threshold, so that the fewest that a
sum may have bring enough. The server adds what is missing of (z S)^2 / t, and all sums are rounded
to one grid: else noise and grid would tell how many were asked, which nothing hides.

Adaptive clipping (Andrew et al. 2021, arXiv 1905.03871, algorithm 1): b~ = 1/2 + (sum_k (b_k - 1/2)
+ N(0, sigma_b^2)) / m with b_k = [|w_k - w| <= S]; S <- S exp(-rate (b~ - quantile)); the updates
get z_Delta = (z^-2 - (2 sigma_b)^-2)^-1/2, so that both together have the multiplier z (theorem 1).
sigma_b = max(m / 10, z). Deviations: m / 10 for the paper's m / 20; not below z, where no z_Delta
would be left; each b_k is centred, so that a cohort drawn by coins has the same sensitivity.

Banded noise (DP-FTRL; Choquette-Choo et al. 2023, 2306.08153, with the factorisation of Kalinin and
Lampert 2024, 2405.13763): the sum of round t gets y_t = xi_t - sum_i c_i y_{t-i}
(``privacy.matrix``), with xi_t ~ N(0, (z S s)^2) and s the sensitivity of C where everybody takes
part as planned.
Rounds without a sum leave no gap: their y are made, and never seen.

Everything that is remembered lies in slots ``privacy.*``, so that a resumed run goes on with the
same bits. The noise is given from outside (``with_noise``), once its release is in the ledger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, exp

import numpy as np

from fedtl.plans import Personal, Protection, RoundPlan
from fedtl.privacy.clipping import clip_updates
from fedtl.privacy.matrix import correlated
from fedtl.privacy.noise import Noise
from fedtl.privacy.ring import scale_for
from fedtl.strategies.base import ServerState, Strategy, Summing, personal_of
from fedtl.types import ClientUpdates, Float64, Head, Int64, LocalTraining

SLOTS = "privacy."
CLIP, PAST, LAST_ROUND = "privacy.clip", "privacy.past.", "privacy.round"

CHUNK_BYTES = 2**23
"""Updates that are held as float64 at once."""

STATISTICS_RANGE = 2.0**30
"""Largest entry of a client's statistics in a secure sum of 64 bits: a million rows of a thousand
for a square."""

TAIL = 12.0
"""Deviations within which noise stays: beyond are 4e-33 of it."""

NOBODY = -1
"""The id of a pseudo-update's client."""


@dataclass(frozen=True)
class Central:
    """Noise in the sum of clipped updates.

    Attributes:
        clip: S, where it is adaptive at the start.
        multiplier: z; 0 clips only.
        denominator: m.
        adaptive: whether the clip follows the ``quantile`` at ``rate``.
        bands: c_0, c_1, ... of banded noise; empty for fresh noise in each round.
        sensitivity: s, of the bands under the participation.
    """

    clip: float
    multiplier: float
    denominator: float
    adaptive: bool = False
    quantile: float = 0.5
    rate: float = 0.2
    bands: tuple[float, ...] = ()
    sensitivity: float = 1.0

    @property
    def count_noise(self) -> float:
        """sigma_b."""
        if not (self.adaptive and self.multiplier):
            return 0.0
        return max(self.denominator / 10, self.multiplier)

    @property
    def deviation(self) -> float:
        """Of the noise in the sum, as a multiple of the clip."""
        if not self.count_noise:
            return self.multiplier * self.sensitivity
        return float((self.multiplier**-2 - (2 * self.count_noise) ** -2) ** -0.5)


@dataclass(frozen=True)
class SecureRing:
    """The fixed point of a secure sum.

    Attributes:
        value_range: largest size of an entry of an update.
        threshold: share of the asked that must answer.
        masked: whether clients mask what they send.
        weights: of all clients in the mean, float64 [K] in (0, 1]; None for equal ones.
        population: K, where a cohort's number is a secret.
    """

    value_range: float
    threshold: float
    masked: bool
    weights: Float64 | None = None
    population: int = 0

    def least(self, asked: int) -> int:
        """The fewest of so many clients whose sum may be seen."""
        return max(min(2, asked) if self.masked else 1, ceil(self.threshold * asked - 1e-9), 1)

    def protected(self, plan: RoundPlan, largest: float | None = None) -> RoundPlan:
        """The plan with answers in a ring, statistics in the wide one.

        Args:
            largest: size of an entry, where it is known better; then the scale does not depend on
                how many are asked.
        """
        own, most = plan.protection or Protection(), max(1, len(plan.clients))
        bits = 32
        if plan.task == "statistics":
            bits, largest = 64, STATISTICS_RANGE
        elif largest is not None:
            most = max(most, self.population)
        elif own.clip:
            largest = own.clip + TAIL * own.noise
        scale, limit = scale_for(largest or self.value_range, most, bits)
        # one client alone has nobody to share masks with, and if it adds all the noise no need to
        masked = self.masked and not (len(plan.clients) == 1 and own.noise > 0)
        own = replace(own, ring_bits=bits, scale=scale, limit=limit, masked=masked)
        even = self.weights is None or plan.task == "statistics"
        weights = None if even else np.asarray(self.weights)[plan.clients]
        return replace(plan, protection=own, weights=weights)


@dataclass(frozen=True)
class Private:
    """``then`` on protected means: noised (``central``), summed in secret (``ring``), or both.

    Statistics, in a ring, are handed to it as the sum of all that answered.
    """

    then: Strategy
    central: Central | None = None
    ring: SecureRing | None = None
    noise: Noise | None = field(default=None, compare=False)

    def with_noise(self, noise: Noise) -> Private:
        """The same, with the noise of the round that is about to be stepped over."""
        inner = getattr(self.then, "with_noise", None)
        return replace(self, noise=noise, then=inner(noise) if inner is not None else self.then)

    def init(self, head: Head, num_clients: int) -> ServerState:
        """The other strategy's slots, and what the noise and the clip remember."""
        state = self.then.init(head, num_clients)
        slots = dict(state.slots)
        if self.central is not None and self.central.adaptive:
            slots[CLIP] = np.array([self.central.clip])
        if self.central is not None and self.central.bands:
            past = len(self.central.bands) - 1
            slots |= {PAST + n: np.zeros((past, *t.shape)) for n, t in state.head.items()}
            slots[LAST_ROUND] = np.zeros(1, np.int64)
        return replace(state, slots=slots)

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """The other strategy's, its answers in a ring where they are summed in secret."""
        plan = self.then.plan(self._own(state), plan)
        if self.ring is None:
            return plan
        if self.central is not None and plan.task == "train":
            clip = self._clip(state)
            whole = self._of_all(state)
            share = whole / max(1, len(plan.clients)) ** 0.5
            own = replace(plan.protection or Protection(), clip=clip, noise=share)
            plan = replace(plan, protection=own)
            return self.ring.protected(plan, clip + TAIL * whole)
        return self.ring.protected(plan)

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """The other strategy's, on the noised mean of clipped updates."""
        if self.central is None:
            return self._with(state, self.then.step(self._own(state), updates))
        clip, total, inside = self._clip(state), self._zeros(state, updates), 0
        size = sum(tensor.size for tensor in total.values())
        chunk = max(1, CHUNK_BYTES // (8 * max(1, size)))
        for first in range(0, len(updates.clients), chunk):
            rows = slice(first, first + chunk)
            deltas = {n: updates.tensors[n][rows] - state.head[n].astype(float) for n in total}
            clipped, norms = clip_updates(deltas, clip)
            inside += int((norms <= clip).sum())
            for name, delta in clipped.items():
                total[name] += delta.sum(axis=0)
        slots = self._noised(state, total, updates.round)
        if self.central.adaptive:
            share = 0.5 + (inside - 0.5 * len(updates.clients)) / self.central.denominator
            slots[CLIP] = np.array([self._next_clip(clip, share)])
        mean = {name: sums / self.central.denominator for name, sums in total.items()}
        return self._moved(state, mean, updates.round, updates.training, slots)

    def step_sum(
        self,
        state: ServerState,
        total: Mapping[str, Float64],
        weight: float,
        plan: RoundPlan,
    ) -> ServerState:
        """The other strategy's, on a secure sum of updates.

        Args:
            total: sum of the survivors' weighted updates, by name.
            weight: of the survivors together; 0 where nobody was asked.
        """
        total = {name: np.array(sums) for name, sums in total.items()}
        divisor = weight
        if self.central is not None:
            divisor = self.central.denominator
            missing = 1 - weight / max(1, len(plan.clients))  # of all that were asked
            if missing > 0 and self.central.deviation:
                drawn = self._fresh(total, self._of_all(state) * missing**0.5)
                total = {name: sums + drawn[name] for name, sums in total.items()}
            if plan.protection is not None:  # noise of the server's is on no grid
                scale = plan.protection.scale
                total = {name: np.rint(scale * sums) / scale for name, sums in total.items()}
        mean = {name: sums / divisor for name, sums in total.items()}
        return self._moved(state, mean, plan.round, plan.training, {})

    def absorb(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """The other strategy's."""
        assert isinstance(self.then, Summing), "asked for statistics"
        return self._with(state, self.then.absorb(self._own(state), updates))

    def solve(self, state: ServerState) -> ServerState:
        """The other strategy's."""
        assert isinstance(self.then, Summing), "asked for statistics"
        return self._with(state, self.then.solve(self._own(state)))

    def finished(self, state: ServerState) -> bool:
        """When the other strategy is."""
        return self.then.finished(self._own(state))

    def personal(self, state: ServerState) -> Personal | None:
        """What the other strategy has clients do for themselves."""
        return personal_of(self.then, self._own(state))

    def _own(self, state: ServerState) -> ServerState:
        """What the other strategy knows of."""
        return replace(
            state, slots={n: t for n, t in state.slots.items() if not n.startswith(SLOTS)}
        )

    def _with(
        self,
        state: ServerState,
        own: ServerState,
        changed: Mapping[str, Float64 | Int64] | None = None,
    ) -> ServerState:
        """The other strategy's next state, with what is remembered here."""
        kept = {n: t for n, t in state.slots.items() if n.startswith(SLOTS)}
        return replace(own, slots={**own.slots, **kept, **(changed or {})})

    def _moved(
        self,
        state: ServerState,
        mean: Mapping[str, Float64],
        round: int,
        training: LocalTraining | None,
        slots: Mapping[str, Float64 | Int64],
    ) -> ServerState:
        """The other strategy's step on the one update w + Delta."""
        one = ClientUpdates(
            round,
            np.array([NOBODY], np.int64),
            {name: (state.head[name] + delta)[None] for name, delta in mean.items()},
            np.ones(1, np.int64),
            np.full(1, np.nan),
            training=training,
        )
        return self._with(state, self.then.step(self._own(state), one), slots)

    def _zeros(self, state: ServerState, updates: ClientUpdates) -> dict[str, Float64]:
        """Sums of nobody's updates, of the tensors that are sent, by name."""
        sent = sorted(state.head.keys() & updates.tensors.keys())
        return {name: np.zeros(state.head[name].shape) for name in sent}

    def _clip(self, state: ServerState) -> float:
        assert self.central is not None
        return float(state.slots[CLIP][0]) if self.central.adaptive else self.central.clip

    def _of_all(self, state: ServerState) -> float:
        """Deviation of the noise in a secure sum: z S is left where the fewest survive."""
        assert self.central is not None
        assert self.ring is not None
        return float(self.central.deviation * self._clip(state) / self.ring.threshold**0.5)

    def _next_clip(self, clip: float, share: float) -> float:
        """S exp(-rate (b~ - quantile)), from the true share b."""
        own = self.central
        assert own is not None
        if own.count_noise:
            share += own.count_noise * float(self._drawn(1)[0]) / own.denominator
        return clip * exp(max(-50.0, min(50.0, -own.rate * (share - own.quantile))))

    def _noised(
        self, state: ServerState, total: dict[str, Float64], round: int
    ) -> dict[str, Float64 | Int64]:
        """Adds the round's noise to the sums; what is to be remembered of it."""
        own = self.central
        assert own is not None
        if not own.deviation:
            return {}
        deviation = own.deviation * self._clip(state)
        if not own.bands:
            for name, noise in self._fresh(total, deviation).items():
                total[name] += noise
            return {}
        bands = np.array(own.bands)
        past = {name: state.slots[PAST + name] for name in total}
        now: dict[str, Float64] = {}
        for _ in range(int(state.slots[LAST_ROUND][0]), round):
            fresh = self._fresh(total, deviation)
            now = {n: correlated(fresh[n], past[n], bands) for n in fresh}
            past = {n: np.concatenate([now[n][None], past[n]])[: len(past[n])] for n in now}
        for name, noise in now.items():
            total[name] += noise
        return {
            **{PAST + name: kept for name, kept in past.items()},
            LAST_ROUND: np.array([round], np.int64),
        }

    def _fresh(self, like: Mapping[str, Float64], deviation: float) -> dict[str, Float64]:
        """Independent noise for each tensor, in the order of their names."""
        return {
            name: deviation * self._drawn(like[name].size).reshape(like[name].shape)
            for name in sorted(like)
        }

    def _drawn(self, size: int) -> Float64:
        assert self.noise is not None, "noise is given once its release is written down"
        return self.noise.normal(size)


@dataclass(frozen=True)
class AtClients:
    """``then`` on answers that clients protected by themselves (local and example-level privacy).

    Attributes:
        protection: what they do in a round of training.
    """

    then: Strategy
    protection: Protection

    def init(self, head: Head, num_clients: int) -> ServerState:
        """The other strategy's."""
        return self.then.init(head, num_clients)

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Clients are told what to do to their answers."""
        plan = self.then.plan(state, plan)
        return replace(plan, protection=self.protection) if plan.task == "train" else plan

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """The other strategy's, on what came."""
        return self.then.step(state, updates)

    def finished(self, state: ServerState) -> bool:
        """When the other strategy is."""
        return self.then.finished(state)

    def personal(self, state: ServerState) -> Personal | None:
        """What the other strategy has clients do for themselves."""
        return personal_of(self.then, state)

"""A closed-form head from statistics that are released once, under differential privacy.

``PrivateRelease`` stands around Fed3R, AFL, FedNCM or FedLDA. Clients shorten their feature rows,
see ``privacy.statistics``. The sums get noise of deviation sigma = multiplier * sensitivity in the
encoding, once. All that comes after, the head among it, follows from what was released, and has
the same promise. The released sums are brought back to the features' own unit, so that the head
is used, and judged, like any other.

Units. "example": one row more or less, in sums of rows of length 1. "client": one client more or
less, whose whole encoded answer is shortened to ``clip`` before it is added; rows are in units of
sqrt(D), as features of a trunk are about 1 each; random ones are never longer than sqrt(2).

Repair. Noise of sigma in the encoding is a symmetric matrix of spectral norm about lambda =
sigma sqrt(2 W). A is projected onto the positive semidefinite matrices (negative eigenvalues become
0) and gets lambda I: a ridge at which no direction is weighed by what the noise alone made of it.
Without, the head is that of a matrix with eigenvalues near 0 that mean nothing. FedLDA's covariance
is repaired in place of A: class means of few rows, mostly noise, would make it indefinite again.
Counts become whole and at least 0; a class that has none is absent, as in any closed form. With a
bias they are at least 1 under noise: the bias of rows shortened to a tenth or less says next to
nothing of how many there are, and which classes there are is public.

In a plain federation the server sees each client's statistics, adds them up and keeps none: the
promise is towards everybody else. In a secure sum clients shorten their answers themselves and each
adds a share sigma / sqrt(t) of the noise, t the fewest that a sum may have; the server adds none.
There is one release: whoever comes late is left out.

Sources: Dwork et al. 2014, "Analyze Gauss", for symmetric noise on A; Wang 2018 (1803.02596,
AdaSSP) for noised ridge regression. Deviations: A, B and counts share one Gaussian release of
their joint sensitivity, and the ridge follows from the noise alone, not from a private look at A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from fedtl.clients.blocks import one_blas_thread
from fedtl.clients.statistics import pack_symmetric, unpack_symmetric
from fedtl.plans import Personal, Protection, RoundPlan, Statistics
from fedtl.privacy.noise import Noise
from fedtl.privacy.statistics import noised, protect_answer, row_scales, sensitivity
from fedtl.strategies.base import ServerState, personal_of
from fedtl.strategies.class_means import FedLDA, pooled_covariance
from fedtl.strategies.closed_form import OneShot, Solved, Sums
from fedtl.strategies.private import SecureRing
from fedtl.types import ClientUpdates, Float64, Head, Int64

WHOLE = 1e-6
"""A count may be that much above a whole number without becoming the next one."""


@dataclass(frozen=True)
class PrivateRelease(OneShot):
    """``then`` on noised sums.

    Attributes:
        then: Fed3R, AFL, FedNCM or FedLDA.
        unit: whose data one neighbour more or less is.
        clip: "example": length to which feature rows are shortened; "client": length to which
            encoded answers are; a row of a unit's length adds at most sqrt(2), or sqrt(3).
        multiplier: z, deviation of the noise over the sensitivity; 0 shortens only.
        ring: of a secure sum, where there is one: clients add the noise, and ``Private`` around
            this puts their answers into the ring.
        noise: of the release, given once it is in the ledger.
    """

    then: OneShot
    unit: Literal["example", "client"]
    clip: float
    multiplier: float
    ring: SecureRing | None = None
    noise: Noise | None = field(default=None, compare=False)

    def with_noise(self, noise: Noise) -> PrivateRelease:
        """The same, with the noise of the release that is about to be made."""
        return replace(self, noise=noise)

    @property
    def deviation(self) -> float:
        """sigma, of the noise that is promised, in the encoding."""
        bound = self.clip if self.unit == "client" else sensitivity(self.asked())
        return self.multiplier * bound

    def asked(self) -> Statistics:
        """What the other strategy needs."""
        return self.then.asked()

    def init(self, head: Head, num_clients: int) -> ServerState:
        """The other strategy's; ``released`` int64 [1] is 1 once the sums are."""
        state = self.then.init(head, num_clients)
        return replace(state, slots={**state.slots, "released": np.zeros(1, np.int64)})

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Everybody is asked at once; nobody after the release."""
        plan = super().plan(state, plan)
        if self.finished(state):
            plan = plan.without(plan.clients)
        safe = Protection(row_clip=self._row_unit(state))
        if self.ring is not None:
            share = self.deviation / self.ring.least(len(state.slots["reported"])) ** 0.5
            clip = self.clip if self.unit == "client" else 0.0
            safe = replace(safe, clip=clip, noise=share)
        return replace(plan, protection=safe)

    def absorb(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """Adds some clients' statistics, each no longer than the clip where clients are protected;
        of a secure sum, where clients have seen to that, all clients' at once."""
        real = {**state.slots, "counts": state.slots["counts"].astype(np.float64)}
        state = replace(state, slots=real)
        if self.unit == "example" or self.ring is not None:
            return super().absorb(state, updates)
        safe = Protection(clip=self.clip)
        for i in range(len(updates.clients)):
            own = {name: tensor[i] for name, tensor in updates.tensors.items()}
            short = protect_answer(own, self.asked(), safe)
            tensors = {name: tensor[None] for name, tensor in short.items()}
            one = replace(updates, clients=updates.clients[i : i + 1], tensors=tensors)
            state = super().absorb(state, one)
        return state

    def solve(self, state: ServerState) -> ServerState:
        """The release, and the head that follows from it; what was summed is let go."""
        if self.finished(state) or not state.slots["reported"].any():
            return state
        slots = {**state.slots, **self._released(state), "released": np.ones(1, np.int64)}
        return super().solve(replace(state, slots=slots))

    def solved(self, slots: Sums) -> Solved:
        """The other strategy's."""
        return self.then.solved(slots)

    def finished(self, state: ServerState) -> bool:
        """After the release."""
        return bool(state.slots["released"][0])

    def personal(self, state: ServerState) -> Personal | None:
        """What the other strategy has clients do for themselves, from what was released."""
        return personal_of(self.then, state)

    def _row_unit(self, state: ServerState) -> float:
        """Length of a row that counts as 1."""
        if self.unit == "example":
            return self.clip
        return (
            2.0**0.5 if self.asked().random_features else math.sqrt(state.head["weight"].shape[1])
        )

    def _released(self, state: ServerState) -> Sums:
        """The sums with their noise, repaired, in the features' unit."""
        asked, deviation = self.asked(), self.deviation
        sums = {name: t for name, t in state.slots.items() if name in ("gram", "sums", "counts")}
        if self.ring is not None:  # it came with them, more of it where more survived
            everybody = len(state.slots["reported"])
            deviation *= (state.slots["reported"].sum() / self.ring.least(everybody)) ** 0.5
        elif deviation:
            assert self.noise is not None, "noise is given once its release is written down"
            sums |= noised(sums, asked, deviation, self.noise)
        by_class = sums["sums"]
        scales = row_scales(asked, by_class.shape[1], self._row_unit(state))
        held = by_class[:, -1] / scales[-1] if asked.bias else sums["counts"]
        # Up, or a class of shortened rows, each less than one, might be lost; and a class that is
        # known to be there is not lost to noise where its count is only that of a bias.
        least = int(asked.bias and deviation > 0)
        counts = np.maximum(least, np.ceil(held - WHOLE)).astype(np.int64)
        out = {"counts": counts, "sums": by_class / scales}
        if asked.gram:
            gram = unpack_symmetric(sums["gram"])
            if deviation:
                with one_blas_thread():
                    gram = self._repaired(gram, by_class, counts, deviation)
            gram /= scales[:, None]
            gram /= scales
            out["gram"] = pack_symmetric(gram)
        return out

    def _repaired(
        self, gram: Float64, by_class: Float64, counts: Int64, deviation: float
    ) -> Float64:
        """A that some data could have given, and its ridge."""
        radius = deviation * (2 * len(gram)) ** 0.5
        if not (isinstance(self.then, FedLDA) and counts.any()):
            return repaired(gram, radius)
        kind = self.then.covariance
        freedom = max(1, int(counts.sum()) - (int((counts > 0).sum()) if kind == "within" else 1))
        covariance = pooled_covariance(gram, by_class, counts, kind)
        return gram + freedom * (repaired(covariance, radius / freedom) - covariance)


def repaired(matrix: Float64, radius: float) -> Float64:
    """The nearest positive semidefinite matrix (Frobenius), + radius I, symmetric to the bit."""
    values, vectors = np.linalg.eigh(matrix)
    roots = vectors * np.sqrt(np.maximum(values, 0.0))
    found = roots @ roots.T
    found.flat[:: len(found) + 1] += radius
    return np.asarray(found)

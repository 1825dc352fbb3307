"""Ridge heads from summed statistics, in one round: Fed3R, AFL and what all one-shot heads share.

Each client reports once; the server adds in float64, in client order, and solves. Who comes late is
added without repeating the others, who leaves is subtracted (``forget``). Sources: Fed3R, Fanì et
al. 2024 (arXiv 2406.01116), and the authors' released code; AFL, He et al. 2025 (2405.16240). With
A = sum z z^T, B = sum z y^T over all rows, both are W = (A + ridge I)^-1 B, AFL with ridge 0 after
the clients' own gamma I were taken out.

Deviations: AFL adds statistics instead of merging heads pairwise, which is the same algebra without
the recursion's growing error; a singular matrix takes the pseudo-inverse and sets the slot
``singular``; the score of a class without a single example is ABSENT, so it is never predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack

from fedtl import seeding
from fedtl.clients.blocks import one_blas_thread
from fedtl.clients.statistics import fourier_map, unpack_symmetric
from fedtl.errors import InputError
from fedtl.plans import RoundPlan, Shapes, Statistics
from fedtl.strategies.base import ServerState
from fedtl.types import ClientUpdates, Float64, Head, Int64, LocalTraining

ABSENT = -1e6
"""Bias of a class that nobody has: below every real score, finite for whoever trains on."""

Sums = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Solved:
    """A head in float64, weight [C, D] and bias [C], and whether a pseudo-inverse was needed."""

    weight: Float64
    bias: Float64
    singular: bool = False


class OneShot:
    """A strategy whose clients report statistics once.

    Slots: the sums that ``asked`` names, ``reported`` int64 [K] (1: in the sums) and ``singular``
    int64 [1] (1: the matrix had no inverse and the pseudo-inverse stands in for it).
    """

    def asked(self) -> Statistics:
        """What each client sums."""
        raise NotImplementedError

    def solved(self, slots: Sums) -> Solved:
        """The head that follows from the sums, over at least one example."""
        raise NotImplementedError

    def init(self, head: Head, num_clients: int) -> ServerState:
        """Nothing is summed yet. Raises InputError for a head that is not linear."""
        if layers := sorted(name for name in head if name.startswith("hidden.")):
            raise InputError(
                "closed-form strategies solve for a linear head",
                where="head.kind",
                got=f"tensors {', '.join(layers)}",
                allowed="linear",
            )
        slots = {name: np.zeros(*form) for name, form in self._sums(head, num_clients).items()}
        slots["reported"] = np.zeros(num_clients, np.int64)
        slots["singular"] = np.zeros(1, np.int64)
        return ServerState(head, slots)

    def plan(self, state: ServerState, plan: RoundPlan) -> RoundPlan:
        """Asks those of the cohort that have not reported yet."""
        still = plan.without(np.flatnonzero(state.slots["reported"]))
        return replace(still, task="statistics", statistics=self.asked())

    def absorb(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """Adds some clients' statistics, in client order."""
        return self._changed(state, updates.clients, updates.tensors, 1)

    def forget(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """Takes clients out of the sums again (F4); ``updates`` as they were absorbed."""
        return self._changed(state, updates.clients, updates.tensors, -1)

    def solve(self, state: ServerState) -> ServerState:
        """The head of the sums so far; unchanged while there is no example."""
        slots = dict(state.slots)
        if not slots["counts"].any():
            return state
        with one_blas_thread():
            found = self.solved(slots)
        bias = np.where(class_counts(slots) > 0, found.bias, ABSENT)
        slots["singular"] = np.array([found.singular], np.int64)
        with np.errstate(over="ignore"):  # an overflow is refused by the loop, with its round
            new = {
                "weight": np.ascontiguousarray(found.weight, np.float32),  # as files want it
                "bias": bias.astype(np.float32),
            }
        return ServerState({**state.head, **new}, slots)

    def step(self, state: ServerState, updates: ClientUpdates) -> ServerState:
        """``solve`` of ``absorb``."""
        return self.solve(self.absorb(state, updates))

    def finished(self, state: ServerState) -> bool:
        """Once every client has reported."""
        return bool(state.slots["reported"].all())

    def question(self) -> RoundPlan:
        """What each client is asked, put to nobody: for the form of an answer."""
        nobody = np.empty(0, np.int64)
        plan = RoundPlan(0, nobody, nobody.astype(np.uint64), LocalTraining(0, 1, 0.0))
        return replace(plan, task="statistics", statistics=self.asked())

    def _sums(self, head: Head, num_clients: int) -> Shapes:
        """The summed slots: one client's answer."""
        return self.question().reply(head)

    def _changed(
        self,
        state: ServerState,
        clients: Int64,
        tensors: ClientUpdates | Any,
        sign: Literal[1, -1],
    ) -> ServerState:
        """Sums with clients added (1) or taken out (-1); refuses what was or was not there."""
        slots = dict(state.slots)
        slots["reported"] = slots["reported"].copy()
        assert (slots["reported"][clients] == (sign < 0)).all(), "reports once, is taken out once"
        slots["reported"][clients] += sign
        self._combine(slots, clients, tensors, sign)
        return replace(state, slots=slots)

    def _combine(self, slots: Sums, clients: Int64, tensors: Any, sign: int) -> None:
        for name, tensor in tensors.items():
            slots[name] = slots[name].copy()
            combine = np.add if sign > 0 else np.subtract
            for own in tensor:
                combine(slots[name], own, out=slots[name])


def class_counts(slots: Sums) -> Int64:
    """N_c over all clients, int64 [C], whether counts are kept as a sum or by client."""
    counts = slots["counts"]
    return np.asarray(counts.sum(axis=0) if counts.ndim == 2 else counts)


@dataclass(frozen=True)
class Fed3R(OneShot):
    """Ridge regression onto one-hot labels; on a bias as on any other weight.

    With ``normalise`` a class's column is divided by its length, its bias by the same; scores are
    divided by ``temperature`` (the authors' 0.1) for a softmax. With random features the head is
    ``weight`` [C, R] over z = sqrt(2/R) cos(x Omega + b), with Omega^T and b beside it as
    ``fourier.weight`` [R, D] and ``fourier.bias`` [R].
    """

    ridge: float = 0.01
    bias: bool = True
    normalise: bool = True
    temperature: float = 0.1
    random_features: int = 0
    scale: float = 0.01
    keep_statistics: bool = True
    seed: int = 0

    def asked(self) -> Statistics:
        """A and B of features, or of random features that all clients share."""
        key = seeding.key(self.seed, "fourier") if self.random_features else 0
        return Statistics(
            bias=self.bias, random_features=self.random_features, scale=self.scale, key=key
        )

    def init(self, head: Head, num_clients: int) -> ServerState:
        """As for all; with random features the head has their map in front, and R columns."""
        if not self.random_features:
            return super().init(head, num_clients)
        asked = self.asked()
        num_classes, num_features = head["weight"].shape
        omega, shift = fourier_map(num_features, asked.random_features, asked.scale, asked.key)
        mapped = {
            **head,
            "weight": np.zeros((num_classes, self.random_features), np.float32),
            "fourier.weight": np.ascontiguousarray(omega.T, np.float32),
            "fourier.bias": shift.astype(np.float32),
        }
        return super().init(mapped, num_clients)

    def solved(self, slots: Sums) -> Solved:
        """(A + ridge I)^-1 B, scaled."""
        weights, singular = ridge_weights(slots, self.ridge)
        own = Solved(*split_bias(weights, self.bias), singular)
        return scaled(own, self.normalise, self.temperature)


@dataclass(frozen=True)
class AFL(OneShot):
    """Least squares; each client's gamma I is taken out again (``clean``) or left in.

    Left in, it is ridge regression with as many gammas as clients have reported.
    """

    gamma: float = 1.0
    clean: bool = True
    keep_statistics: bool = True

    def asked(self) -> Statistics:
        """A and B without a bias, as the paper has it."""
        return Statistics(bias=False)

    def solved(self, slots: Sums) -> Solved:
        """A^-1 B, or (A + K gamma I)^-1 B."""
        kept = 0.0 if self.clean else self.gamma * float(slots["reported"].sum())
        weights, singular = ridge_weights(slots, kept)
        return Solved(*split_bias(weights, False), singular)


def ridge_weights(sums: Sums, ridge: float) -> tuple[Float64, bool]:
    """W = (A + ridge I)^-1 B, float64 [W, C], of packed A and class sums B^T; see ``solve_psd``."""
    matrix = unpack_symmetric(sums["gram"])
    matrix.flat[:: len(matrix) + 1] += ridge
    return solve_psd(matrix, sums["sums"].T, regular=ridge > 0)


def solve_psd(matrix: Float64, right: Float64, *, regular: bool = False) -> tuple[Float64, bool]:
    """matrix^-1 right by Cholesky, or by the pseudo-inverse where there is no inverse.

    Args:
        matrix: symmetric positive semidefinite, float64 [W, W].
        right: float64 [W, C].
        regular: it has an inverse by construction, however small its smallest eigenvalue.

    Returns:
        The solution [W, C] and whether the pseudo-inverse was taken.
    """
    rounding = len(matrix) * np.finfo(np.float64).eps
    factor, failed = lapack.dpotrf(matrix, lower=1)
    if not failed:
        norm = max(float(np.abs(row).sum()) for row in matrix)  # without a second matrix
        condition, _ = lapack.dpocon(factor, norm, uplo="L")
        if regular or condition > rounding:
            found, _ = lapack.dpotrs(factor, right, lower=1)
            return np.ascontiguousarray(found), False
    inverse = np.linalg.pinv(matrix, rtol=rounding, hermitian=True)
    return np.asarray(inverse @ right), True


def split_bias(weights: Float64, bias: bool) -> tuple[Float64, Float64]:
    """W [W, C] as weight [C, D] and bias [C], the last row where there is one."""
    if bias:
        return weights[:-1].T, weights[-1]
    return weights.T, np.zeros(weights.shape[1])


def scaled(head: Solved, normalise: bool, temperature: float) -> Solved:
    """Each class's weights divided by their length, the bias by the same; all by temperature."""
    lengths = np.linalg.norm(head.weight, axis=1) if normalise else np.ones(len(head.weight))
    divisor = np.where(lengths > 0, lengths, 1.0) * temperature
    return Solved(head.weight / divisor[:, None], head.bias / divisor, head.singular)

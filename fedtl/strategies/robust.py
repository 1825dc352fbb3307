"""Robust rules: some clients of a round may send anything, and the head still follows the others.

Delta below is w_k - w, n the round's accepted updates, f those that may lie. A rule is as good as
its premise: at most f liars, and honest updates that are alike. Under label skew they are not
alike, and every rule here then also refuses honest clients; look at its result without an attack.
All of them need single updates, so none goes together with secure aggregation.

Sources and deviations:

- Krum and multi-Krum, Blanchard et al. 2017 (arXiv 1703.02757), section 4: a score is the sum of
  squared distances to the n - f - 2 nearest others; n > 2f + 2. Ties go to the lower client id.
  Multi-Krum weights the m updates it keeps like FedAvg (Flower does too); the paper's plain mean is
  ``weighting = "uniform"``.
- Bulyan, El Mhamdi et al. 2018 (1802.07927), section 4: Krum chooses n - 2f updates one after the
  other among those left, then each coordinate is the mean of the n - 4f values nearest to the
  median; n >= 4f + 3. The last choices are among fewer than f + 3, where Krum's n - f - 2 is below
  1: the nearest one counts then. Flower ranks once instead of choosing again and again.
- Median and trimmed mean, Yin et al. 2018 (1803.01498), definitions 1 and 2: by coordinate.
  floor(trim n) values are cut off at each end.
- Geometric median, Pillutla et al. 2022, RFA (1912.13445), algorithm 2: smoothed Weiszfeld with
  weights p_k. It starts at the round's head, not at the mean as the authors' code: one far update
  puts the mean so far away that few steps do not lead back.
- FLTrust, Cao et al. 2021 (2012.13995), equations 2 to 4. The server has no data of its own here; a
  client that it trusts takes its place.
- Norm clipping, Sun et al. 2019 (1911.07963), section 4: without the noise. The bound's default,
  the cohort's median length, is not theirs.

Krum, Bulyan, the medians by coordinate, the trimmed mean and FLTrust treat all clients alike, as
in their papers: their ``weighting`` is always "uniform".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fedtl.errors import PolicyStop
from fedtl.scenario.compatibility import least_clients
from fedtl.strategies.averaging import FedAvg
from fedtl.strategies.base import ServerState, Weighting, client_weights, mean_delta
from fedtl.types import ClientUpdates, Float32, Float64, Head, Int64

CHUNK_BYTES = 2**22
"""Of the updates that are looked at by column at a time: 4 MiB stay in a core's cache."""


@dataclass(frozen=True)
class Reweighted(FedAvg):
    """Base of rules that are a mean with weights of their own: sum_k s_k Delta_k."""

    def shares(self, head: Head, updates: ClientUpdates) -> Float64:
        """s_k, float64 [k]; all zero leave the head where it is."""
        return client_weights(updates, self.weighting)

    def _delta(self, state: ServerState, updates: ClientUpdates) -> dict[str, Float64]:
        return mean_delta(state.head, updates, self.shares(state.head, updates))


@dataclass(frozen=True)
class MultiKrum(Reweighted):
    """Mean of the ``selected`` (default n - f) updates with the lowest scores."""

    malicious: int = 1
    selected: int | None = None

    def shares(self, head: Head, updates: ClientUpdates) -> Float64:
        """Equal to the clients' weights among those chosen, 0 for the others."""
        count = len(updates.clients)
        _require("multikrum", count, self.malicious, self.selected)
        kept = self.selected or count - self.malicious
        scores = krum_scores(square_distances(head, updates), self.malicious)
        chosen = np.argsort(scores, kind="stable")[:kept]
        shares = np.zeros(count)
        shares[chosen] = client_weights(updates, self.weighting)[chosen]
        return _normalised(shares)


@dataclass(frozen=True)
class Krum(Reweighted):
    """The one update with the lowest score."""

    weighting: Weighting = "uniform"
    malicious: int = 1

    def shares(self, head: Head, updates: ClientUpdates) -> Float64:
        """1 for the chosen client."""
        _require("krum", len(updates.clients), self.malicious)
        scores = krum_scores(square_distances(head, updates), self.malicious)
        return np.asarray(np.eye(len(scores))[np.argmin(scores)])


@dataclass(frozen=True)
class Bulyan(FedAvg):
    """Krum's n - 2f choices, then by coordinate the mean of the n - 4f values near the median."""

    weighting: Weighting = "uniform"
    malicious: int = 1

    def _delta(self, state: ServerState, updates: ClientUpdates) -> dict[str, Float64]:
        count, f = len(updates.clients), self.malicious
        _require("bulyan", count, f)
        chosen = _repeated_krum(square_distances(state.head, updates), f, count - 2 * f)
        return _by_column(
            state.head, updates, lambda block: _near_median(block[:, chosen], count - 4 * f)
        )


@dataclass(frozen=True)
class Median(FedAvg):
    """The median of each coordinate; of an even number the mean of the two in the middle."""

    weighting: Weighting = "uniform"

    def _delta(self, state: ServerState, updates: ClientUpdates) -> dict[str, Float64]:
        cut = (len(updates.clients) - 1) // 2
        return _by_column(state.head, updates, lambda block: _trimmed(block, cut))


@dataclass(frozen=True)
class TrimmedMean(FedAvg):
    """The mean of each coordinate without its floor(trim n) lowest and highest values."""

    weighting: Weighting = "uniform"
    trim: float = 0.1

    def _delta(self, state: ServerState, updates: ClientUpdates) -> dict[str, Float64]:
        cut = trimmed_clients(self.trim, len(updates.clients))
        return _by_column(state.head, updates, lambda block: _trimmed(block, cut))


@dataclass(frozen=True)
class GeometricMedian(FedAvg):
    """The point with the least weighted sum of distances, by ``iterations`` Weiszfeld steps."""

    iterations: int = 8
    nu: float = 1e-6

    def _delta(self, state: ServerState, updates: ClientUpdates) -> dict[str, Float64]:
        weights = client_weights(updates, self.weighting)
        point = {name: np.zeros(tensor.shape) for name, tensor in state.head.items()}
        for _ in range(self.iterations):
            distances = lengths(state.head, updates, point)
            shares = _normalised(weights / np.maximum(self.nu, distances))
            point = mean_delta(state.head, updates, shares)
        return point


@dataclass(frozen=True)
class FLTrust(Reweighted):
    """Updates count by their cosine with the trusted client's, and are made as long as it.

    The trusted client's own update is the measure and is not averaged. Without it, or with nobody
    that agrees with it, the head stays.
    """

    weighting: Weighting = "uniform"
    root: int = 0

    def shares(self, head: Head, updates: ClientUpdates) -> Float64:
        """ReLU(cos(Delta_k, g_0)) |g_0| / |Delta_k| over the sum of the ReLU(cos)."""
        places = np.flatnonzero(updates.clients == self.root)
        own = lengths(head, updates)
        shares = np.zeros(len(own))
        if not len(places) or own[places[0]] == 0:
            return shares
        root = int(places[0])
        moved = np.flatnonzero((own > 0) & (np.arange(len(own)) != root))
        cosines = _products(head, updates, root)[moved] / (own[moved] * own[root])
        shares[moved] = _normalised(np.maximum(0, cosines)) * (own[root] / own[moved])
        return shares


@dataclass(frozen=True)
class NormClip(Reweighted):
    """FedAvg of updates that are first shortened to ``max_norm``, or to the median length."""

    max_norm: float | None = None

    def shares(self, head: Head, updates: ClientUpdates) -> Float64:
        """p_k min(1, max_norm / |Delta_k|)."""
        own = lengths(head, updates)
        bound = float(np.median(own)) if self.max_norm is None else self.max_norm
        shortened = np.minimum(1.0, bound / np.maximum(own, TINY))
        return client_weights(updates, self.weighting) * shortened


TINY = float(np.finfo(np.float64).tiny)


def trimmed_clients(trim: float, count: int) -> int:
    """How many of ``count`` values are cut off at each end; never all of them, as trim < 0.5."""
    return int(np.floor(trim * count + 1e-9))  # 0.29 * 100 is 28.999999999999996


def krum_scores(distances: Float64, malicious: int) -> Float64:
    """Sum of each update's n - f - 2 smallest squared distances to others, float64 [n].

    Args:
        distances: float64 [n, n], squared.
        malicious: f.
    """
    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    others.sort(axis=1)
    return np.asarray(others[:, : max(1, len(others) - malicious - 2)].sum(axis=1))


def square_distances(head: Head, updates: ClientUpdates) -> Float64:
    """Squared distances between all updates, float64 [k, k], symmetric bit for bit.

    From the Gram matrix, a few coordinates at a time. Their median is taken off first: what is left
    of honest updates is as small as they differ, however far away a liar is, so that nothing
    cancels that matters.
    """
    gram = np.zeros((len(updates.clients),) * 2)
    for _, _, block in _columns(head, updates):
        centred = block - np.median(block, axis=1).astype(np.float64)[:, None]
        gram += centred.T @ centred
    squares = gram.diagonal()
    return np.maximum(0.0, squares[:, None] + squares - 2 * gram)


def lengths(
    head: Head, updates: ClientUpdates, point: Mapping[str, Float64] | None = None
) -> Float64:
    """|Delta_k - point|, float64 [k]; ``point`` is 0 where none is given."""
    squares = np.zeros(len(updates.clients))
    for name, start in head.items():
        base = start.astype(np.float64) if point is None else start + point[name]
        for place, tensor in enumerate(updates.tensors[name]):
            squares[place] += np.square(tensor - base).sum()
    return np.sqrt(squares)


def _products(head: Head, updates: ClientUpdates, root: int) -> Float64:
    """<Delta_k, Delta_root>, float64 [k]."""
    products = np.zeros(len(updates.clients))
    for name, start in head.items():
        base = start.astype(np.float64)
        measure = updates.tensors[name][root] - base
        for place, tensor in enumerate(updates.tensors[name]):
            products[place] += ((tensor - base) * measure).sum()
    return products


def _repeated_krum(distances: Float64, malicious: int, wanted: int) -> Int64:
    """Krum's choice, removed, and again, ``wanted`` times: places, int64, ascending."""
    left = np.arange(len(distances))
    for _ in range(wanted):
        scores = krum_scores(distances[np.ix_(left, left)], malicious)
        left = np.delete(left, np.argmin(scores))
    return np.setdiff1d(np.arange(len(distances)), left)


def _columns(head: Head, updates: ClientUpdates) -> Iterator[tuple[str, slice, Float32]]:
    """All coordinates of the updates in chunks: tensor, place in it, and values [c, k] (a copy)."""
    count = len(updates.clients)
    at_a_time = max(1, CHUNK_BYTES // (4 * count))
    for name in head:
        flat = updates.tensors[name].reshape(count, -1)
        for first in range(0, flat.shape[1], at_a_time):
            part = slice(first, first + at_a_time)
            yield name, part, np.ascontiguousarray(flat[:, part].T)


def _by_column(
    head: Head, updates: ClientUpdates, combine: Callable[[Float32], Float64]
) -> dict[str, Float64]:
    """A rule for numbers ([c, k] -> [c]) on each coordinate of the updates, minus the head's.

    All such rules move with their values, so nothing is subtracted from each of them.
    """
    combined = {name: np.empty(tensor.size) for name, tensor in head.items()}
    for name, part, block in _columns(head, updates):
        combined[name][part] = combine(block)
    return {name: combined[name].reshape(head[name].shape) - head[name] for name in head}


def _trimmed(block: Float32, cut: int) -> Float64:
    """Mean along the last axis without the ``cut`` lowest and highest; reorders ``block``."""
    stop = block.shape[1] - cut
    block.partition((cut, stop - 1), axis=1)
    return np.asarray(block[:, cut:stop].mean(axis=1, dtype=np.float64))


def _near_median(block: Float32, count: int) -> Float64:
    """Mean of the ``count`` values nearest to the median, along the last axis.

    Of two equally near ones the lower counts, whoever sent it.
    """
    values = np.sort(block, axis=1).astype(np.float64)
    apart = np.abs(values - np.median(values, axis=1, keepdims=True))
    nearest = np.argsort(apart, axis=1, kind="stable")[:, :count]
    return np.asarray(np.take_along_axis(values, nearest, axis=1).mean(axis=1))


def _normalised(shares: Float64) -> Float64:
    """Shares that sum to 1, or all 0 if they were."""
    total = shares.sum()
    return shares / total if total > 0 else shares


def _require(rule: str, count: int, malicious: int, selected: int | None = None) -> None:
    needed = least_clients(rule, malicious, selected)
    if count < needed:
        raise PolicyStop(
            f"{rule} needs {needed} updates to withstand {malicious} liars (strategy.malicious), "
            f"and the round has {count}; the rounds before it are kept",
            do="Resume when the clients are back, lower strategy.malicious, or set "
            f"participation.quorum = {needed} to pass over such rounds",
        )

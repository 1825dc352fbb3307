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
  weights p_k. It starts at the mean of the updates shortened to their median length, not at the
  plain mean as the authors' code: one far update would put it so far away that few steps do not
  lead back. Nor at the round's head, where one client that does not move would hold it.
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

from fedtl.clients.blocks import one_blas_thread
from fedtl.errors import PolicyStop
from fedtl.scenario.compatibility import least_clients
from fedtl.strategies.averaging import FedAvg
from fedtl.strategies.base import ServerState, Weighting, client_weights, mean_delta
from fedtl.types import ClientUpdates, Float32, Float64, Head, Int64

CHUNK_BYTES = 2**23
"""Of Delta that are held as float64 at a time."""

BLOCK_BYTES, COLUMNS = 2**18, 64
"""Coordinates are combined a block at a time (of at least so many columns) and sorted so many
columns at a time: small enough for a core's second and first cache with 100 clients."""


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
        chosen = repeated_krum(square_distances(state.head, updates), f, count - 2 * f)
        kept = {name: updates.tensors[name][chosen] for name in state.head}
        return _by_column(state.head, kept, lambda values: _near_median(values, count - 4 * f))


@dataclass(frozen=True)
class Median(FedAvg):
    """The median of each coordinate; of an even number the mean of the two in the middle."""

    weighting: Weighting = "uniform"

    def _delta(self, state: ServerState, updates: ClientUpdates) -> dict[str, Float64]:
        cut = (len(updates.clients) - 1) // 2
        return _by_column(state.head, updates.tensors, lambda values: _middle(values, cut))


@dataclass(frozen=True)
class TrimmedMean(FedAvg):
    """The mean of each coordinate without its floor(trim n) lowest and highest values."""

    weighting: Weighting = "uniform"
    trim: float = 0.1

    def _delta(self, state: ServerState, updates: ClientUpdates) -> dict[str, Float64]:
        cut = trimmed_clients(self.trim, len(updates.clients))
        return _by_column(state.head, updates.tensors, lambda values: _middle(values, cut))


@dataclass(frozen=True)
class GeometricMedian(Reweighted):
    """The point with the least weighted sum of distances, by ``iterations`` Weiszfeld steps."""

    iterations: int = 8
    nu: float = 1e-6

    def shares(self, head: Head, updates: ClientUpdates) -> Float64:
        """beta_k = p_k / max(nu, |v - Delta_k|) over their sum, at the last point v.

        All points are sums s_k Delta_k, so the distances follow from the Gram matrix G:
        |v - Delta_k|^2 = s^T G s - 2 (G s)_k + G_kk.
        """
        weights, gram = client_weights(updates, self.weighting), products(head, updates)
        shares = weights * shortened(np.sqrt(gram.diagonal()))
        for _ in range(self.iterations):
            along = gram @ shares
            squares = shares @ along - 2 * along + gram.diagonal()
            shares = _normalised(weights / np.maximum(self.nu, np.sqrt(np.maximum(0, squares))))
        return shares


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
        shares = np.zeros(len(updates.clients))
        places = np.flatnonzero(updates.clients == self.root)
        if not len(places):
            return shares
        own, along = lengths(head, updates), products_with(head, updates, int(places[0]))
        measure = own[places[0]]
        moved = np.flatnonzero((own > 0) & (updates.clients != self.root))
        if measure > 0:
            trust = np.maximum(0, along[moved] / (own[moved] * measure))
            shares[moved] = _normalised(trust) * (measure / own[moved])
        return shares


@dataclass(frozen=True)
class NormClip(Reweighted):
    """FedAvg of updates that are first shortened to ``max_norm``, or to the median length."""

    max_norm: float | None = None

    def shares(self, head: Head, updates: ClientUpdates) -> Float64:
        """p_k min(1, max_norm / |Delta_k|)."""
        own = lengths(head, updates)
        return client_weights(updates, self.weighting) * shortened(own, self.max_norm)


def shortened(own: Float64, max_norm: float | None = None) -> Float64:
    """What each update is multiplied by so that none is longer, float64 [k], in [0, 1].

    Args:
        own: their lengths.
        max_norm: None for the median of these.
    """
    bound = float(np.median(own)) if max_norm is None else max_norm
    return np.divide(bound, own, out=np.ones_like(own), where=own > bound)


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


def products(head: Head, updates: ClientUpdates) -> Float64:
    """The Gram matrix <Delta_i, Delta_j>, float64 [k, k], symmetric bit for bit.

    What cancels in distances |Delta_i - Delta_j|^2 made of it is 2^-52 |Delta|^2, and updates that
    came as float32 are themselves known to 2^-24 |Delta| only: it is never more than that hides.
    Liars far away do no harm to the products of the others.
    """
    gram = np.zeros((len(updates.clients),) * 2)
    with one_blas_thread():
        for deltas in _deltas(head, updates):
            gram += deltas @ deltas.T
    return gram


def products_with(head: Head, updates: ClientUpdates, place: int) -> Float64:
    """<Delta_k, Delta_place>, float64 [k]."""
    return np.asarray(sum(np.einsum("kc,c->k", x, x[place]) for x in _deltas(head, updates)))


def lengths(head: Head, updates: ClientUpdates) -> Float64:
    """|Delta_k|, float64 [k]."""
    squares = sum(np.einsum("kc,kc->k", x, x) for x in _deltas(head, updates))
    return np.asarray(np.sqrt(squares))


def square_distances(head: Head, updates: ClientUpdates) -> Float64:
    """Squared distances between all updates, float64 [k, k], symmetric bit for bit."""
    gram = products(head, updates)
    squares = gram.diagonal()
    return np.maximum(0.0, squares[:, None] + squares - 2 * gram)


def repeated_krum(distances: Float64, malicious: int, wanted: int) -> Int64:
    """Krum's choice, removed, and again, ``wanted`` times: places, int64, ascending."""
    from fedtl.strategies.repeated_krum import choose

    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    chosen = np.zeros(wanted, np.int64)
    choose(distances, np.argsort(others, axis=1)[:, :-1], malicious, chosen)
    return np.sort(chosen)


def _deltas(head: Head, updates: ClientUpdates) -> Iterator[Float64]:
    """All Delta_k as float64 [k, c], some coordinates at a time."""
    count = len(updates.clients)
    at_a_time = max(1, CHUNK_BYTES // (8 * count))
    for name, start in head.items():
        flat, base = updates.tensors[name].reshape(count, -1), start.ravel().astype(np.float64)
        for part in _parts(base.size, at_a_time):
            yield flat[:, part] - base[part]


def _by_column(
    head: Head, tensors: Mapping[str, Float32], combine: Callable[[Float32], Float64]
) -> dict[str, Float64]:
    """A rule for sorted numbers ([k, c] -> [c]) on each coordinate, minus the head's.

    All such rules move with their values, so nothing is subtracted from each of them.
    """
    combined = {name: np.empty(tensor.size) for name, tensor in head.items()}
    for name, result in combined.items():
        count = len(tensors[name])
        flat, at_a_time = tensors[name].reshape(count, -1), BLOCK_BYTES // (4 * count)
        for part in _parts(result.size, max(COLUMNS, at_a_time)):
            block = flat[:, part].copy()
            for columns in _parts(block.shape[1], COLUMNS):
                block[:, columns].sort(axis=0)
            result[part] = combine(block)
    return {name: combined[name].reshape(head[name].shape) - head[name] for name in head}


def _parts(size: int, length: int) -> Iterator[slice]:
    return (slice(first, first + length) for first in range(0, size, length))


def _middle(values: Float32, cut: int) -> Float64:
    """Mean over the first axis without the ``cut`` first and last."""
    return np.asarray(values[cut : len(values) - cut].mean(axis=0, dtype=np.float64))


def _near_median(values: Float32, count: int) -> Float64:
    """Mean of the ``count`` values nearest to the median, over the first, sorted axis.

    They are neighbours; of two equally near ones the lower counts, whoever sent it.
    """
    cut = len(values) - count
    median = _middle(values, (len(values) - 1) // 2)
    farthest = np.maximum(median - values[: cut + 1], values[count - 1 :] - median)
    first = farthest.argmin(axis=0)
    # whatever the window, its middle is in it: only the ends are chosen from
    ends = np.r_[:cut, max(cut, count) : len(values)]
    inside = (ends[:, None] >= first) & (ends[:, None] < first + count)
    chosen = values[ends].sum(axis=0, dtype=np.float64, where=inside)
    return np.asarray((values[cut:count].sum(axis=0, dtype=np.float64) + chosen) / count)


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

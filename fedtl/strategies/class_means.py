"""Heads from class means and covariances, in one round: FedNCM, FedLDA, CCVR, FedCOF.

Sources: FedNCM, Legate et al. 2023 (arXiv 2306.03937); FedLDA, linear discriminant analysis from
summed statistics as in FedCGS, Guan et al. 2025; CCVR, Luo et al. 2021 (2106.05001); FedCOF,
Goswami et al. 2025 (2412.14326), Algorithm 1, and the authors' released code. Each class has its
equation.

Deviations: all sums are in float64. FedLDA inverts the within-class covariance unless told to take
the total one (FedCGS's code does), and shrinks it. CCVR merges covariances as sums of squares, the
same algebra as the paper's; it shrinks them, and the new head is trained to the optimum from zero,
with a small weight decay so that there is one, instead of by SGD from the federated head. FedCOF's
pseudo-inverse is a Cholesky factor where the matrix has an inverse. Classes without examples: see
``closed_form.ABSENT``.

What a client sends for a class of which it has a single example is that example's features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import lapack
from scipy.optimize import minimize
from scipy.special import logsumexp

from fedtl import seeding
from fedtl.clients.statistics import unpack_symmetric
from fedtl.plans import Personal, Shapes, Statistics
from fedtl.strategies.base import ServerState
from fedtl.strategies.closed_form import (
    OneShot,
    Solved,
    Sums,
    class_counts,
    scaled,
    solve_psd,
)
from fedtl.strategies.personal import client_prior
from fedtl.types import Float64, Head, Int64

CALIBRATION_DECAY = 1e-4
"""CCVR: weight decay of the new head; separable samples would have no finite optimum."""

CALIBRATION_STEPS = 500


def class_means(sums: Float64, counts: Int64) -> Float64:
    """mu_c, float64 [C, D]; zero for a class without examples."""
    return np.asarray(sums / np.maximum(counts, 1)[:, None])


@dataclass(frozen=True)
class FedNCM(OneShot):
    """The class means are the weights, each divided by its length with ``normalise``."""

    normalise: bool = True
    temperature: float = 0.1

    def asked(self) -> Statistics:
        """Class sums and counts."""
        return Statistics(gram=False, bias=False)

    def solved(self, slots: Sums) -> Solved:
        """mu_c / |mu_c|."""
        means = class_means(slots["sums"], slots["counts"])
        return scaled(Solved(means, np.zeros(len(means))), self.normalise, self.temperature)


@dataclass(frozen=True)
class FedLDA(OneShot):
    """W_c = S^-1 mu_c, b_c = -mu_c^T S^-1 mu_c / 2 + log N_c / N, S the shrunken covariance.

    ``client_prior`` changes nothing here: the shared head has the shared prior, and a client that
    judges with its own replaces the last term, see ``lda_bias``.
    """

    covariance: str = "within"
    shrinkage: float = 0.1
    client_prior: bool = False

    def personal(self, state: ServerState) -> Personal | None:
        """With ``client_prior`` each client's own class frequencies in place of everybody's."""
        counts = state.slots["counts"]
        return client_prior(counts) if self.client_prior and counts.any() else None

    def asked(self) -> Statistics:
        """A and class sums."""
        return Statistics(bias=False)

    def solved(self, slots: Sums) -> Solved:
        """One solve for all classes."""
        counts, sums = slots["counts"], slots["sums"]
        means = class_means(sums, counts)
        covariance = shrunken(
            pooled_covariance(unpack_symmetric(slots["gram"]), sums, counts, self.covariance),
            self.shrinkage,
        )
        weights, singular = solve_psd(covariance, means.T)
        weight = np.ascontiguousarray(weights.T)
        return Solved(weight, lda_bias(means, weight, counts / counts.sum()), singular)


def lda_bias(means: Float64, weight: Float64, prior: Float64) -> Float64:
    """b_c = -mu_c^T w_c / 2 + log pi_c, float64 [C]; 0 where pi_c is 0 and means nothing.

    Args:
        means, weight: mu and S^-1 mu, [C, D].
        prior: pi, [C], sums to 1.
    """
    logs = np.log(np.where(prior > 0, prior, 1.0))
    return np.asarray(-0.5 * (means * weight).sum(axis=1) + logs)


def pooled_covariance(gram: Float64, sums: Float64, counts: Int64, kind: str) -> Float64:
    """The within-class or total covariance [D, D] from A, class sums and counts.

    Within: (A - sum_c N_c mu_c mu_c^T) / (N - classes that have examples); total:
    (A - N mu mu^T) / (N - 1). Without degrees of freedom the divisor is 1 and the matrix zero.
    """
    held = counts > 0
    if kind == "within":
        roots = sums[held] / np.sqrt(counts[held])[:, None]
        freedom = counts.sum() - held.sum()
    else:
        roots = (sums.sum(axis=0) / np.sqrt(counts.sum()))[None, :]
        freedom = counts.sum() - 1
    return np.asarray((gram - roots.T @ roots) / max(1, int(freedom)))


def shrunken(covariance: Float64, shrinkage: float) -> Float64:
    """(1 - s) S + s (tr S / D) I."""
    mixed = (1 - shrinkage) * covariance
    mixed.flat[:: len(mixed) + 1] += shrinkage * np.trace(covariance) / len(mixed)
    return mixed


@dataclass(frozen=True)
class CCVR(OneShot):
    """Virtual features from a Gaussian for each class, and a softmax head trained on them.

    S_c = (sum_k [(n_kc - 1) S_kc + n_kc mu_kc mu_kc^T] - N_c mu_c mu_c^T) / (N_c - 1). The server
    holds a Gram matrix for each class: C D (D + 1) / 2 numbers.
    """

    samples: int = 200
    shrinkage: float = 0.1
    seed: int = 0

    def asked(self) -> Statistics:
        """A for each class, class sums."""
        return Statistics(gram=False, class_grams=True, bias=False)

    def solved(self, slots: Sums) -> Solved:
        """Merge, sample, train."""
        counts, sums = slots["counts"], slots["sums"]
        means, held = class_means(sums, counts), np.flatnonzero(counts)
        stream = seeding.generator(self.seed, "ccvr")
        drawn = []
        for c in held.tolist():
            gram = unpack_symmetric(slots["class_grams"][c])
            covariance = pooled_covariance(gram, sums[c : c + 1], counts[c : c + 1], "total")
            root = _root(shrunken(covariance, self.shrinkage))
            drawn.append(means[c] + stream.standard_normal((self.samples, len(root))) @ root.T)
        labels = np.repeat(np.arange(len(held)), self.samples)
        weight, bias = np.zeros(means.shape), np.zeros(len(means))
        weight[held], bias[held] = softmax_head(np.concatenate(drawn), labels, len(held))
        return Solved(weight, bias)


def _root(covariance: Float64) -> Float64:
    """R with R R^T = covariance, which may be singular."""
    factor, failed = lapack.dpotrf(covariance, lower=1, clean=1)
    if not failed:
        return np.asarray(factor)
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def softmax_head(x: Float64, labels: Int64, num_classes: int) -> tuple[Float64, Float64]:
    """The linear head with the least mean cross-entropy + CALIBRATION_DECAY / 2 |w|^2.

    Args:
        x: float64 [n, D].
        labels: int64 [n], in [0, C).

    Returns:
        Weight [C, D] and bias [C].
    """
    rows, width = np.arange(len(x)), x.shape[1]
    scale = float(np.sqrt(np.square(x).mean())) or 1.0  # of any unit, the search goes the same way
    x = x / scale
    # of the true weights: bias is not scaled
    decay = np.tile([*[CALIBRATION_DECAY / scale**2] * width, CALIBRATION_DECAY], num_classes)

    def objective(flat: Float64) -> tuple[float, Float64]:
        head = flat.reshape(num_classes, width + 1)
        scores = x @ head[:, :-1].T + head[:, -1]
        logs = scores - logsumexp(scores, axis=1, keepdims=True)
        residual = np.exp(logs)
        residual[rows, labels] -= 1
        residual /= len(x)
        gradient = np.concatenate([residual.T @ x, residual.sum(axis=0)[:, None]], axis=1)
        loss = -logs[rows, labels].mean() + (decay * np.square(flat)).sum() / 2
        return float(loss), gradient.ravel() + decay * flat

    found: Any = minimize(
        objective,
        np.zeros(num_classes * (width + 1)),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": CALIBRATION_STEPS, "gtol": 1e-7, "ftol": 1e-12},
    )
    head = found.x.reshape(num_classes, width + 1)
    return head[:, :-1] / scale, head[:, -1]


@dataclass(frozen=True)
class FedCOF(OneShot):
    """Ridge on a Gram matrix estimated from the scatter of the clients' class means.

    The server holds each client's class sums: K C D numbers; a sum over clients would not do, so
    this is at odds with secure aggregation. Biased where clients' features differ (feature shift).
    """

    gamma: float = 0.1
    normalise: bool = True
    temperature: float = 0.1

    def asked(self) -> Statistics:
        """Class sums and counts."""
        return Statistics(gram=False, bias=False)

    def solved(self, slots: Sums) -> Solved:
        """normalise(G^-1 B), without the scatter between classes."""
        gram = estimated_gram(slots["sums"], slots["counts"], self.gamma)
        weights, singular = solve_psd(gram, slots["sums"].sum(axis=0).T)
        weight = np.ascontiguousarray(weights.T)
        own = Solved(weight, np.zeros(len(weight)), singular)
        return scaled(own, self.normalise, self.temperature)

    def _sums(self, head: Head, num_clients: int) -> Shapes:
        own = super()._sums(head, num_clients)
        return {name: ((num_clients, *shape), dtype) for name, (shape, dtype) in own.items()}

    def _combine(self, slots: Sums, clients: Int64, tensors: Any, sign: int) -> None:
        for name, tensor in tensors.items():
            slots[name] = slots[name].copy()
            slots[name][clients] = tensor if sign > 0 else 0


def scatter_covariance(sums: Float64, counts: Int64) -> Float64:
    """One class's covariance [D, D] from its clients' sums [K, D] and counts [K].

    sum_k n_k (mu_k - mu)(mu_k - mu)^T / (K_c - 1) over the K_c clients that have the class; where
    only one has it the divisor is 1 (released code) and the matrix zero.
    """
    held = counts > 0
    own, sizes = sums[held], counts[held][:, None]
    mean = own.sum(axis=0) / max(1, int(sizes.sum()))
    roots = (own / sizes - mean) * np.sqrt(sizes)
    return np.asarray(roots.T @ roots / max(1, int(held.sum()) - 1))


def estimated_gram(sums: Float64, counts: Int64, gamma: float) -> Float64:
    """G = sum_c (N_c - 1) (S_c + gamma I) + N mu mu^T, [D, D], from [K, C, D] and [K, C]."""
    totals = class_counts({"counts": counts})
    mean = sums.sum(axis=(0, 1)) / totals.sum()
    gram = totals.sum() * np.outer(mean, mean)
    for c in np.flatnonzero(totals > 1).tolist():
        covariance = scatter_covariance(sums[:, c], counts[:, c])
        covariance.flat[:: len(covariance) + 1] += gamma
        gram += (totals[c] - 1) * covariance
    return np.asarray(gram)

"""How the coins fell, told from the head: a score for each coin, made without looking at it.

With s_i = +-1/2 for a canary in or out, a linear head that was trained with the canaries differs
from the one halfway between by about

    M = factor sum_i s_i D_i + rest,    D_i = r_i z_i^T,

z the row's features with a 1 for the bias and r = y - p its residual: the direction in which the
row pushes. With Gaussian rest of variance v an entry, the best linear guess of s is

    factor (factor^2 K + 4 v I)^-1 t,   K_ij = <D_i, D_j>,   t_i = <M, D_i>,

which also takes out what other canaries push the same way. Of a pair D_i is the difference of its
two rows' directions, of a client the sum of its rows'.

Where M comes from:

- heads that follow from summed A and B (fed3r, afl, fedncm): the sums are known but for the coins,
  so M is what is missing in (A + ridge I) W = B with every coin counted half; each class's scale
  is fitted. Then M is sum_i s_i D_i exactly, with noise on the sums plus noise. All this in the
  units in which sums are released, where they are (``privacy.statistics``).
- all others: M is the way from the mean of two shadow heads whose coins fell in opposite ways.
  The factor is fitted to these two.

A head that is not linear gives the confidence in the row less the same two heads' mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve
from scipy.special import softmax

from fedtl import seeding
from fedtl.audit.reopened import Reopened
from fedtl.audit.scores import confidences_of
from fedtl.audit.shadows import shadow_head, solves_from_sums
from fedtl.interrupts import Interrupts
from fedtl.privacy.statistics import protect_rows, row_scales
from fedtl.strategies.class_means import FedLDA, FedNCM
from fedtl.strategies.closed_form import ABSENT, AFL, OneShot, solve_psd
from fedtl.strategies.private import Private
from fedtl.strategies.private_release import PrivateRelease
from fedtl.types import Float64, Head, Int64, Population

Mask = npt.NDArray[np.bool_]

ROWS = 2048
"""Rows widened to float64 at a time: 20 MB of 1,280 features."""

LEAST_NOISE = 1e-6
"""Of the canaries' own mean square: below that K would have no inverse."""


@dataclass(frozen=True)
class Coins:
    """What fair coins decided.

    Attributes:
        inside: how they fell, bool [m].
        rows: rows of the feature matrix on which coins decide, int64 [n].
        owner: which coin each of ``rows`` belongs to, ascending, int64 [n].
        signs: +1 for a row that is trained on if its coin falls inside, -1 if outside, float64 [n].
        deal: the training population had the coins fallen another way.
    """

    inside: Mask
    rows: Int64
    owner: Int64
    signs: Float64
    deal: Callable[[Mask], Population]

    def __len__(self) -> int:
        return len(self.inside)


def coin_scores(run: Reopened, coins: Coins, interrupts: Interrupts) -> tuple[Float64, str]:
    """A score for each coin, [m], larger where "inside" is likelier, and how they were made."""
    strategy = solves_from_sums(run)
    if strategy is not None and not isinstance(strategy, FedLDA):
        return _from_sums(run, coins, strategy), "what is missing in the head's own equations"
    stream = seeding.generator(run.scenario.seed, "audit_coins")
    fallen = stream.integers(0, 2, len(coins)).astype(bool)
    heads = []
    for number, way in enumerate((fallen, ~fallen)):
        interrupts.check("interrupted while shadow heads were trained")
        heads.append(shadow_head(run, coins.deal(way), -1 - number, interrupts))
    if set(run.head) != {"weight", "bias"}:
        return _from_confidence(run, coins, heads), "confidence against two shadow federations"
    middle, half = ((_matrix(heads[0]) + sign * _matrix(heads[1])) / 2 for sign in (1.0, -1.0))
    z, labels = _features(run, coins.rows, biased=True), run.trained.labels[coins.rows]
    push = -softmax(z @ middle.T, axis=1)
    push[np.arange(len(labels)), labels] += 1
    directions = Directions.of(z, push * _weight(run, coins, z, push)[:, None], coins)
    expected = np.where(fallen, 0.5, -0.5)
    shadow = directions.along(half)
    square = float(expected @ directions.gram @ expected)
    factor = float(expected @ shadow) / square if square > 0 else 0.0
    found = best_guess(directions, _matrix(run.head) - middle, factor)
    return found, "the head's movement against two shadow federations"


def best_guess(directions: Directions, movement: Float64, factor: float = 1.0) -> Float64:
    """The best linear guess of s, float64 [m]; zeros where nothing moved.

    Args:
        movement: M, [C, W].
        factor: how far a canary moves the head along its direction.
    """
    gram = factor**2 * directions.gram
    own = float(np.trace(gram)) / 4
    rest = max(float(np.square(movement).sum()) - own, 0.0) / movement.size
    rest = max(rest, LEAST_NOISE * own / max(1, len(gram)), np.finfo(np.float64).tiny)
    gram.flat[:: len(gram) + 1] += 4 * rest
    found = cho_solve(cho_factor(gram, lower=True), factor * directions.along(movement))
    return np.asarray(found)


@dataclass(frozen=True)
class Directions:
    """D_1 to D_m, never all at once: K [m, m], and their products with a matrix."""

    z: Float64
    push: Float64
    owner: Int64
    gram: Float64

    @staticmethod
    def of(z: Float64, push: Float64, coins: Coins) -> Directions:
        """From rows' features [n, W] and residuals [n, C]."""
        push = push * coins.signs[:, None]
        starts = np.searchsorted(coins.owner, np.arange(len(coins)))
        if len(z) <= 2 * len(coins):  # rows by rows, whatever the number of classes
            products = (z @ z.T) * (push @ push.T)
            gram = np.add.reduceat(np.add.reduceat(products, starts, axis=0), starts, axis=1)
        else:
            gram = np.zeros((len(coins), len(coins)))
            for c in range(push.shape[1]):
                own = np.add.reduceat(z * push[:, c : c + 1], starts, axis=0)
                gram += own @ own.T
        return Directions(z, push, coins.owner, gram)

    def along(self, matrix: Float64) -> Float64:
        """<matrix, D_i>, float64 [m], of a matrix [C, W]."""
        rows = ((self.z @ matrix.T) * self.push).sum(axis=1)
        return np.bincount(self.owner, rows, minlength=len(self.gram)).astype(np.float64)


def _from_sums(run: Reopened, coins: Coins, strategy: OneShot) -> Float64:
    known = _Known.of(run, coins, strategy)
    head, held = known.head, np.asarray(known.head.any(axis=1))
    z, labels = known.features(coins.rows), run.trained.labels[coins.rows]
    truth = np.zeros((len(labels), len(head)))
    truth[np.arange(len(labels)), labels] = 1
    gram, sums = known.halfway()
    if isinstance(strategy, FedNCM):  # the head is the sums themselves
        expected, answer, push = sums, head, truth
    else:
        gram.flat[:: len(gram) + 1] += known.ridge
        expected, answer, push = sums, head @ gram, truth
    scale = _scales_of(answer, expected, None if known.deviation else z)
    missing = np.where(held[:, None], answer * scale[:, None] - expected, 0.0)
    if not isinstance(strategy, FedNCM):
        # Without noise what a row adds is just what is left of its label; noise in the head would
        # come into that, so then it is what the head halfway leaves of it.
        middle = solve_psd(gram, sums.T, regular=bool((known.ridge > 0).all()))[0].T
        push = truth - z @ (middle if known.deviation else head * scale[:, None]).T
    push[:, ~held] = 0
    push *= 2 * known.weight[coins.rows, None]  # it was halved
    return best_guess(Directions.of(z, push, coins), missing)


def _scales_of(answer: Float64, expected: Float64, coins: Float64 | None) -> Float64:
    """By what each class's answer [C, W] falls short of what is expected, [C]; 1 where unknown.

    Args:
        coins: rows [n, W] of which nobody knows whether they are in the answer: without noise what
            is across them all is as expected to the last digit. None with noise; then the error is
            in the answer, and is not squared.
    """
    if coins is not None and len(coins) < coins.shape[1]:
        basis = np.linalg.qr(coins.T)[0]
        answer, expected = (m - (m @ basis) @ basis.T for m in (answer, expected))
    along = (answer * expected).sum(axis=1)
    square = (expected * expected).sum(axis=1)
    return np.asarray(np.divide(square, along, out=np.ones_like(along), where=along > 0))


@dataclass(frozen=True)
class _Known:
    """What an attacker knows of the sums behind a head: all but the coins.

    Attributes:
        head: W in the units of the sums, [C, W + 1]; zeros for a class that nobody has.
        weight: how much of each row of the feature matrix is in the sums, with coins at one half.
    """

    run: Reopened
    strategy: OneShot
    head: Float64
    weight: Float64

    @staticmethod
    def of(run: Reopened, coins: Coins, strategy: OneShot) -> _Known:
        head = _matrix(run.head)
        head[head[:, -1] <= ABSENT / 2] = 0
        weight = np.zeros(len(run.trained.labels))
        weight[run.trained.train.index] = 1
        weight[coins.rows] = 0.5
        known = _Known(run, strategy, head, weight)
        if not known.row_clip:
            return known
        # a score is W z: what makes z shorter makes W longer, but prototypes are made of z
        scales = known.scales
        known = replace(
            known, head=head * scales if isinstance(strategy, FedNCM) else head / scales
        )
        privacy = run.scenario.privacy
        if (privacy.unit or "example") == "client":
            known.shorten_clients(privacy.clip)
        return known

    @property
    def row_clip(self) -> float:
        """Length of a row that counts as 1 in a release; 0 where there is none."""
        own = self.run.first[1].protection
        return own.row_clip if own is not None else 0.0

    @property
    def deviation(self) -> float:
        """Of the noise in the released sums; 0 without."""
        release = _release(self.run)
        return release.deviation if release is not None else 0.0

    @property
    def ridge(self) -> Float64:
        """What the strategy adds to the diagonal of A, [W + 1]; 1 where z has no bias."""
        own = getattr(self.strategy, "ridge", 0.0)
        if isinstance(self.strategy, AFL) and not self.strategy.clean:
            own = self.strategy.gamma * self.run.population.num_clients
        wide, asked = self.head.shape[1], self.strategy.asked()
        ridge = np.full(wide, own)
        if self.row_clip:
            width = asked.width(self.run.trained.features.shape[1])
            ridge = own * self.scales**2 + self.deviation * (2 * width) ** 0.5
        if not asked.bias:
            ridge[-1] = 1.0
        return ridge

    @property
    def scales(self) -> Float64:
        """What each entry of z is multiplied by in a release, [W + 1]."""
        asked = self.strategy.asked()
        width = asked.width(self.run.trained.features.shape[1])
        own = row_scales(asked, width, self.row_clip)
        return own if asked.bias else np.append(own, 1.0)

    def features(self, rows: Int64) -> Float64:
        """z of some rows as they are summed, [n, W + 1]; 0 for the bias where there is none."""
        asked = self.strategy.asked()
        z = _features(self.run, rows, biased=asked.bias)
        if self.row_clip:
            protect_rows(z if asked.bias else z[:, :-1], asked, self.row_clip)
        return z

    def shorten_clients(self, clip: float) -> None:
        """Weigh the rows of clients whose statistics are longer than the clip."""
        population, asked = self.run.population, self.strategy.asked()
        for client in range(population.num_clients):
            rows = np.concatenate([population.train.of(client), population.test.of(client)])
            rows = rows[self.weight[rows] > 0]  # which of a pair is there must not be looked at
            share = self.weight[rows] / self.weight[rows].max(initial=0.5)  # whole canaries
            z, labels = self.features(rows) * np.sqrt(share)[:, None], population.labels[rows]
            gram = np.square(z @ z.T).sum() if asked.gram else 0.0
            roots = np.sqrt(share)[:, None]
            sums = [(roots * z)[labels == c].sum(axis=0) for c in np.unique(labels)]
            counts = 0 if asked.bias else np.square(np.bincount(labels, share)).sum()
            length = float(np.sqrt(gram + np.sum(np.square(sums)) + counts))
            self.weight[rows] *= clip / max(clip, length)

    def halfway(self) -> tuple[Float64, Float64]:
        """A [W + 1, W + 1] and B [C, W + 1], with every coin's rows counted half."""
        rows, wide = np.flatnonzero(self.weight), self.head.shape[1]
        gram, sums = np.zeros((wide, wide)), np.zeros_like(self.head)
        for low in range(0, len(rows), ROWS):
            part = rows[low : low + ROWS]
            z = self.features(part)
            weighed = z * self.weight[part, None]
            if self.strategy.asked().gram:
                gram += z.T @ weighed
            one_hot = np.arange(len(self.head))[:, None] == self.run.trained.labels[part]
            sums += one_hot.astype(np.float64) @ weighed
        return gram, sums


def _release(run: Reopened) -> PrivateRelease | None:
    strategy = run.built.federation.strategy
    inner = strategy.then if isinstance(strategy, Private) else strategy
    return inner if isinstance(inner, PrivateRelease) else None


def _from_confidence(run: Reopened, coins: Coins, heads: list[Head]) -> Float64:
    own, *others = (confidences_of(h, run.trained, coins.rows) for h in (run.head, *heads))
    gain = (own - np.mean(others, axis=0)) * coins.signs
    counts = np.bincount(coins.owner, minlength=len(coins))
    return np.bincount(coins.owner, gain, minlength=len(coins)) / np.maximum(1, counts)


def _weight(run: Reopened, coins: Coins, z: Float64, push: Float64) -> Float64:
    """How much of each row's push gets into the head: clipped at the row, or at its client."""
    privacy, mechanism = run.scenario.privacy, run.scenario.privacy.mechanism
    if mechanism == "example":
        length = np.linalg.norm(z, axis=1) * np.linalg.norm(push, axis=1)
        return np.asarray(np.minimum(1.0, privacy.clip / np.maximum(length, 1e-12)))
    if len(coins.rows) > 2 * len(coins) and mechanism in ("central", "local"):
        counts = np.bincount(coins.owner, minlength=len(coins))  # a client's update is as long
        return np.asarray(1 / counts[coins.owner])  # as another's, whatever it has
    return np.ones(len(z))


def _features(run: Reopened, rows: Int64, *, biased: bool) -> Float64:
    """z of some rows, float64 [n, W + 1]; the last column is the bias's, 0 where there is none."""
    x = run.trained.features[rows].astype(np.float64)
    if "fourier.weight" in run.head:
        omega, shift = run.head["fourier.weight"], run.head["fourier.bias"]
        x = np.sqrt(2 / len(omega)) * np.cos(x @ omega.T.astype(np.float64) + shift)
    return np.concatenate([x, np.full((len(x), 1), float(biased))], axis=1)


def _matrix(head: Head) -> Float64:
    """A linear head as one matrix [C, W + 1]."""
    return np.concatenate([head["weight"], head["bias"][:, None]], axis=1).astype(np.float64)

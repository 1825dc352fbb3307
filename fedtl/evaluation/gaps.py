"""The gaps between clients in one table: distances, transferability, and how each was made.

``from_statistics`` needs nothing but what clients send for Fed3R, so it serves real clients as
well; ``measure`` adds what takes rows side by side, which only a simulation has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Protocol

import numpy as np

from fedtl.clients.blocks import one_blas_thread
from fedtl.evaluation import labels
from fedtl.evaluation.client_sums import ClientSums, Sums, in_waves, moments_of
from fedtl.evaluation.distances import (
    Gaussian,
    Moments,
    Within,
    class_scatter,
    conditional,
    conditional_pairs,
    coral,
    coral_pairs,
    frechet,
    gaussian,
    principal_directions,
)
from fedtl.evaluation.gap_kinds import HOME, KINDS, SAMPLED, SCORES
from fedtl.evaluation.sampled_gaps import Sampled, sample_gaps, source_scores
from fedtl.evaluation.source_classes import SourceClassifier
from fedtl.evaluation.transferability import h_score, logme
from fedtl.types import Float64, Int64, Population

PAIRS_LIMIT = 150
"""Clients up to which every two are compared; beyond it each is compared to the rest only."""


class Walk(Protocol):
    """Clients' statistics in order, to be walked through more than once: a list will do."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sums]: ...


Check = Callable[[], None]


@dataclass(frozen=True)
class _Everybody:
    """What is known once all clients were added up."""

    counts: Int64
    means: Float64
    total: Moments
    covariance: Float64
    within: Within
    directions: Float64
    share: float
    inside: Moments

    @property
    def examples(self) -> Int64:
        return np.asarray(self.counts.sum(axis=1))


@dataclass(frozen=True)
class _Own:
    """What one client adds: its Gaussian, its distances to the rest, its scores."""

    gaussian: Gaussian | None
    rest: dict[str, float]
    scores: dict[str, float]


def from_statistics(
    sums: Walk,
    names: Sequence[str],
    domains: Sequence[str],
    classes: Sequence[str],
    *,
    bias: bool = True,
    pairs: bool = True,
    threads: int = 1,
    check: Check = lambda: None,
) -> dict[str, Any]:
    """Everything that follows from clients' summed statistics, as JSON values.

    Args:
        sums: each client's ``counts``, class ``sums`` and packed ``gram``, as for Fed3R.
        names, domains: of the K clients.
        classes: C names.
        bias: rows ended with a 1, as Fed3R asks for.
        pairs: compare every two clients, up to ``PAIRS_LIMIT`` of them.
        threads: CPU threads; the figures do not depend on it.
        check: called now and then; what it raises stops the work.

    Returns:
        clients, domains, classes, examples, counts, kinds, scores, pairs, rest, transferability,
        scale, sampling, notes and seconds. What is undefined is None.
    """
    began = time.perf_counter()
    pairs = pairs and len(sums) <= PAIRS_LIMIT
    with one_blas_thread(), _pool(threads) as pool, np.errstate(invalid="ignore"):
        everybody = _add_up(sums, bias)
        owns: list[_Own] = []
        for wave in in_waves(sums, 4 * threads):
            check()
            spreads = everybody.within.own[len(owns) :]
            owns += pool.map(_one, wave, repeat(bias), spreads, repeat(everybody))
        gaussians = [own.gaussian for own in owns]
        between = _pairs(sums, everybody, gaussians, pool, check) if pairs else {}
        rest = {name: np.array([own.rest[name] for own in owns]) for name in owns[0].rest}
        scores = _scores(everybody.inside)
    nothing = np.full((len(names) if pairs else 1, len(names)), np.nan)
    kinds = {name: dict(kind) for name, kind in KINDS.items()}
    scores_told = {name: dict(score) for name, score in SCORES.items()}
    for kind in (*kinds.values(), *scores_told.values()):
        if kind["made_from"] == SAMPLED:
            kind["note"] = HOME
    facts: dict[str, Any] = {
        "clients": list(names),
        "domains": list(domains),
        "examples": everybody.examples.tolist(),
        "classes": list(classes),
        "counts": everybody.counts.tolist(),
        "kinds": kinds,
        "scores": scores_told,
        "pairs": {name: plain(between.get(name, nothing)) for name in KINDS} if pairs else None,
        "rest": {name: plain(rest.get(name, nothing[0])) for name in KINDS},
        "transferability": {
            "all": {name: plain(score) for name, score in scores.items()},
            "clients": [{name: plain(own.scores[name]) for name in SCORES} for own in owns],
        },
        "scale": {"variance": plain(np.trace(everybody.covariance))},
        "sampling": {},
        "notes": _notes(everybody, pairs),
    }
    facts["seconds"] = round(time.perf_counter() - began, 2)
    return facts


def measure(
    population: Population,
    seed: int,
    *,
    classifier: SourceClassifier | str,
    threads: int = 1,
    check: Check = lambda: None,
) -> dict[str, Any]:
    """``from_statistics`` of a population's training rows, and what takes rows side by side.

    Args:
        population: simulated clients.
        seed: of the samples and permutations.
        classifier: the backbone's own, or why there is none.
        threads: CPU threads; the figures do not depend on it.
        check: called now and then; what it raises stops the work.
    """
    began = time.perf_counter()
    sums = ClientSums(population, threads, check)
    facts = from_statistics(
        sums,
        population.names,
        population.domains,
        population.classes,
        pairs=sums.fits,
        threads=threads,
        check=check,
    )
    facts["kinds"] = {name: dict(kind) for name, kind in KINDS.items()}
    facts["scores"] = {name: dict(score) for name, score in SCORES.items()}
    with one_blas_thread(), _pool(threads) as pool:
        pairs = facts["pairs"] is not None
        sampled: Sampled = sample_gaps(population, seed, pairs, pool, check)
        if isinstance(classifier, str):
            facts["notes"].append(classifier)
        else:
            everybody, each, rows = source_scores(population, classifier, seed, pool, check)
            facts["transferability"]["all"].update(_named(everybody))
            for scores, own in zip(facts["transferability"]["clients"], each, strict=True):
                scores.update(_named(own))
            sampled.facts["source_rows"] = rows
    for name, values in sampled.rest.items():
        facts["rest"][name] = plain(values)
    if pairs:
        facts["pairs"].update({name: plain(own) for name, own in sampled.pairs.items()})
    facts["sampling"] = sampled.facts
    facts["notes"] += sampled.notes
    facts["seconds"] = round(time.perf_counter() - began, 2)
    return facts


def plain(values: Any) -> Any:
    """Numbers as JSON has them: six digits, what is not finite is None."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim:
        return [plain(own) for own in array]
    return float(f"{array:.6g}") if np.isfinite(array) else None


def _named(scores: tuple[float, float]) -> dict[str, Any]:
    return dict(zip(("nce", "leep"), map(plain, scores), strict=True))


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(max(1, threads), "gap") as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _add_up(sums: Walk, bias: bool) -> _Everybody:
    """The first walk: totals, in the order of the clients."""
    counts, means = [], []
    total: Moments | None = None
    scatters: list[tuple[float, int]] = []
    for each in sums:
        own = moments_of(each, bias=bias)
        counts.append(own.counts)
        means.append(own.mean)
        scatters.append(class_scatter(own))
        if total is None:
            total = Moments(own.counts.copy(), own.sums.copy(), own.second.copy())
            continue
        np.add(total.counts, own.counts, out=total.counts)
        np.add(total.sums, own.sums, out=total.sums)
        np.add(total.second, own.second, out=total.second)
    assert total is not None, "a federation has a client"
    covariance = total.covariance()
    known = np.nan_to_num(covariance)
    directions, share = principal_directions(known)
    spread, degrees = np.array(scatters, dtype=np.float64).T
    within = Within.of(spread, degrees, float(np.trace(total.second)))
    inside = total.projected(directions)
    return _Everybody(
        np.array(counts), np.array(means), total, known, within, directions, share, inside
    )


def _one(sums: Sums, bias: bool, spread: float, everybody: _Everybody) -> _Own:
    """One client against the rest, and for itself."""
    own = moments_of(sums, bias=bias)
    rest = everybody.total.without(own)
    others, held = rest.examples, own.examples
    found = {
        name: float(distance(own.counts, rest.counts))
        for name, distance in labels.DISTANCES.items()
    }
    found["conditional"] = conditional(own, rest, everybody.within, spread)
    found["coral"] = found["frechet"] = np.nan
    inside = own.projected(everybody.directions)
    scores = _scores(inside)
    if held < 2:
        return _Own(None, found, scores)
    covariance = own.covariance()
    mine = gaussian(own.mean, np.trace(covariance), inside.covariance(), held)
    if others >= 2:
        theirs = rest.covariance()
        found["coral"] = coral(covariance, theirs)
        outside = everybody.inside.without(inside).covariance()
        found["frechet"] = frechet(mine, gaussian(rest.mean, np.trace(theirs), outside, others))
    return _Own(mine, found, scores)


def _scores(inside: Moments) -> dict[str, float]:
    return {"h_score": h_score(inside), "logme": logme(inside), "nce": np.nan, "leep": np.nan}


def _pairs(
    sums: Walk,
    everybody: _Everybody,
    gaussians: Sequence[Gaussian | None],
    pool: ThreadPoolExecutor,
    check: Check,
) -> dict[str, Float64]:
    """Every two clients."""
    counts, num = everybody.counts, len(everybody.counts)
    found = {name: labels.pairs(distance, counts) for name, distance in labels.DISTANCES.items()}
    kept = list(sums)
    grams = [own["gram"] for own in kept]
    means = np.nan_to_num(everybody.means)
    found["coral"] = coral_pairs(grams, means, everybody.examples, everybody.covariance)
    check()
    found["conditional"] = conditional_pairs(
        counts, [own["sums"][:, : means.shape[1]] for own in kept], everybody.within
    )
    found["frechet"] = np.full((num, num), np.nan)

    def row(i: int) -> list[tuple[int, float]]:
        own = gaussians[i]
        if own is None:
            return []
        others = ((j, gaussians[j]) for j in range(i))
        return [(j, frechet(own, other)) for j, other in others if other is not None]

    for i, values in enumerate(pool.map(row, range(num))):
        check()
        if gaussians[i] is not None:
            found["frechet"][i, i] = 0.0
        for j, value in values:
            found["frechet"][i, j] = found["frechet"][j, i] = value
    return found


def _notes(everybody: _Everybody, pairs: bool) -> list[str]:
    width, used = everybody.directions.shape
    notes = []
    if used < width:
        notes.append(
            f"H-score, LogME and the covariances in the Frechet distance are taken in the {used} "
            f"main directions of everybody's features, which hold {100 * everybody.share:.1f} % "
            f"of their variance; for the Frechet distance the other {width - used} directions are "
            "taken to vary alike, which makes it smaller, not larger."
        )
    if not pairs:
        notes.append(
            f"Above {PAIRS_LIMIT} clients or 2 GiB of statistics, clients are compared to the "
            "rest only, not every two."
        )
    if len(everybody.counts) == 1:
        notes.append("There is one client: distances to others are undefined.")
    if (few := int((everybody.examples < 2).sum())) > 0:
        what = "1 client has" if few == 1 else f"{few} clients have"
        notes.append(f"{what} fewer than two examples: CORAL and Frechet are undefined there.")
    return notes

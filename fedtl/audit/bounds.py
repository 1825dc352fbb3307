"""The lower bound of epsilon that a run's head gives away: from its canaries, else from pairs.

Pairs are examples also where whole clients are protected: one example more or less is less than a
client, so what examples give away a client's promise must cover. Example-level promises count a
client's number of examples as public; a canary that is left out changes it by one, which no score
here looks at.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fedtl.audit.coins import Coins, coin_scores
from fedtl.audit.reopened import Reopened
from fedtl.clients.attacks import poison
from fedtl.interrupts import Interrupts
from fedtl.planning import liars_of
from fedtl.privacy.canaries import deal_coins
from fedtl.privacy.one_run import Mask, audited
from fedtl.privacy.pairs import deal_pairs, pair_up
from fedtl.types import Population

PAIRS_MOST = 1500
"""Pairs of a trained and a held-out example: more would take long to tell apart."""

FEW = 20
"""Canaries below which hardly anything can be shown."""


def lower_bound_facts(run: Reopened, interrupts: Interrupts, error: float) -> dict[str, Any]:
    """``lower`` of ``audit.json``; ``epsilon`` is None where no coin decided anything.

    Args:
        error: chance that the bound is too high, in (0, 1).
    """
    facts: dict[str, Any] = {
        "epsilon": None,
        "confidence": 1 - error,
        "method": "none",
        "canaries": 0,
        "guesses": 0,
        "correct": 0,
        "note": "",
    }
    planted = len(run.planted.members) > 0
    if not planted and (reason := no_pairs(run)) is not None:
        return {**facts, "note": f"{reason}; set privacy.canaries and run anew"}
    coins = planted_coins(run) if planted else split_coins(run)
    if not len(coins):
        why = "no client has an example of the same class in training and test"
        return {**facts, "note": f"{why}; set privacy.canaries and run anew"}
    scores, how = coin_scores(run, coins, interrupts)
    delta = run.scenario.privacy.delta
    found = audited(scores, coins.inside, delta=delta, error=error, pairs=not planted)
    facts |= {
        "epsilon": found.epsilon,
        "canaries": found.canaries,
        "guesses": found.guesses,
        "correct": found.correct,
    }
    what = f"canary {run.planted.unit}s" if planted else "pairs of a trained and a held-out example"
    facts["method"] = f"one run, {what}, by {how}"
    facts["note"] = _power(run, found.most, len(coins), planted)
    return facts


def no_pairs(run: Reopened) -> str | None:
    """Why the split of this run is no fair coin for each pair, or None."""
    scenario = run.scenario
    if run.built.features.examples.is_test is not None:
        return "the data came with their own split, so no coin chose what was trained on"
    if scenario.attack.kind in ("label_flip", "backdoor"):
        return "liars falsified what they trained on, which tells it from their tests"
    if scenario.adaptation.input != "none" or scenario.adaptation.features != "none":
        return "features were adapted to the training examples, which tells these from the tests"
    return None


def planted_coins(run: Reopened) -> Coins:
    """The coins of the run's canaries."""
    planted, true = run.planted, run.population
    rows = [planted.members[i : i + 1] for i in range(len(planted.members))]
    if planted.unit == "client":
        rows = [true.train.of(client) for client in planted.members.tolist()]
    owner = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
    flat = np.concatenate(rows)
    lying = liars_of(run.scenario, true.names)

    def deal(inside: Mask) -> Population:
        dealt = deal_coins(true, replace(planted, inside=inside))
        return poison(dealt, run.scenario.attack, lying, run.scenario.seed)

    return Coins(planted.inside, flat, owner, np.ones(len(flat)), deal)


def split_coins(run: Reopened) -> Coins:
    """The coins by which the split chose between two examples of a client and class."""
    pairs = pair_up(run.population, run.scenario.seed, PAIRS_MOST)
    rows = np.stack([pairs.first, pairs.second], axis=1).ravel()
    return Coins(
        pairs.inside,
        rows,
        np.repeat(np.arange(len(pairs.inside)), 2),
        np.tile([1.0, -1.0], len(pairs.inside)),
        lambda inside: deal_pairs(run.trained, pairs, inside),
    )


def _power(run: Reopened, most: float, coins: int, planted: bool) -> str:
    """What could have been shown at all, in words."""
    if planted and run.planted.unit == "client":
        unit = "clients"
    else:
        unit = "examples" if planted else "pairs"
    said = f"with {coins} {unit} no more than {most:.3g} could have been shown"
    if run.promised is not None and (coins < FEW or most < run.promised):
        said += ": too few to test this promise"
    elif coins < FEW:
        said += ": too few to show much"
    if not planted:
        said += (
            "; a pair is two neighbours apart, so the bound is half of what single canaries would "
            "give (privacy.canaries plants some)"
        )
    return said

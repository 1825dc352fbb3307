"""What the figures say, in words: is the federated head worth it, and for whom?

Two heads are compared by their answers to the same test examples, see ``significance``. Over all
clients together every test example at home counts once; on everybody's tests, which every client's
own head answers, as many as the average client's, see ``Pairs.average``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedtl.evaluation.advice import ADVICE, EFFECTS, Compared, Counsel
from fedtl.evaluation.metrics import defined
from fedtl.evaluation.references import Judgement
from fedtl.evaluation.significance import Pairs, draws_needed, intervals, weigh
from fedtl.scenario.schema import Verdict as Rule
from fedtl.types import Float64


@dataclass(frozen=True)
class Difference:
    """Federated minus alone over all compared clients, in accuracy.

    Attributes:
        difference: None where there are no examples.
        interval: by the bootstrap, at 1 - level.
        p_value: by the scenario's test.
        outcome: "gain", "none" or "loss".
    """

    difference: float | None
    interval: tuple[float, float] | None
    p_value: float | None
    outcome: str


@dataclass(frozen=True)
class Verdict:
    """Headline and the lines under it, and what they rest on.

    Attributes:
        better, worse, similar: clients for whom the federated head is better than, worse than or
            not distinguishable from their own head on their own test examples.
        best, worst: client index by the federated head's accuracy, or None where none is judged.
        level, margin, test: when a difference counts, as the scenario has it.
        home, everyone: all clients together; None where nothing is known.
        effects, advice: clients by what federating does to them and what they are told; None
            without own heads to compare with.
    """

    headline: str
    lines: tuple[str, ...]
    better: int
    worse: int
    similar: int
    best: int | None
    worst: int | None
    level: float
    margin: float
    test: str
    home: Difference | None = None
    everyone: Difference | None = None
    effects: Mapping[str, int] | None = None
    advice: Mapping[str, int] | None = None

    def as_facts(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def give_verdict(
    federated: Judgement,
    alone: Judgement | None,
    pooled: Judgement | None,
    names: Sequence[str],
    rule: Rule,
    seed: int,
    compared: Compared | None = None,
    told: Counsel | None = None,
) -> Verdict:
    """Weigh the federated head against each client alone and against pooling.

    Args:
        names: the judged clients' names, in the judgements' order.
        rule, seed: when a difference counts, and the seed of the bootstrap's draws.
        compared: the federated head against ``alone``, of the same clients; needed with it.
        told: what each of these clients is told; needed with it.
    """
    right = _percent(federated.facts["accuracy"])
    headline = f"The federated head is right on {right} of all tests."
    lines: list[str] = []
    found: dict[str, Any] = {"better": 0, "worse": 0, "similar": 0}
    if alone is not None and compared is not None and told is not None:
        headline, lines, found = _against(federated, alone, compared, told, rule, seed)
    if pooled is not None:
        gap = _number(pooled.facts["accuracy"]) - _number(federated.facts["accuracy"])
        words = f"{100 * abs(gap):.1f} points {'more' if gap > 0 else 'less'} than federating"
        words = "not comparable" if math.isnan(gap) else words
        lines.append(
            f"Pooling everybody's data would give {_percent(pooled.facts['accuracy'])}: "
            + (words if gap else "the same as federating")
            + ("." if pooled.facts.get("converged", True) else "; its fit has not converged.")
        )
    best, worst = _extremes(federated.own.accuracy)
    if best is not None and worst is not None:
        lines.append(
            f"Best client {names[best]} {_percent(float(federated.own.accuracy[best]))}, "
            f"worst {names[worst]} {_percent(float(federated.own.accuracy[worst]))}."
        )
    return Verdict(
        headline,
        tuple(lines),
        best=best,
        worst=worst,
        level=rule.level,
        margin=rule.margin,
        test=rule.test,
        **found,
    )


def _against(
    federated: Judgement,
    alone: Judgement,
    compared: Compared,
    told: Counsel,
    rule: Rule,
    seed: int,
) -> tuple[str, list[str], dict[str, Any]]:
    """Headline, lines and the verdict's own fields where clients were also trained alone."""
    effects, advice = Counter(told.effects), Counter(told.advice)
    home = difference(compared.home.together(), rule, seed)
    abroad = None if compared.everyone is None else compared.everyone.average()
    everyone = None if abroad is None else difference(abroad, rule, seed)
    there = compared.everyone
    if there is not None and everyone is not None and there.examples.sum():
        exact = (there.beats - there.loses).sum() / there.examples.sum()  # the average is rounded
        everyone = replace(everyone, difference=float(exact))
    lines = [
        "At home (each client's own tests): "
        f"federated {_percent(federated.facts['accuracy'])}, "
        f"alone {_percent(alone.facts['accuracy'])}: {_in_words(home, rule)}."
    ]
    everywhere = _percent(federated.facts["accuracy_everyone"])
    if everyone is None:  # own heads never left their clients
        headline = HEADLINES_AT_HOME[home.outcome]
        lines.append(
            f"Everywhere (everybody's tests): federated {everywhere}; "
            "the clients' own heads stayed with them and are not known there."
        )
    else:
        headline = HEADLINES[home.outcome, everyone.outcome]
        lines.append(
            f"Everywhere (everybody's tests): federated {everywhere}, alone on average "
            f"{_percent(alone.facts['accuracy_everyone'])}: {_in_words(everyone, rule)}."
        )
    better, similar, worse = (effects[name] for name in EFFECTS)
    lines += [
        f"Client by client at home: {better} clearly better off federated, {worse} clearly "
        f"better off alone, {similar} too close to call.",
        "Advice to the clients: " + ", ".join(f"{name} {advice[name]}" for name in ADVICE) + ".",
    ]
    needed = draws_needed(len(told.advice), rule)
    if needed is not None:
        lines.append(
            f"With so many clients {rule.draws} draws can show nothing: use verdict.draws = "
            f'{needed} or verdict.test = "mcnemar".'
        )
    fields = {
        "better": better,
        "worse": worse,
        "similar": similar,
        "home": home,
        "everyone": everyone,
        "effects": {name: effects[name] for name in EFFECTS},
        "advice": {name: advice[name] for name in ADVICE},
    }
    return headline, lines, fields


def difference(pairs: Pairs, rule: Rule, seed: int) -> Difference:
    """What one row of pairs says."""
    found = weigh(pairs, rule, seed)
    low, high = intervals(pairs, rule, seed)[0].tolist()
    known = bool(pairs.examples[0])
    return Difference(
        defined(found.difference[0]),
        (low, high) if known else None,
        defined(found.p_value[0]),
        {1: "gain", 0: "none", -1: "loss"}[int(found.sign[0])],
    )


HEADLINES: dict[tuple[str, str], str] = {
    ("gain", "gain"): "Federating pays: better at home and on everybody's examples.",
    (
        "gain",
        "none",
    ): "Federating pays at home; on everybody's examples it makes no clear difference.",
    ("gain", "loss"): "It depends: the federated head is better at home and worse elsewhere.",
    (
        "none",
        "gain",
    ): "No clear difference at home; on everybody's examples the federated head is better.",
    ("none", "none"): "Not enough evidence that federating changes anything here.",
    ("none", "loss"): "Stay alone: no clear difference at home, and worse on everybody's examples.",
    (
        "loss",
        "gain",
    ): "It depends: at home a client's own head is better, elsewhere the federated one.",
    ("loss", "none"): "Stay alone: worse at home, and no clear difference on everybody's examples.",
    ("loss", "loss"): "Stay alone: the federated head is worse at home and elsewhere.",
}
"""By what federating does on the clients' own tests and on everybody's."""

HEADLINES_AT_HOME = {
    "gain": "Federating pays at home: the federated head is better on the clients' own tests.",
    "none": "No clear difference at home; own heads' worth elsewhere is not known.",
    "loss": "At home the clients' own heads are better; their worth elsewhere is not known.",
}
"""The same where the clients' own heads were judged at home only."""


def _extremes(accuracy: Float64) -> tuple[int | None, int | None]:
    if not np.isfinite(accuracy).any():
        return None, None
    return int(np.nanargmax(accuracy)), int(np.nanargmin(accuracy))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _percent(value: object) -> str:
    number = _number(value)
    return "undefined" if math.isnan(number) else f"{100 * number:.1f} %"


def _in_words(found: Difference, rule: Rule) -> str:
    """The difference, and what speaks against counting it."""
    if found.outcome != "none" or found.difference is None or found.p_value is None:
        return _points(_number(found.difference))
    why = "within noise" if found.p_value > rule.level else "too small to count"
    return f"{_points(found.difference)}, {why}"


def _points(difference: float) -> str:
    return "undefined" if math.isnan(difference) else f"{100 * difference:+.1f} points"

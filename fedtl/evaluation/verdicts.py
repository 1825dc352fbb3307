"""What the figures say, in words: is the federated head worth it, and for whom?

The rule of thumb used here: two accuracies count as different when they are more than two standard
errors apart, taking the examples as independent draws. That is cautious for heads judged on the
same examples; a paired test per client says more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtl.evaluation.references import Judgement
from fedtl.types import Float64, Int64


@dataclass(frozen=True)
class Verdict:
    """Headline and the lines under it, and the counts they rest on.

    Attributes:
        better, worse, similar: clients for whom the federated head is better than, worse than or
            not distinguishable from their own head on their own test examples.
        best, worst: client index by the federated head's accuracy, or None where none is judged.
    """

    headline: str
    lines: tuple[str, ...]
    better: int
    worse: int
    similar: int
    best: int | None
    worst: int | None


def give_verdict(
    federated: Judgement, alone: Judgement | None, pooled: Judgement | None, names: Sequence[str]
) -> Verdict:
    """Weigh the federated head against each client alone and against pooling.

    Args:
        names: the judged clients' names, in the judgements' order.
    """
    lines: list[str] = []
    better = worse = similar = 0
    right = _percent(federated.facts["accuracy"])
    headline = f"The federated head is right on {right} of all tests."
    if alone is not None:
        difference = federated.own - alone.own
        noise = _two_errors(federated.own, alone.own, federated.own_examples)
        known = np.isfinite(difference)
        better = int((difference[known] > noise[known]).sum())
        worse = int((difference[known] < -noise[known]).sum())
        similar = int(known.sum()) - better - worse
        home, abroad = _against(federated, alone)
        headline = _headline(home, abroad)
        lines += [
            f"At home (each client's own tests): federated {right}, "
            f"alone {_percent(alone.facts['accuracy'])}: {_points(home.difference)}"
            f"{'' if home.clear else ', within noise'}.",
            f"Everywhere (everybody's tests): federated "
            f"{_percent(federated.facts['accuracy_everyone'])}, alone on average "
            f"{_percent(alone.facts['accuracy_everyone'])}: {_points(abroad.difference)}"
            f"{'' if abroad.clear else ', within noise'}.",
            f"Client by client at home: {better} clearly better off federated, {worse} clearly "
            f"better off alone, {similar} too close to call.",
        ]
    if pooled is not None:
        gap = _number(pooled.facts["accuracy"]) - _number(federated.facts["accuracy"])
        lines.append(
            f"Pooling everybody's data would give {_percent(pooled.facts['accuracy'])}: "
            f"{_points(gap)[1:]} {'more' if gap > 0 else 'less'} than federating."
        )
    best, worst = _extremes(federated.own)
    if best is not None and worst is not None:
        lines.append(
            f"Best client {names[best]} {_percent(float(federated.own[best]))}, "
            f"worst {names[worst]} {_percent(float(federated.own[worst]))}."
        )
    return Verdict(headline, tuple(lines), better, worse, similar, best, worst)


@dataclass(frozen=True)
class _Comparison:
    difference: float
    clear: bool


def _against(federated: Judgement, alone: Judgement) -> tuple[_Comparison, _Comparison]:
    """Federated minus alone at home and on everybody's tests."""
    examples = max(1, int(_number(federated.facts["examples"])))
    found = []
    for key in ("accuracy", "accuracy_everyone"):
        a, b = _number(federated.facts[key]), _number(alone.facts[key])
        error = 2 * math.sqrt((a * (1 - a) + b * (1 - b)) / examples)
        found.append(_Comparison(a - b, abs(a - b) > error))
    return found[0], found[1]


def _headline(home: _Comparison, abroad: _Comparison) -> str:
    at_home = "no clear difference" if not home.clear else "gain" if home.difference > 0 else "loss"
    if at_home == "gain":
        return (
            "Federating pays: better at home and judged on everybody's examples."
            if (abroad.difference > 0)
            else "Federating pays at home, but not on everybody's examples."
        )
    if abroad.clear and abroad.difference > 0:
        return (
            "It depends: at home a client's own head is better, everywhere else the federated one."
            if at_home == "loss"
            else "No clear difference at home; everywhere else the federated head is far better."
        )
    return (
        "Stay alone: the federated head is worse at home and no better elsewhere."
        if at_home == "loss"
        else "Not enough evidence that federating changes anything here."
    )


def _two_errors(a: Float64, b: Float64, examples: Int64) -> Float64:
    """Two standard errors of a - b, but never less than one example's worth."""
    examples = np.maximum(examples, 1)
    error = 2 * np.sqrt((a * (1 - a) + b * (1 - b)) / examples)
    return np.asarray(np.maximum(error, 1 / examples))


def _extremes(accuracy: Float64) -> tuple[int | None, int | None]:
    if not np.isfinite(accuracy).any():
        return None, None
    return int(np.nanargmax(accuracy)), int(np.nanargmin(accuracy))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _percent(value: object) -> str:
    number = _number(value)
    return "undefined" if math.isnan(number) else f"{100 * number:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"

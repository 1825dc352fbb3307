"""What the figures say, in words: is the federated head worth it, and for whom?

Two accuracies count as clearly different when they are more than two standard errors apart, with
two added successes and failures (Agresti and Caffo 2000), which keeps small samples honest. The
examples are taken as independent draws, which is cautious for heads judged on the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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
        sign = compare(federated.own.accuracy, alone.own.accuracy, federated.own.examples)
        judged = np.isfinite(federated.own.accuracy) & np.isfinite(alone.own.accuracy)
        better, worse = int((sign > 0).sum()), int((sign < 0).sum())
        similar = int(judged.sum()) - better - worse
        found = _against(federated, alone)
        lines.append(
            f"At home (each client's own tests): federated {right}, "
            f"alone {_percent(alone.facts['accuracy'])}: {_difference(found['home'])}."
        )
        if alone.facts["accuracy_everyone"] is None:  # own heads never left their clients
            headline = HEADLINES_AT_HOME[found["home"][1]]
            lines.append(
                "Everywhere (everybody's tests): federated "
                f"{_percent(federated.facts['accuracy_everyone'])}; the clients' own heads stayed "
                "with them and are not known there."
            )
        else:
            headline = HEADLINES[found["home"][1], found["everyone"][1]]
            lines.append(
                f"Everywhere (everybody's tests): federated "
                f"{_percent(federated.facts['accuracy_everyone'])}, alone on average "
                f"{_percent(alone.facts['accuracy_everyone'])}: {_difference(found['everyone'])}."
            )
        lines += [
            f"Client by client at home: {better} clearly better off federated, {worse} clearly "
            f"better off alone, {similar} too close to call.",
        ]
    if pooled is not None:
        gap = _number(pooled.facts["accuracy"]) - _number(federated.facts["accuracy"])
        words = f"{_points(gap)[1:]} {'more' if gap > 0 else 'less'} than federating"
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
    return Verdict(headline, tuple(lines), better, worse, similar, best, worst)


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


def compare(a: Float64, b: Float64, examples: Int64) -> npt.NDArray[np.int64]:
    """1 where a is clearly larger than b, -1 where clearly smaller, 0 where too close to call.

    Args:
        a, b: accuracies in [0, 1], any shape; NaN compares as too close.
        examples: how many each is measured on.
    """
    n = np.maximum(examples, 1)
    low, high = (b * n + 1) / (n + 2), (a * n + 1) / (n + 2)
    error = 2 * np.sqrt((high * (1 - high) + low * (1 - low)) / (n + 2))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(np.abs(high - low) > error, np.sign(high - low), 0), np.int64)


def _against(federated: Judgement, alone: Judgement) -> dict[str, tuple[float, str]]:
    """Federated minus alone, and "gain", "none" or "loss": at home and on everybody's tests."""
    found = {}
    for place, metric, count in (
        ("home", "accuracy", "examples"),
        ("everyone", "accuracy_everyone", "examples_everyone"),
    ):
        a, b = _number(federated.facts[metric]), _number(alone.facts[metric])
        examples = np.asarray(federated.facts[count])
        sign = int(compare(np.asarray(a), np.asarray(b), examples))
        found[place] = (a - b, {1: "gain", 0: "none", -1: "loss"}[sign])
    return found


def _extremes(accuracy: Float64) -> tuple[int | None, int | None]:
    if not np.isfinite(accuracy).any():
        return None, None
    return int(np.nanargmax(accuracy)), int(np.nanargmin(accuracy))


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _percent(value: object) -> str:
    number = _number(value)
    return "undefined" if math.isnan(number) else f"{100 * number:.1f} %"


def _difference(found: tuple[float, str]) -> str:
    return _points(found[0]) + (", within noise" if found[1] == "none" else "")


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"

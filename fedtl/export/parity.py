"""Whether an exported file answers as the run does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedtl.errors import PolicyStop
from fedtl.export.samples import Sample
from fedtl.types import Float32, Float64

TOLERANCE = 1e-4
"""Largest difference of a probability."""

BATCH = 16

Run = Callable[[Mapping[str, Any]], tuple[Float32, Float32]]
"""From inputs by name to scores and probabilities."""


@dataclass(frozen=True)
class Parity:
    """A file beside the run.

    Attributes:
        examples: compared.
        difference: largest absolute one of a probability.
        score_difference: largest absolute one of a score, over the largest score.
        agreement: share of examples that get the same label.
        accuracy: of the file; None of made-up examples.
        note: "" of the run's own tests, else why they are made up.
    """

    examples: int
    difference: float
    score_difference: float
    agreement: float
    accuracy: float | None
    note: str

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def compare(run: Run, sample: Sample) -> Parity:
    """Run a file on a sample, in batches of several sizes, and compare it with the run."""
    scores, probabilities = _answers(run, sample)
    wanted = _softmax(sample.scores)
    found = scores.argmax(1)
    return Parity(
        len(sample),
        _largest(probabilities - wanted),
        _largest(scores - sample.scores) / max(_largest(sample.scores), 1e-30),
        float((found == sample.scores.argmax(1)).mean()),
        None if sample.labels is None else float((found == sample.labels).mean()),
        sample.note,
    )


def refuse_different(parity: Parity, what: str) -> None:
    """Raise PolicyStop where a file does not answer as the run does."""
    if not parity.difference <= TOLERANCE:  # NaN is refused too
        raise PolicyStop(
            f"the exported {what} does not answer as the run does, so it was not kept",
            got=f"a probability differs by {parity.difference:.2g} on {parity.examples} examples",
            allowed=f"at most {TOLERANCE:g}",
            do="Try another --to; and report it, with the scenario",
        )


def _answers(run: Run, sample: Sample) -> tuple[Float32, Float32]:
    parts = []
    first = 0
    while first < len(sample):
        size = 1 if not first else BATCH
        part = {name: array[first : first + size] for name, array in sample.inputs.items()}
        parts.append(run(part))
        first += size
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _softmax(scores: Float32) -> Float64:
    shifted = np.exp(scores.astype(np.float64) - scores.max(1, keepdims=True))
    return np.asarray(shifted / shifted.sum(1, keepdims=True))


def _largest(values: Any) -> float:
    return float(np.abs(values).max())

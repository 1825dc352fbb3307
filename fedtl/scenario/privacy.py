"""What is promised to whoever takes part, and what keeps the promise."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedtl.scenario.sections import (
    Count,
    CountOrNone,
    Fraction,
    NonNegative,
    OpenFraction,
    Positive,
    Section,
)


class Privacy(Section):
    """Differential privacy, secure aggregation, or both."""

    mechanism: Literal["none", "central", "local", "example", "release"] = Field(
        "none",
        description="who adds noise to what: central, to the sum of clipped updates; local, each "
        "client to its own update; example, to every gradient step at the client (DP-SGD); "
        "release, once to the summed statistics of a closed-form head",
    )
    unit: Literal["client", "example"] | None = Field(
        None,
        description="release: whose data one neighbour more or less is; the others follow from the "
        "mechanism (example protects single examples, all else whole clients); default example",
    )
    epsilon: Positive | None = Field(
        None, description="what the whole run may spend; the noise follows from it"
    )
    noise_multiplier: NonNegative | None = Field(
        None,
        description="instead of epsilon: deviation of the noise over the sensitivity; 0 adds none, "
        "and nothing is promised",
    )
    delta: OpenFraction = Field(
        1e-5, description="chance that epsilon does not hold; below one over clients or examples"
    )
    budget: Positive | None = Field(
        None, description="the run stops (exit code 4) before the round that would spend more"
    )
    clip: Positive = Field(
        1.0,
        description="longest update (client), gradient (example) or feature row (release); what is "
        "longer is shortened to it",
    )
    adaptive_clip: bool = Field(False, description="central: the clip follows a noisy quantile")
    clip_quantile: OpenFraction = Field(0.5, description="adaptive_clip: share of updates inside")
    clip_rate: Positive = Field(0.2, description="adaptive_clip: how fast the clip follows")
    sampling: Literal["poisson", "fixed", "cyclic"] = Field(
        "poisson",
        description="central: clients of a round by a coin each, a fixed number of them, or in "
        "turns; nothing is gained from it where clients.fraction is 1",
    )
    noise: Literal["independent", "banded"] = Field(
        "independent",
        description="central: fresh in each round, or correlated over rounds so that part of it "
        "cancels (DP-FTRL, needs sampling in turns or none)",
    )
    bands: Count | None = Field(
        None, description="banded: rounds over which noise is correlated; default one full turn"
    )
    accountant: Literal["pld", "rdp"] = Field(
        "pld", description="how epsilon is added up: privacy loss distributions, or Renyi"
    )
    min_class_examples: Count = Field(
        1, description="classes with fewer examples stay out of the statistics a client sends"
    )
    canaries: CountOrNone = Field(
        0,
        description="so many members of the unit are in the training or not by a coin flip each, "
        "for the audit",
    )
    canary_labels: Literal["own", "random"] = Field(
        "own", description="of canary examples; random ones are easier to find, and cost accuracy"
    )
    compare: bool = Field(
        True, description="in simulation also train without the mechanism, to say what it costs"
    )
    secure_aggregation: Literal["none", "arithmetic", "secagg", "secagg_plus"] = Field(
        "none",
        description="the server learns the sum alone: its fixed-point arithmetic (simulation), or "
        "masks between all pairs of clients, or between neighbours only",
    )
    threshold: Fraction = Field(
        0.67, description="secure aggregation: share of the asked that must answer, else no sum"
    )
    neighbours: Count | None = Field(
        None, description="secagg_plus: masks that a client shares; default by the cohort's size"
    )
    value_range: Annotated[float, Field(gt=0.0, le=1e6)] = Field(
        8.0,
        description="secure aggregation: largest size of an entry of an update; a client with a "
        "larger one stays out of the sum",
    )


PROTECTED_UNIT = {"central": "client", "local": "client", "example": "example"}
"""By mechanism; "release" says it itself."""


def unit_of(privacy: Privacy) -> str | None:
    """ "client", "example", or None where no differential privacy is asked for."""
    if privacy.mechanism == "none":
        return None
    return PROTECTED_UNIT.get(privacy.mechanism) or privacy.unit or "example"

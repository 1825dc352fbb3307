"""The ``[strategy]`` table: one section for each name, with its own parameters and their defaults.

What each does, its source and its deviations stand with its code in ``fedtl/strategies``; which to
choose when, in ``docs/strategies.md``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fedtl.scenario.sections import (
    Beta,
    ClosedFraction,
    Count,
    CountOrNone,
    Fraction,
    NonNegative,
    Positive,
    Section,
)

MOST_RANDOM_FEATURES = 20_000
"""A Gram matrix of them has 3 GiB."""


CLOSED_FORMS = ("fed3r", "afl", "fedncm", "fedlda", "ccvr", "fedcof", "personal_ridge")
"""Strategies whose clients send statistics of their features, once."""


class Averaging(Section):
    """What every strategy that averages has in common."""

    weighting: Literal["examples", "uniform"] = Field(
        "examples", description="weight of a client in every average"
    )
    server_learning_rate: Positive = 1.0


class FedAvg(Averaging):
    """McMahan et al. 2017."""

    name: Literal["fedavg"] = "fedavg"


class FedProx(Averaging):
    """Li et al. 2020."""

    name: Literal["fedprox"]
    mu: NonNegative = 0.01


class FedAvgM(Averaging):
    """Hsu et al. 2019."""

    name: Literal["fedavgm"]
    momentum: Beta = 0.9


class Adaptive(Averaging):
    """Reddi et al. 2021."""

    name: Literal["fedadagrad", "fedadam", "fedyogi"]
    server_learning_rate: Positive = 0.03
    beta_1: Beta = 0.9
    beta_2: Beta = 0.99
    tau: Positive = 1e-3


class Scaffold(Averaging):
    """Karimireddy et al. 2020."""

    name: Literal["scaffold"]


class FedDyn(Section):
    """Acar et al. 2021."""

    name: Literal["feddyn"]
    weighting: Literal["examples", "uniform"] = "examples"
    alpha: Positive = 0.1


class FedNova(Averaging):
    """Wang et al. 2020."""

    name: Literal["fednova"]


class FedExP(Section):
    """Jhunjhunwala et al. 2023."""

    name: Literal["fedexp"]
    weighting: Literal["examples", "uniform"] = "examples"
    epsilon: NonNegative = Field(1e-3, description="damps the step where clients agree")


class Mime(Averaging):
    """Karimireddy et al. 2021 (MimeLite)."""

    name: Literal["mime"]
    momentum: Beta = 0.9


class QFedAvg(Section):
    """Li et al. 2020, q-FFL."""

    name: Literal["qfedavg"]
    q: NonNegative = 1.0


class Lbfgs(Section):
    """The exact softmax head by L-BFGS on summed gradients."""

    name: Literal["lbfgs"]
    history: Annotated[int, Field(ge=1, le=100)] = 10
    tolerance: Positive = Field(1e-6, description="largest entry of the gradient to stop at")


class Fed3R(Section):
    """Fanì et al. 2024."""

    name: Literal["fed3r"]
    ridge: NonNegative = 0.01
    bias: bool = True
    normalise: bool = Field(True, description="divide each class's column by its length")
    temperature: Positive = Field(0.1, description="scores are divided by it for the softmax")
    random_features: Annotated[int, Field(ge=0, le=MOST_RANDOM_FEATURES)] = Field(
        0, description="random Fourier features; 0: none"
    )
    scale: Positive = Field(0.01, description="random features: standard deviation of frequencies")
    keep_statistics: bool = Field(
        True, description="on the server's disk: exact unlearning and each client's contribution"
    )


class AFL(Section):
    """He et al. 2025, analytic federated learning."""

    name: Literal["afl"]
    gamma: Positive = 1.0
    clean: bool = Field(True, description="remove the clients' gamma again, as the paper does")
    keep_statistics: bool = True


class FedNCM(Section):
    """Legate et al. 2023."""

    name: Literal["fedncm"]
    normalise: bool = True
    temperature: Positive = 0.1


class FedLDA(Section):
    """Linear discriminant analysis from summed statistics; Guan et al. 2025 (FedCGS)."""

    name: Literal["fedlda"]
    covariance: Literal["within", "total"] = "within"
    shrinkage: ClosedFraction = 0.1
    client_prior: bool = Field(
        False, description="each client judges with its own class frequencies"
    )


class CCVR(Section):
    """Luo et al. 2021."""

    name: Literal["ccvr"]
    samples: Count = Field(200, description="virtual examples drawn for each class")
    shrinkage: ClosedFraction = 0.1


class FedCOF(Section):
    """Goswami et al. 2025."""

    name: Literal["fedcof"]
    gamma: Positive = 0.1
    normalise: bool = True
    temperature: Positive = 0.1


class Robust(Averaging):
    """What every robust rule has in common."""

    malicious: CountOrNone = Field(
        1, description="f: as many clients of a round may lie, whatever they send"
    )


class Krum(Robust):
    """Blanchard et al. 2017."""

    name: Literal["krum"]
    weighting: Literal["uniform"] = "uniform"


class MultiKrum(Robust):
    """Blanchard et al. 2017."""

    name: Literal["multikrum"]
    selected: Count | None = Field(None, description="m: updates averaged; default cohort - f")


class Bulyan(Robust):
    """El Mhamdi et al. 2018."""

    name: Literal["bulyan"]
    weighting: Literal["uniform"] = "uniform"


class Median(Averaging):
    """Yin et al. 2018, coordinate-wise."""

    name: Literal["median"]
    weighting: Literal["uniform"] = "uniform"


class TrimmedMean(Averaging):
    """Yin et al. 2018, coordinate-wise."""

    name: Literal["trimmed_mean"]
    weighting: Literal["uniform"] = "uniform"
    trim: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.1, description="share of the clients cut off at each end"
    )


class GeometricMedian(Averaging):
    """Pillutla et al. 2022 (RFA)."""

    name: Literal["geometric_median"]
    iterations: Count = 8
    nu: Positive = 1e-6


class FLTrust(Averaging):
    """Cao et al. 2021."""

    name: Literal["fltrust"]
    weighting: Literal["uniform"] = "uniform"
    root: str = Field(description="name of the client that the server trusts")


class NormClip(Averaging):
    """Sun et al. 2019: no update is longer than this before it is averaged."""

    name: Literal["norm_clip"]
    max_norm: Positive | None = Field(None, description="default: the cohort's median length")


class Personalised(Averaging):
    """What every personalised strategy has in common: FedAvg beneath, a head of each client's own
    on top."""


class FineTune(Personalised):
    """FedAvg, then each client fine-tunes the head on its own."""

    name: Literal["finetune"]
    epochs: Count = Field(5, description="that each client trains on its own at the end")


class Partial(Personalised):
    """One mask over the head's layers: what is shared and what stays at the client."""

    name: Literal["fedper", "lgfedavg"]


class FedRep(Personalised):
    """Collins et al. 2021."""

    name: Literal["fedrep"]
    head_epochs: Count = Field(5, description="of the client's own layers before the shared ones")


class FedBABU(Personalised):
    """Oh et al. 2022."""

    name: Literal["fedbabu"]
    epochs: Count = Field(5, description="that each client trains its own at the end")


class Ditto(Personalised):
    """Li et al. 2021."""

    name: Literal["ditto"]
    strength: NonNegative = Field(0.1, description="lambda: pull towards the shared head")
    epochs: Count | None = Field(None, description="of the own head; default training.local_epochs")


class PFedMe(Averaging):
    """Dinh et al. 2020."""

    name: Literal["pfedme"]
    strength: Positive = Field(15.0, description="lambda")
    inner_steps: Count = Field(5, description="K steps on each batch towards the personal head")
    beta: Fraction = Field(1.0, description="server mixing")


class APFL(Personalised):
    """Deng et al. 2020."""

    name: Literal["apfl"]
    alpha: ClosedFraction = 0.5
    adaptive: bool = Field(True, description="alpha follows its gradient, at each client")


class KnnPer(Personalised):
    """Marfoq et al. 2022."""

    name: Literal["knnper"]
    neighbours: Count = 10
    scale: Positive = 1.0
    weights: Annotated[list[ClosedFraction], Field(min_length=1, max_length=64)] = Field(
        [0.0, 0.2, 0.4, 0.6, 0.8],
        description="lambdas among which each client chooses on its own training examples",
    )


class PersonalRidge(Section):
    """Closed-form head between the client's own and everybody's (F3)."""

    name: Literal["personal_ridge"]
    ridge: NonNegative = 0.01
    bias: bool = True
    temperature: Positive = 0.1
    pulls: Annotated[list[Positive], Field(min_length=1, max_length=64)] = Field(
        [1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4],
        description="rhos among which each client chooses by leave-one-out (PRESS)",
    )


class Flower(Section):
    """Any strategy of Flower's, or one written for Flower, unchanged."""

    name: Literal["flower"]
    class_: str = Field(
        alias="class", description="e.g. Krum, or module:Class, or package.module.Class"
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="its constructor's keyword arguments"
    )


Strategy = Annotated[
    FedAvg
    | FedProx
    | FedAvgM
    | Adaptive
    | Scaffold
    | FedDyn
    | FedNova
    | FedExP
    | Mime
    | QFedAvg
    | Lbfgs
    | Fed3R
    | AFL
    | FedNCM
    | FedLDA
    | CCVR
    | FedCOF
    | Krum
    | MultiKrum
    | Bulyan
    | Median
    | TrimmedMean
    | GeometricMedian
    | FLTrust
    | NormClip
    | FineTune
    | Partial
    | FedRep
    | FedBABU
    | Ditto
    | PFedMe
    | APFL
    | KnnPer
    | PersonalRidge
    | Flower,
    Field(discriminator="name"),
]

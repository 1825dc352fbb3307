"""What a user may ask for: the scenario as frozen, typed, complete data.

Every default a run depends on is a default here. Unknown keys are errors. Cross-key rules live in
``compatibility.py``; reading files, overrides and error texts in ``load.py``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedtl.scenario.data import Data as Data
from fedtl.scenario.privacy import Privacy
from fedtl.scenario.sections import (
    AlphaOrInfinity,
    Beta,
    ClosedFraction,
    Count,
    FilePath,
    Fraction,
    NonNegative,
    OpenFraction,
    Positive,
    Section,
)
from fedtl.scenario.strategies import FedAvg, Strategy
from fedtl.scenario.transfer import Augmentation as Augmentation
from fedtl.scenario.transfer import Backbone as Backbone
from fedtl.scenario.transfer import Head as Head
from fedtl.scenario.transfer import Transfer as Transfer
from fedtl.scenario.updates import Attack, Compression


class Clients(Section):
    """How many clients there are, who holds what, and how many take part in a round."""

    num: Count | None = Field(
        None, description="clients in all; default 10, or one per domain / natural client"
    )
    partition: Literal[
        "iid",
        "dirichlet",
        "dirichlet_capacity",
        "label_quantity",
        "shards",
        "quantity",
        "domain",
        "natural",
        "file",
        "flwr_datasets",
    ] = "iid"
    within_domains: bool = Field(
        False, description="deal clients to domains evenly and partition inside each"
    )
    alpha: AlphaOrInfinity = Field(
        0.5, description="dirichlet kinds: concentration, small = skewed, inf = even"
    )
    split_file: FilePath | None = Field(
        None, description="file: who holds what, as 'fedtl split --write' wrote it"
    )
    shards_per_client: Count = Field(2, description="shards: label-sorted shards a client gets")
    quantity: Literal["lognormal", "zipf"] = Field(
        "lognormal", description="quantity: how client sizes are distributed"
    )
    sigma: NonNegative = Field(1.0, description="quantity = lognormal: standard deviation of log")
    exponent: NonNegative = Field(
        1.0, description="quantity = zipf: size of rank r is r**-exponent"
    )
    min_examples: Count = Field(
        2, description="a client with fewer examples is left out, and that is shown"
    )
    partitioner: str | None = Field(
        None, description="flwr_datasets: name of its partitioner, e.g. ExponentialPartitioner"
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="flwr_datasets: the partitioner's keyword arguments"
    )
    fraction: Fraction = Field(1.0, description="of the clients, sampled each round")


class Shift(Section):
    """How clients' data are made unlike each other's: for studies, in simulation only."""

    kinds: list[
        Literal["rotation", "blur", "noise", "jpeg", "contrast", "colour", "grey", "downsample"]
    ] = Field(
        default=[],
        description="what is done to a shifted client's images before the trunk; several kinds are "
        "dealt over the clients, and each client draws its own parameters",
    )
    severity: Annotated[int, Field(ge=1, le=5)] = 3
    fraction: ClosedFraction = Field(
        1.0, description="of the clients whose images are shifted (seeded)"
    )
    concept_fraction: ClosedFraction = Field(
        0.0, description="of the clients whose labels are permuted, each in its own way (seeded)"
    )


class Adaptation(Section):
    """What each client does against its gap to the others, before or beside the training."""

    input: Literal["none", "match"] = Field(
        "none",
        description="match: each client's pixels get the channel means and deviations that the "
        "weights were trained with",
    )
    features: Literal["none", "standardise", "whiten", "coral"] = Field(
        "none",
        description="each client's features: own mean and deviation removed, own covariance "
        "removed, or own covariance replaced by everybody's",
    )
    allow_label_skew: bool = Field(
        False, description="align features although the clients' labels differ strongly"
    )
    prior: Literal["none", "balanced_softmax", "logit_adjustment", "bbse"] = Field(
        "none",
        description="own class frequencies: in the training loss, in predictions at home, or "
        "estimated from predictions on unlabelled tests",
    )
    prior_strength: Positive = Field(1.0, description="tau, of balanced_softmax, logit_adjustment")
    adversarial: NonNegative = Field(
        0.0, description="mlp head: weight of a reversed domain loss on its hidden features (DANN)"
    )


class Training(Section):
    """Local training at each client in each round: mini-batch SGD."""

    local_epochs: Count = 5
    batch_size: Count = 32
    learning_rate: Positive = 0.05
    momentum: Beta = 0.0
    weight_decay: NonNegative = 0.0
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="share of the target that is spread over all classes"
    )
    mixup: NonNegative = Field(
        0.0,
        description="alpha of the Beta distribution by which pairs of a batch are mixed where the "
        "trainable part begins; 0 mixes nothing",
    )
    dropout: Beta = Field(
        0.0, description="of what enters the head's last layer, while it is trained"
    )
    validation_fraction: Beta = Field(
        0.0,
        description="of each client's training examples, kept back to judge its own training by",
    )
    early_stopping: Annotated[int, Field(ge=0, le=1000)] = Field(
        0,
        description="local epochs without a better loss on the client's own validation part after "
        "which it stops and goes back to its best; 0 never stops",
    )
    schedule: Literal["constant", "cosine", "exponential"] = Field(
        "constant", description="of the learning rate over the rounds"
    )
    decay: Fraction = Field(0.99, description="schedule = exponential: factor per round")


class Absence(Section):
    """Clients that do not answer in one round."""

    round: Count
    clients: Annotated[list[str], Field(min_length=1)] = Field(description="clients' names")


class Participation(Section):
    """How many answers a round needs, and who does not answer."""

    quorum: Count = Field(
        1, description="valid updates a round needs; with fewer the model stays as it is"
    )
    patience: Count = Field(
        3, description="rounds in a row that may miss the quorum before the run stops"
    )
    over_selection: Annotated[float, Field(ge=1.0, le=10.0)] = Field(
        1.0, description="this many times the cohort is asked; the first answers are used"
    )
    absent: list[Absence] = Field(
        default_factory=list, description="who does not answer, e.g. as it was in another run"
    )


class Validation(Section):
    """Which updates are refused before anything is added."""

    max_norm_ratio: Positive = Field(
        1e4, description="an update this many times longer than the cohort's median is refused"
    )


class Evaluation(Section):
    """What the heads are compared with and how often they are judged."""

    references: list[
        Literal[
            "local_only",
            "centralised",
            "ridge",
            "fine_tuned",
            "best_client",
            "from_scratch",
            "start",
        ]
    ] = Field(
        ["local_only", "centralised", "fine_tuned"],
        description="each client alone; the pooled optimum; the pooled ridge head; the shared head "
        "tuned by each client for itself; the best of the clients' own heads; the whole network "
        "trained on everybody's images from random weights; the head before any training, which "
        "with head.initial = names is zero-shot",
    )
    fine_tune_epochs: Count = Field(5, description="of the reference fine_tuned")
    scratch_epochs: Count | None = Field(
        None, description="of the reference from_scratch; default rounds x local_epochs"
    )
    source_path: FilePath | None = Field(
        None,
        description="folder (<class>/<image>) or .npz of the task that the weights were trained "
        "for: what the trained network has forgotten of it is measured there",
    )
    every: Count = Field(1, description="rounds between evaluations; the last is always judged")
    fraction: Fraction = Field(1.0, description="of the clients, judged each time (seeded)")
    reference_clients: Count = Field(
        1000, description="at most this many clients are also trained alone (seeded)"
    )
    everyone_examples: Count = Field(
        10_000, description="at most this many test examples stand for everybody's (seeded)"
    )


class Verdict(Section):
    """When a difference between two heads counts."""

    level: OpenFraction = Field(
        0.05, description="chance of any wrong 'gains' or 'harmed' over all clients (Holm)"
    )
    margin: NonNegative = Field(
        0.01, description="a smaller difference in accuracy is no gain, however certain"
    )
    test: Literal["mcnemar", "bootstrap"] = Field(
        "mcnemar", description="of paired answers to the same test examples"
    )
    draws: Annotated[int, Field(ge=200, le=100_000)] = Field(
        2000, description="bootstrap: resamples, also of the intervals"
    )


class Report(Section):
    """What the page shows beyond figures. No part of the answer."""

    examples: Annotated[int, Field(ge=0, le=20)] = Field(
        0, description="example images of each client on the page; 0 shows none"
    )
    watts_per_core: Positive = Field(
        12.0,
        description="power of one busy core, for the estimate of energy; 12 W is taken where the "
        "processor is not known (Lannelongue et al. 2021, doi 10.1002/advs.202100707)",
    )
    grams_per_kwh: NonNegative = Field(
        475.0,
        description="CO2 of a kilowatt hour, for the estimate; 475 g is the world's mean of 2019 "
        "(IEA)",
    )


class Engine(Section):
    """Where clients live. No part of the answer, so no part of the scenario's hash."""

    kind: Literal["local", "ray", "flower"] = Field(
        "local", description="in this process, on a Ray cluster, or behind Flower"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Count | None = Field(None, description="local: default all cores the machine allows")
    block_size: Count | None = Field(
        None, description="clients handed to a thread or worker at a time"
    )
    address: Annotated[str, Field(min_length=1, max_length=255)] | None = Field(
        None, description="ray, flower: a running Ray cluster, e.g. 10.0.0.1:6379; default: our own"
    )
    num_cpus: Count | None = Field(
        None, description="ray, flower: workers, one CPU each; default all cores the machine allows"
    )
    num_gpus: Annotated[float, Field(ge=0.0, le=64.0)] = Field(
        0.0, description="ray, flower: GPUs of each worker, may be a fraction such as 0.25"
    )
    num_nodes: Count | None = Field(
        None,
        description="flower: simulated nodes, each hosts its share of clients; default workers",
    )
    deadline_seconds: Positive | None = Field(
        None, description="a round closes then without who is missing; real clients: default 600"
    )
    join_seconds: Positive = Field(300.0, description="real clients: how long to wait for them")


PATHS = (
    ("data", "path"),
    ("clients", "split_file"),
    ("backbone", "weights"),
    ("backbone", "path"),
    ("evaluation", "source_path"),
)
"""Keys that may hold paths."""


class Scenario(Section):
    """One complete question to fedtl."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Count = 20
    data: Data = Data()
    clients: Clients = Clients()
    shift: Shift = Shift()
    adaptation: Adaptation = Adaptation()
    backbone: Backbone = Backbone()
    head: Head = Head()
    transfer: Transfer = Transfer()
    augmentation: Augmentation = Augmentation()
    training: Training = Training()
    strategy: Strategy = FedAvg()
    compression: Compression = Compression()
    attack: Attack = Attack()
    privacy: Privacy = Privacy()
    participation: Participation = Participation()
    validation: Validation = Validation()
    evaluation: Evaluation = Evaluation()
    verdict: Verdict = Verdict()
    report: Report = Report()
    engine: Engine = Engine()

    def canonical(self) -> dict[str, Any]:
        """What decides the answer: all but engine and report; paths by their last name only.

        The same scenario on another machine, in another folder or on another engine has the same
        canonical form; the data's and weights' contents have hashes of their own.
        """
        content = self.model_dump(mode="json", exclude={"engine", "report"})
        for table, entry in PATHS:
            if content[table][entry] is not None:
                content[table][entry] = Path(content[table][entry]).name
        return content

    def hash(self) -> str:
        """SHA-256 over the canonical form, 64 hex digits."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

"""Strategies by the name a scenario gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedtl.errors import PolicyStop, client_of
from fedtl.plans import Protection
from fedtl.privacy.promise import Promise
from fedtl.results.statistics import KEPT_BYTES
from fedtl.scenario.compatibility import CLOSED_FORMS
from fedtl.scenario.schema import Scenario
from fedtl.strategies.averaging import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
from fedtl.strategies.base import ServerState, Strategy
from fedtl.strategies.class_means import CCVR, FedCOF, FedLDA, FedNCM
from fedtl.strategies.closed_form import AFL, Fed3R, OneShot
from fedtl.strategies.drift import FedDyn, FedExP, FedNova, Mime, QFedAvg, Scaffold
from fedtl.strategies.exact import Lbfgs
from fedtl.strategies.flower_adapter import FlowerStrategy
from fedtl.strategies.local_norms import LocalNorms
from fedtl.strategies.personal import (
    APFL,
    Ditto,
    FedBABU,
    FedPer,
    FedRep,
    FineTune,
    KnnPer,
    LGFedAvg,
    PersonalRidge,
    PFedMe,
    degenerate,
)
from fedtl.strategies.private import AtClients, Central, Private, SecureRing
from fedtl.strategies.robust import (
    Bulyan,
    FLTrust,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NormClip,
    TrimmedMean,
)
from fedtl.strategies.warm_start import started_from
from fedtl.types import Head, Int64, Roster

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "scaffold": Scaffold,
    "feddyn": FedDyn,
    "fednova": FedNova,
    "fedexp": FedExP,
    "mime": Mime,
    "qfedavg": QFedAvg,
    "lbfgs": Lbfgs,
    "fed3r": Fed3R,
    "afl": AFL,
    "fedncm": FedNCM,
    "fedlda": FedLDA,
    "ccvr": CCVR,
    "fedcof": FedCOF,
    "krum": Krum,
    "multikrum": MultiKrum,
    "bulyan": Bulyan,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "geometric_median": GeometricMedian,
    "fltrust": FLTrust,
    "norm_clip": NormClip,
    "finetune": FineTune,
    "fedper": FedPer,
    "lgfedavg": LGFedAvg,
    "fedrep": FedRep,
    "fedbabu": FedBABU,
    "ditto": Ditto,
    "pfedme": PFedMe,
    "apfl": APFL,
    "knnper": KnnPer,
    "personal_ridge": PersonalRidge,
    "flower": FlowerStrategy,
}

__all__ = [
    "STRATEGIES",
    "ServerState",
    "Strategy",
    "last_notes",
    "make_strategy",
    "notes_of",
    "protected",
    "secure_ring",
    "tasks_of",
]


def notes_of(scenario: Scenario, roster: Roster, head: Head, *, real: bool = False) -> list[str]:
    """What a user should know of the strategy before the first round, a line each.

    Args:
        real: clients are other people's machines.
    """
    section = scenario.strategy
    note = degenerate(section.name, scenario.head.kind, scenario.transfer.mode)
    notes = [note] if note else []
    if scenario.head.from_statistics and section.name in ROBUST:
        notes.append(
            "the closed-form start of round 1 is a plain sum: the robust rule guards what comes "
            "after it"
        )
    strategy = make_strategy(scenario, roster.names)
    kept = scenario.privacy.mechanism != "release" and getattr(strategy, "keep_statistics", False)
    if not isinstance(strategy, OneShot) or not kept:
        return notes
    size = strategy.question().up_bytes(head) * roster.num_clients
    if size > KEPT_BYTES:
        notes.append(
            f"the clients' statistics ({size / 2**30:.1f} GiB) are not kept: nobody's "
            "contribution can be told, and nobody be forgotten, without asking again"
        )
    elif real:
        notes.append(
            "each client's statistics stay in the run's folder, to tell contributions and to "
            "forget a client; strategy.keep_statistics = false leaves them out"
        )
    return notes


ROBUST = (
    "krum",
    "multikrum",
    "bulyan",
    "median",
    "trimmed_mean",
    "geometric_median",
    "fltrust",
    "norm_clip",
)


def last_notes(scenario: Scenario, state: ServerState) -> list[str]:
    """What a user should know of the last state, a line each.

    Raises:
        PolicyStop: there is no head, as nobody's statistics came.
    """
    name, slots, notes = scenario.strategy.name, state.slots, []
    if (reported := slots.get("reported")) is not None:
        if not reported.any():
            raise PolicyStop(
                "no client's statistics came, so there is no head",
                do="Bring the clients back and run the scenario anew",
            )
        if not reported.all():
            notes.append(
                f"{int(reported.sum())} of {len(reported)} clients are in the head; more rounds "
                "take the others in"
            )
    if any(n.endswith("singular") and flag.any() for n, flag in slots.items()):
        notes.append(
            "features are linearly dependent, or there are fewer rows than features: the head is "
            f"the shortest of many that fit (pseudo-inverse){ONE_ANSWER.get(name, '')}"
        )
    if name == "lbfgs" and not STRATEGIES[name]().finished(state):
        notes.append(
            "the exact head is not reached: it needs more rounds, and in each of them every client "
            "that answered before"
        )
    return notes


ONE_ANSWER = {
    "fed3r": "; strategy.ridge above 0 has one answer",
    "personal_ridge": "; strategy.ridge above 0 has one answer",
    "afl": "; strategy.clean = false has one answer",
    "fedlda": "; strategy.shrinkage above 0 has one answer",
}


def tasks_of(scenario: Scenario) -> list[str]:
    """What clients will be asked to do, so that they can be told before they join.

    A ``plans.Task`` each, "gradient" also where trained heads come with one, and "personal" where
    clients make heads of their own.
    """
    name, build = scenario.strategy.name, STRATEGIES[scenario.strategy.name]
    tasks = ["gradient" if name == "lbfgs" else "train"]
    if name in CLOSED_FORMS:
        tasks = ["statistics"]
    if scenario.head.from_statistics:
        tasks.insert(0, "statistics")
    if name == "mime":
        tasks.append("gradient")
    own = hasattr(build, "personal") and getattr(scenario.strategy, "client_prior", True)
    own = own or scenario.transfer.batch_norm == "local"
    tuned = "fine_tuned" in scenario.evaluation.references
    if own or tuned or scenario.adaptation.prior in ("logit_adjustment", "bbse"):
        tasks.append("personal")
    return tasks


def make_strategy(scenario: Scenario, names: Sequence[str]) -> Strategy:
    """The strategy a scenario asks for; its parameters are the section's other keys.

    Args:
        names: the clients', by id; a strategy that trusts one of them is told its id.

    Raises:
        InputError: a name that no client has.
    """
    section = scenario.strategy
    given = section.model_dump(exclude={"name"}, by_alias=False)
    if "root" in given:
        given["root"] = client_of(given["root"], names, "strategy.root")
    build = STRATEGIES[section.name]
    if "seed" in getattr(build, "__dataclass_fields__", {}):
        given["seed"] = scenario.seed
    strategy = build(**given)
    transfer = scenario.transfer
    if transfer.mode == "lora" and transfer.aggregation == "flora":
        from fedtl.strategies.stacking import Stacking

        assert isinstance(strategy, FedAvg)
        strategy = Stacking(strategy, transfer.alpha / transfer.rank, scenario.seed)
    if scenario.transfer.batch_norm == "local":
        strategy = LocalNorms(strategy)
    return started_from(scenario.head, strategy)


def protected(
    strategy: Strategy, scenario: Scenario, promise: Promise | None, examples: Int64
) -> Strategy:
    """The strategy under what the scenario promises; itself where that is nothing.

    Args:
        promise: ``make_promise``'s.
        examples: that each client trains on, int64 [K]: its weight in a secure sum.
    """
    ring = secure_ring(scenario, examples)
    if promise is None:
        return strategy if ring is None else Private(strategy, ring=ring)
    noise = promise.noise_multiplier * promise.clip
    if promise.mechanism == "release":
        from fedtl.strategies.private_release import PrivateRelease

        assert isinstance(strategy, OneShot)
        unit = scenario.privacy.unit or "example"
        strategy = PrivateRelease(strategy, unit, promise.clip, promise.noise_multiplier, ring)
        return strategy if ring is None else Private(strategy, ring=ring)
    if promise.mechanism != "central":
        asked = Protection(clip=promise.clip, noise=noise)
        if promise.mechanism == "example":
            asked = Protection(example_clip=promise.clip, example_noise=noise)
        strategy = AtClients(strategy, asked)
        return strategy if ring is None else Private(strategy, ring=ring)
    central = Central(
        promise.clip,
        promise.noise_multiplier,
        promise.denominator,
        scenario.privacy.adaptive_clip,
        scenario.privacy.clip_quantile,
        scenario.privacy.clip_rate,
        tuple(promise.coefficients.tolist()),
        promise.sensitivity,
    )
    return Private(strategy, central, ring)


def secure_ring(scenario: Scenario, examples: Int64) -> SecureRing | None:
    """The fixed point of the scenario's secure sums; None where there are none.

    Args:
        examples: that each client trains on, int64 [K].
    """
    section = scenario.privacy
    if section.secure_aggregation == "none":
        return None
    weights = None
    by_examples = getattr(scenario.strategy, "weighting", "uniform") == "examples"
    if by_examples and section.mechanism != "central":
        # a weight above 0 for whoever has no rows, too: its update is 0
        weights = np.maximum(examples, 1e-9) / max(1, int(examples.max(initial=0)))
    masked = section.secure_aggregation != "arithmetic"
    return SecureRing(section.value_range, section.threshold, masked, weights, len(examples))

"""From a scenario to objects: examples, clients, features, head, strategy, engine.

``open_data`` does what is quick and can fail early (read labels, deal them to clients);
``make_federation`` makes features, through the trunk or from the store, and everything on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtl import machine
from fedtl.clients.adversarial import domain_numbers
from fedtl.clients.alignment import align
from fedtl.clients.attacks import poison
from fedtl.clients.personal_store import PersonalStore
from fedtl.data.clients import ClientSplit, few_shot, on_rows, used_rows
from fedtl.data.examples import Examples
from fedtl.data.leakage import LeakReport, check_leaks, find_leaks
from fedtl.data.shifts import shifted
from fedtl.data.sources import load_examples
from fedtl.data.split_files import with_split_file
from fedtl.engines import Engine, LocalEngine
from fedtl.errors import EnvironmentFault, InputError
from fedtl.evaluation.forgetting import open_source
from fedtl.evaluation.label_skew import check_label_skew
from fedtl.planning import liars_of
from fedtl.privacy.canaries import canary_notes, plant
from fedtl.privacy.promise import make_promise
from fedtl.ready_features import (
    ExtractionProgress,
    OpenedData,
    ReadyFeatures,
    allowed_threads,
    dealt,
    make_features,
)
from fedtl.rounds import Federation
from fedtl.scenario.compatibility import UPDATE_ATTACKS, check_cohort
from fedtl.scenario.schema import Scenario
from fedtl.secure_rounds import simulated_sums
from fedtl.strategies import Strategy, make_strategy, protected
from fedtl.strategies.adversarial import Adversarial
from fedtl.transfer.backbones import TAKES, names
from fedtl.transfer.tails import first_head, open_network
from fedtl.transfer.zero_shot import with_names
from fedtl.types import Int64, Population


def _local(scenario: Scenario, population: Population, store: PersonalStore | None) -> Engine:
    threads, device = allowed_threads(scenario), resolve_device(scenario)
    return LocalEngine(population, threads, device, scenario.engine.block_size, store)


def _ray(scenario: Scenario, population: Population, store: PersonalStore | None) -> Engine:
    from fedtl.engines.ray_workers import RayEngine

    return RayEngine(population, store=store, **_workers(scenario))


def _flower(scenario: Scenario, population: Population, store: PersonalStore | None) -> Engine:
    from fedtl.engines.flower_simulation import flower_engine

    num_nodes = scenario.engine.num_nodes
    return flower_engine(population, num_nodes=num_nodes, store=store, **_workers(scenario))


ENGINES: dict[str, Callable[[Scenario, Population, PersonalStore | None], Engine]] = {
    "local": _local,
    "ray": _ray,
    "flower": _flower,
}
"""How each engine a scenario can name is made."""


def _workers(scenario: Scenario) -> dict[str, Any]:
    """What the engines with workers of their own take of a scenario."""
    section = scenario.engine
    return {
        "address": section.address,
        # a cluster that is joined has as many as it has
        "num_cpus": section.num_cpus or (None if section.address else allowed_threads(scenario)),
        "num_gpus": section.num_gpus,
        "device": resolve_device(scenario),
        "block_size": section.block_size,
        "deadline_seconds": section.deadline_seconds,
    }


@dataclass(frozen=True)
class Built:
    """A federation ready to run, with what was found on the way.

    Attributes:
        population: everybody's true data, where they are here: in simulation.
    """

    federation: Federation
    population: Population
    leaks: LeakReport
    features: ReadyFeatures


def resolve_device(scenario: Scenario) -> str:
    """ "cpu" or "cuda". Raises EnvironmentFault when cuda is asked for and not there."""
    wanted = scenario.engine.device
    if wanted == "cpu" or not (machine.gpu_present() or wanted == "cuda"):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise EnvironmentFault(
            "no usable GPU", where="engine.device", got='"cuda"', do='Use engine.device = "auto"'
        )
    return "cpu"


def open_data(scenario: Scenario) -> OpenedData:
    """Read the examples, deal them to clients and locate the backbone; no trunk runs yet.

    Raises:
        InputError: the data or weights are missing, broken, or do not fit the scenario.
    """
    if (source := scenario.evaluation.source_path) is not None:
        open_source(source)  # what is wrong with it is told before the rounds, not after them
    return open_examples(scenario, load_examples(scenario.data))


def open_examples(scenario: Scenario, examples: Examples) -> OpenedData:
    """The same for examples that are here already."""
    name = scenario.backbone.name
    if name in TAKES or (examples.kind != "images" and name in names()):  # which downloads nothing
        _check_kind(scenario, examples, TAKES.get(name, "images"))
    backbone, tail = open_network(
        scenario.backbone, scenario.transfer, scenario.seed, len(examples)
    )
    _check_kind(scenario, examples, backbone.takes)
    return OpenedData(scenario, *deal(scenario, examples), backbone, tail)


def _check_kind(scenario: Scenario, examples: Examples, takes: str) -> None:
    """Refuse examples that a backbone does not take.

    Args:
        takes: a kind of examples, or several.
    """
    if examples.kind not in takes:
        raise InputError(
            f"the data are {KINDS[examples.kind]}, and this backbone takes {KINDS[takes]}",
            where="backbone.name",
            got=repr(scenario.backbone.name),
            allowed=FITTING[examples.kind],
            do=f"Set backbone.name = {FITTING[examples.kind].split(', ')[0]}",
        )


KINDS = {
    "images": "images",
    "texts": "texts",
    "rows": "rows of numbers",
    "images or rows": "images or rows of numbers",
}
FITTING = {
    "images": '"efficientnet_lite0", any torchvision model, "timm", "onnx", "hub", "module"',
    "texts": '"hf"',
    "rows": '"identity", "fourier", "forest", "windows", "onnx"',
}
"""What examples are called, and the backbones that take them."""


def deal(scenario: Scenario, examples: Examples) -> tuple[Examples, ClientSplit]:
    """Who holds which examples, and the examples as clients have them: named, split, shifted.

    Raises:
        InputError: a partition, a split file or a shift that these data cannot have.
    """
    if scenario.clients.split_file is not None:
        examples = with_split_file(examples, Path(scenario.clients.split_file))
    split = dealt(scenario, examples)
    if scenario.data.shots is not None:  # the trunk need not see what nobody uses
        split = few_shot(split, examples.labels, scenario.data.shots, scenario.seed)
        used = used_rows(split)
        examples, split = examples.subset(used), on_rows(split, used)
    return shifted(examples, split, scenario.shift, scenario.seed), split


def check_strategy(opened: OpenedData) -> None:
    """Refuse what can be known of a strategy once the clients are: names, classes, cohorts.

    Raises:
        InputError: a client or a class that is not there, too few clients for a robust rule, no
            two domains to tell apart, or labels too skewed to align features.
    """
    names = opened.split.names
    check_cohort(opened.scenario, len(names))
    make_strategy(opened.scenario, names)
    if opened.scenario.adaptation.adversarial:
        domain_numbers(opened.split.domains)
    liars_of(opened.scenario, names)
    check_label_skew(
        opened.scenario.adaptation,
        opened.examples.labels,
        len(opened.examples.classes),
        opened.split.train,
    )


def population_of(features: ReadyFeatures) -> Population:
    """Who holds which features."""
    examples, split = features.examples, features.split
    return Population(
        features.matrix,
        examples.labels,
        examples.classes,
        split.train,
        split.test,
        split.names,
        split.domains,
        features.tail,
    )


def make_federation(
    opened: OpenedData,
    progress: ExtractionProgress | None = None,
    store: PersonalStore | None = None,
    judged_on: Callable[[ReadyFeatures], ClientSplit] | None = None,
) -> Built:
    """Features, population, head, strategy and engine of a scenario.

    Args:
        store: where simulated clients keep what is theirs from round to round.
        judged_on: gives another split into training and test rows, once the features are there.

    Raises:
        InputError: unreadable images, or the same image where it must not be.
        EnvironmentFault: no room for the features, no GPU where one is asked for.
    """
    scenario = opened.scenario
    check_strategy(opened)
    features = make_features(opened, progress)
    split, examples = features.split, features.examples
    leaks = find_leaks(features.content, split, examples)
    check_leaks(leaks, scenario.data.leakage)
    if judged_on is not None:
        features = replace(features, split=judged_on(features))
    population, aligned = _aligned(scenario, population_of(features))
    lying = liars_of(scenario, population.names)
    planted, canaries = plant(population, scenario.privacy, scenario.seed)
    poisoned = poison(planted, scenario.attack, lying, scenario.seed)
    head = first_head(scenario, opened.tail, population.width, len(examples.classes))
    head = with_names(head, scenario, opened.backbone, examples.classes, features.facts["way"])
    identity = {
        "scenario_hash": scenario.hash(),
        "data_fingerprint": examples.identity,
        "weights_sha256": opened.backbone.weights_hash,
        "extraction": features.facts["way"],
        "versions": machine.versions(),
    }
    roster = planted.roster()
    promise = make_promise(scenario, roster)
    federation = Federation(
        scenario,
        roster,
        head,
        protected(_strategy(scenario, population), scenario, promise, roster.train),
        ENGINES[scenario.engine.kind](scenario, poisoned, store),
        identity,
        promise,
        simulated_sums(scenario, roster.train),
    )
    notes = (
        *features.notes,
        *aligned,
        *_left_out(split),
        *_attack(scenario, population, lying),
        *canary_notes(canaries, scenario.privacy.canary_labels),
    )
    return Built(federation, population, leaks, replace(features, notes=notes))


def _strategy(scenario: Scenario, population: Population) -> Strategy:
    strategy, weight = make_strategy(scenario, population.names), scenario.adaptation.adversarial
    if not weight:
        return strategy
    return Adversarial(strategy, int(domain_numbers(population.domains).max()) + 1, weight)


def _aligned(scenario: Scenario, population: Population) -> tuple[Population, tuple[str, ...]]:
    """The population after ``adaptation.features``, and what is to be told of it."""
    kind = scenario.adaptation.features
    if kind == "none":
        return population, ()
    population, note = align(population, kind, threads=allowed_threads(scenario))
    told = (
        f"features are aligned ({kind}): every example goes through the map of its own client, "
        "also where everybody's tests are judged"
    )
    return population, (told, note) if note else (told,)


def _attack(scenario: Scenario, population: Population, lying: Int64) -> list[str]:
    if not len(lying):
        return []
    shown = ", ".join(population.names[client] for client in lying[:5].tolist())
    more = f" and {len(lying) - 5} more" if len(lying) > 5 else ""
    kind, does = scenario.attack.kind, "lies" if len(lying) == 1 else "lie"
    spared = kind in UPDATE_ATTACKS and scenario.head.from_statistics
    when = "every round but the first, which sums statistics" if spared else "every round"
    return [f"attack {kind}: {shown}{more} {does} in {when}"]


def _left_out(split: ClientSplit) -> list[str]:
    if not split.excluded:
        return []
    shown = ", ".join(f"{name} ({examples})" for name, examples in split.excluded[:5])
    more = f" and {len(split.excluded) - 5} more" if len(split.excluded) > 5 else ""
    what = "client has" if len(split.excluded) == 1 else "clients have"
    return [
        f"{len(split.excluded)} {what} too few examples to train on and left out: {shown}{more}"
    ]

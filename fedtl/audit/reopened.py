"""A finished run with its data and its head in hand again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedtl.build import Built, make_federation, open_data
from fedtl.clients.attacks import poison
from fedtl.conduct import head_hash
from fedtl.errors import InputError
from fedtl.planning import liars_of, plan_round
from fedtl.plans import RoundPlan
from fedtl.privacy.canaries import Planted, plant
from fedtl.ready_features import ExtractionProgress, OpenedData, allowed_threads
from fedtl.results.runs import PARTY, SCENARIO, RunFolder
from fedtl.rounds import Federation
from fedtl.scenario.load import load_scenario
from fedtl.scenario.schema import Scenario
from fedtl.types import Head, Population

HEAD = "head.safetensors"


@dataclass(frozen=True)
class Reopened:
    """What an audit needs of a run.

    Attributes:
        scenario: the run's, with clients in this process.
        summary: ``summary.json``.
        head: the one that the run ended with.
        opened, built: its data and its federation, made anew.
        population: everybody's true data.
        trained: what the clients trained on: with canaries planted and liars' data falsified.
        planted: the canaries.
    """

    path: Path
    scenario: Scenario
    summary: Mapping[str, Any]
    head: Head
    opened: OpenedData
    built: Built
    planted: Planted
    trained: Population

    @property
    def population(self) -> Population:
        """Everybody's true data."""
        return self.built.population

    @property
    def threads(self) -> int:
        """CPU threads to use."""
        return allowed_threads(self.scenario)

    @property
    def promised(self) -> float | None:
        """The upper bound of epsilon that the run wrote down; None where it promised nothing."""
        return self.summary.get("epsilon")

    @cached_property
    def first(self) -> tuple[Head, RoundPlan]:
        """The head that clients were sent in round 1, and what they were asked to do."""
        federation = self.built.federation
        clients = federation.roster.num_clients
        state = federation.strategy.init(federation.head, clients)
        return state.head, plan_round(self.scenario, clients, federation.strategy, state, 1)

    @cached_property
    def quiet(self) -> Federation:
        """The same federation without noise, masks and canaries; what is clipped stays clipped."""
        privacy = self.scenario.privacy
        if privacy.mechanism == "none" and privacy.secure_aggregation == "none":
            return self.built.federation
        facts = self.summary.get("privacy") or {}
        plain = {
            "noise_multiplier": 0.0 if privacy.mechanism != "none" else None,
            "epsilon": None,
            "budget": None,
            "noise": "independent",
            "bands": None,
            "adaptive_clip": False,
            "clip": facts.get("final_clip") or privacy.clip,
            "secure_aggregation": "none",
            "canaries": 0,
        }
        scenario = self.scenario.model_copy(update={"privacy": privacy.model_copy(update=plain)})
        return make_federation(replace(self.opened, scenario=scenario)).federation


def reopen(path: Path, progress: ExtractionProgress | None = None) -> Reopened:
    """Make a run's data and federation anew and read its head.

    Raises:
        InputError: no finished simulation, or not the data or the head that belong to it.
    """
    if not (path / SCENARIO).is_file():
        raise InputError("not a run folder", where=path, allowed="a folder that 'fedtl run' made")
    if (path / PARTY).is_file():
        raise InputError(
            "this run has real clients, and what to attack the head with is with them",
            where=path,
            do="Audit a simulation of the same scenario, with privacy.canaries",
        )
    summary = RunFolder(path).finished()
    if summary is None:
        raise InputError(
            "this run is not finished, so there is no head to attack",
            where=path,
            do=f"Type 'fedtl resume {path}'",
        )
    scenario = load_scenario(str(path / SCENARIO))
    if scenario.transfer.mode != "head":
        raise InputError(
            "the network behind the cut was trained too, and attacks know heads on frozen features",
            where=path,
            do='Audit a run with transfer.mode = "head"',
        )
    if scenario.augmentation.views > 1:
        raise InputError(
            "each example was trained on in several views, and attacks look for one row of each",
            where=path,
            do="Audit a run with augmentation.views = 1",
        )
    here = scenario.engine.model_copy(update={"kind": "local"})
    scenario = scenario.model_copy(update={"engine": here})
    head = read_head(path, summary)
    opened = open_data(scenario)
    built = make_federation(opened, progress)
    if built.features.examples.identity != summary.get("data", {}).get("fingerprint"):
        raise InputError(
            "the data are not those that the run was made with",
            where=scenario.data.path or scenario.data.source,
            do="Put the data back as they were, or run the scenario anew",
        )
    planted, canaries = plant(built.population, scenario.privacy, scenario.seed)
    lying = liars_of(scenario, built.population.names)
    trained = poison(planted, scenario.attack, lying, scenario.seed)
    return Reopened(path, scenario, summary, head, opened, built, canaries, trained)


def read_head(path: Path, summary: Mapping[str, Any]) -> Head:
    """The head that a run ended with. Raises InputError where it is gone or is another."""
    try:
        head: Head = load_file(path / HEAD)
    except (OSError, SafetensorError) as error:
        raise InputError(
            "the head of this run is missing or damaged",
            where=path / HEAD,
            do="Put it back from a copy, or run the scenario anew",
        ) from error
    if head_hash(head) != summary.get("head_sha256"):
        raise InputError(
            "this is not the head that the run ended with",
            where=path / HEAD,
            do="Put it back from a copy, or run the scenario anew",
        )
    return head

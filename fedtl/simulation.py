"""One simulated run from a scenario to a finished folder, new or resumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedtl import conduct, seeding
from fedtl.build import (
    Built,
    OpenedData,
    allowed_threads,
    make_federation,
    open_data,
    resolve_device,
)
from fedtl.clients.attacks import backdoor_success
from fedtl.clients.personal_store import PersonalStore
from fedtl.conduct import Judge, Outcome, Prepared
from fedtl.errors import FedtlError, InputError, Interrupted
from fedtl.evaluation import references
from fedtl.evaluation.personalised import judge_personalised
from fedtl.evaluation.ridge import fit_ridge
from fedtl.forecast import Forecast, forecast
from fedtl.interrupts import Interrupts
from fedtl.planning import judged_clients, liars_of, local_training
from fedtl.results.runs import PARTY, SCENARIO, RunFolder, refuse_taken
from fedtl.rounds import Federation
from fedtl.scenario.load import dump_scenario, load_scenario
from fedtl.scenario.schema import Scenario
from fedtl.strategies import notes_of, tasks_of
from fedtl.types import Head, Population

RIDGE = 0.01
"""Of the pooled ridge head, where the strategy has none of its own."""

PERSONAL = "personal"
"""Folder of a run in which its simulated clients keep what is theirs."""


class Observer(conduct.Observer, Protocol):
    """Is told what happens; the terminal is one."""

    def planned(self, opened: OpenedData, plan: Forecast) -> None:
        """Before anything slow begins."""

    def extracting(self, done: int, total: int) -> None:
        """Images through the trunk so far."""


def new_run_path(scenario: Scenario) -> Path:
    """``runs/<scenario>-<time>``, a name that is not taken."""
    base = Path("runs") / f"{scenario.name}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = base, 2
    while path.exists():
        path = base.with_name(f"{base.name}-{number}")
        number += 1
    return path


def find_run(name: str) -> Path:
    """A run folder by path, by its name under ``runs/``, or ``last``."""
    if name == "last":
        runs = [p for depth in ("*", "*/*") for p in Path("runs").glob(f"{depth}/{SCENARIO}")]
        found = sorted(runs, key=lambda p: p.stat().st_mtime)
        if not found:
            raise InputError("there is no run yet", where="runs/", do="Type 'fedtl run quickstart'")
        return found[-1].parent
    path = Path(name)
    return path if path.exists() or not (Path("runs") / name).exists() else Path("runs") / name


def run_scenario(
    scenario: Scenario, path: Path, observer: Observer, interrupts: Interrupts
) -> dict[str, Any]:
    """Run a scenario from its start into a new folder; returns what ``summary.json`` holds.

    Raises:
        FedtlError: any; a folder in which nothing was committed yet is removed again, unless the
            run was interrupted.
    """
    started = time.perf_counter()
    refuse_taken(path)
    interrupts.hint = f"Type 'fedtl resume {path}' to go on"
    opened = open_data(scenario)
    folder = RunFolder.create(path, dump_scenario(scenario))
    try:
        return _carry_on(opened, folder, observer, interrupts, started)
    except FedtlError as error:
        if not isinstance(error, Interrupted) and not any((path / "checkpoints").glob("*.json")):
            folder.discard()
        raise
    finally:
        folder.release()


def resume_run(
    path: Path, observer: Observer, interrupts: Interrupts, *, allow_changes: bool = False
) -> dict[str, Any]:
    """Go on with a run from its last commit; a finished one is left as it is."""
    started = time.perf_counter()
    if (path / PARTY).is_file():
        raise InputError(
            "this run has real clients", where=path, do=f"Type 'fedtl server resume {path}'"
        )
    folder = RunFolder.reopen(path)
    interrupts.hint = f"Type 'fedtl resume {path}' to go on"
    try:
        if folder.finished() is not None:
            raise InputError(
                "this run is finished", where=path, do="Read its summary.json, or start another"
            )
        opened = open_data(load_scenario(str(path / SCENARIO)))
        folder.event("resumed")
        return _carry_on(opened, folder, observer, interrupts, started, allow_changes)
    finally:
        folder.release()


def _carry_on(
    opened: OpenedData,
    folder: RunFolder,
    observer: Observer,
    interrupts: Interrupts,
    started: float,
    allow_changes: bool = False,
) -> dict[str, Any]:
    """Everything after the folder is there: features, rounds, references, summary."""
    observer.planned(opened, forecast(opened))

    def progress(done: int, total: int) -> None:
        observer.extracting(done, total)
        interrupts.check("interrupted while images went through the trunk")

    store = PersonalStore(folder.path / PERSONAL)
    prepared = _prepare(opened, make_federation(opened, progress, store), store)
    return conduct.conduct(prepared, folder, observer, interrupts, started, allow_changes)


def _prepare(opened: OpenedData, built: Built, store: PersonalStore) -> Prepared:
    """What is known of the data and the backbone of a simulation, and how heads are judged."""
    examples, leaks = built.features.examples, built.leaks
    federation = built.federation
    notes = list(built.features.notes)
    notes += notes_of(federation.scenario, federation.roster, federation.head)
    notes += _alone_in_class(built)
    if leaks.train_test or leaks.between_clients:
        notes.append(
            f"the same content is in train and test {leaks.train_test} times and at two clients "
            f"{leaks.between_clients} times; allowed here"
        )
    return Prepared(
        federation=federation,
        judge=_judge(built, store),
        data={
            "fingerprint": examples.fingerprint,
            "examples": len(examples),
            "skipped_examples": len(opened.examples) - len(examples),
            "excluded_clients": len(built.features.split.excluded),
            "leaks_train_test": leaks.train_test,
            "leaks_between_clients": leaks.between_clients,
        },
        backbone={
            "name": opened.backbone.name,
            "cut": opened.backbone.cut,
            "weights_sha256": opened.backbone.weights_hash,
            "weights_source": opened.backbone.weights_source,
            **built.features.facts,
        },
        extract_seconds=built.features.seconds,
        notes=notes,
    )


def _judge(built: Built, store: PersonalStore) -> Judge:
    """The federated head and every reference, each judged twice, on the population that is here."""
    federation, population = built.federation, built.population
    scenario, section = federation.scenario, federation.scenario.evaluation
    threads, device = allowed_threads(scenario), resolve_device(scenario)
    decay = scenario.training.weight_decay

    def judge(
        outcome: Outcome, begin: Callable[[str], None], check: Callable[[], None]
    ) -> dict[str, references.Judgement]:
        head, personal = outcome.head, outcome.personal
        whole = personal is None or not personal.completes  # else it is no model by itself

        def own(place: references.Judge) -> references.Judgement:
            assert personal is not None
            training = local_training(scenario, 1)  # a schedule may have ended near zero
            return judge_personalised(
                place, head, personal, training, outcome.rounds, scenario.seed, store, check
            )

        judged = judged_clients(scenario, population.num_clients)
        rows = references.everyone_rows(
            population, judged, section.everyone_examples, scenario.seed
        )
        place = references.Judge(population, judged, rows, threads, device)
        found: dict[str, references.Judgement] = {}
        if personal is not None:
            begin("personal")
            found["personal"] = own(place)
        found["federated"] = references.judge_shared(place, head) if whole else found["personal"]
        facts = found["federated"].facts
        if scenario.attack.kind == "backdoor" and whole:
            facts["backdoor_success"] = _backdoor(scenario, population, head, threads)
        limit = section.reference_clients
        if len(judged) > limit and section.references:
            stream = seeding.generator(scenario.seed, "references")
            place = replace(place, clients=np.sort(stream.choice(judged, limit, replace=False)))
            sample = references.judge_shared(place, head) if whole else own(place)
            found["federated_sample"] = sample
        for name in section.references:
            begin(name)
            found[name] = _reference(name, place, federation, check)
        pooled = found.get("centralised")
        linear = scenario.head.kind == "linear" and set(head) == set(federation.head)
        if pooled is not None and whole and linear:  # only then there is one right answer
            facts.update(references.from_optimum(place, head, pooled, decay))
        return found

    return judge


def _reference(
    name: str, place: references.Judge, federation: Federation, check: Callable[[], None]
) -> references.Judgement:
    """One of ``evaluation.references``, trained and judged."""
    scenario, head = federation.scenario, federation.head
    if name == "local_only":
        trainings = [local_training(scenario, r) for r in range(1, scenario.rounds + 1)]
        return references.judge_alone(place, head, trainings, scenario.seed, check)
    if name == "ridge":
        ridge = float(getattr(scenario.strategy, "ridge", RIDGE))
        fitted = fit_ridge(place.population, head, ridge, place.threads)
        return references.judge_shared(place, fitted)
    return references.judge_pooled(place, head, scenario.training.weight_decay, check)


def _backdoor(scenario: Scenario, population: Population, head: Head, threads: int) -> float | None:
    lying, seed = liars_of(scenario, population.names), scenario.seed
    rate = backdoor_success(population, head, scenario.attack, lying, seed, threads=threads)
    return None if np.isnan(rate) else rate


def _alone_in_class(built: Built) -> list[str]:
    """A warning where a client's statistics are those of a single example."""
    population, scenario = built.population, built.federation.scenario
    if "statistics" not in tasks_of(scenario):
        return []
    num_classes = len(population.classes)
    counts = [
        np.bincount(population.labels[population.train.of(client)], minlength=num_classes)
        for client in range(population.num_clients)
    ]
    lone = int((np.array(counts) == 1).sum())
    if not lone:
        return []
    return [
        f"{lone} times a client has one example of a class: the sum of that class's features, "
        "which it sends, is that example's features themselves"
    ]

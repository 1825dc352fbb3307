"""One simulated run from a scenario to a finished folder, new or resumed."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedtl import conduct
from fedtl.build import Built, make_federation, open_data
from fedtl.clients.personal_store import PersonalStore
from fedtl.conduct import Prepared
from fedtl.errors import FedtlError, InputError, Interrupted, times
from fedtl.forecast import Forecast, forecast
from fedtl.interrupts import Interrupts
from fedtl.judging import Judging
from fedtl.ready_features import OpenedData
from fedtl.results.runs import PARTY, SCENARIO, RunFolder, refuse_taken
from fedtl.scenario.load import dump_scenario, load_scenario
from fedtl.scenario.schema import Scenario
from fedtl.strategies import notes_of, tasks_of
from fedtl.types import Int64, Population

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
        return carry_on(opened, folder, observer, interrupts, started)
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
        return carry_on(opened, folder, observer, interrupts, started, allow_changes)
    finally:
        folder.release()


def carry_on(
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
        interrupts.check("interrupted while examples went through the trunk")

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
            f"the same content is in train and test {times(leaks.train_test)} and at two clients "
            f"{times(leaks.between_clients)}; allowed here"
        )
    return Prepared(
        federation=federation,
        judge=Judging(built, opened.backbone.image_size, store, opened.backbone),
        data={
            "fingerprint": examples.identity,
            "examples": len(examples) - built.features.views,
            "views": built.features.views,
            "skipped_examples": len(opened.examples) + built.features.views - len(examples),
            "excluded_clients": len(built.features.split.excluded),
            "leaks_train_test": leaks.train_test,
            "leaks_between_clients": leaks.between_clients,
        },
        backbone={**opened.backbone.card(), **built.features.facts},
        extract_seconds=built.features.seconds,
        notes=notes,
        class_counts=lambda clients: _class_counts(built.population, clients),
        tail=built.population.tail,
    )


def _class_counts(population: Population, clients: Int64) -> Int64:
    """Clients' training examples by class, int64 [k, C]."""
    counts = np.zeros((len(clients), len(population.classes)), np.int64)
    for i, client in enumerate(clients.tolist()):
        labels = population.labels[population.train.of(client)]
        counts[i] = np.bincount(labels, minlength=counts.shape[1])
    return counts


def _alone_in_class(built: Built) -> list[str]:
    """A warning where a client's statistics are those of a single example."""
    population, scenario = built.population, built.federation.scenario
    if "statistics" not in tasks_of(scenario):
        return []
    lone = int((_class_counts(population, np.arange(population.num_clients)) == 1).sum())
    if not lone:
        return []
    return [
        f"{times(lone)} a client has one example of a class: the sum of that class's features, "
        "which it sends, is that example's features themselves"
    ]

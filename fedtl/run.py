"""One run from a scenario to a finished folder, new or resumed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedtl import machine, seeding
from fedtl.build import (
    Built,
    OpenedData,
    allowed_threads,
    make_federation,
    open_data,
    resolve_device,
)
from fedtl.errors import FedtlError, InputError, Interrupted
from fedtl.evaluation.metrics import client_rows
from fedtl.evaluation.references import (
    Judge,
    Judgement,
    beside,
    everyone_rows,
    judge_alone,
    judge_pooled,
    judge_shared,
)
from fedtl.evaluation.verdicts import Verdict, give_verdict
from fedtl.failpoints import failpoint
from fedtl.forecast import Forecast, forecast
from fedtl.interrupts import Interrupts
from fedtl.planning import judged_clients, local_training
from fedtl.results.runs import SCENARIO, RunFolder, refuse_taken
from fedtl.rounds import Progress, run_rounds
from fedtl.scenario.load import dump_scenario, load_scenario
from fedtl.scenario.schema import Scenario
from fedtl.types import ClientUpdates, Head


class Observer(Protocol):
    """Is told what happens; the terminal is one."""

    def planned(self, opened: OpenedData, plan: Forecast) -> None:
        """Before anything slow begins."""

    def extracting(self, done: int, total: int) -> None:
        """Images through the trunk so far."""

    def ready(self, built: Built) -> None:
        """Features are there, clients are dealt, the rounds can begin."""

    def round_done(self, row: Mapping[str, Any], updates: ClientUpdates) -> None:
        """One more round is committed."""

    def noted(self, note: str) -> None:
        """Something the user should know, in one line."""

    def comparing(self, reference: str) -> None:
        """A reference is being trained."""

    def finished(self, summary: Mapping[str, Any], verdict: Verdict, folder: Path) -> None:
        """The run is whole."""


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

    built = make_federation(opened, progress)
    federation = built.federation
    with closing(federation.engine):
        before = time.perf_counter()
        federation.engine.start(federation.head)
        start_seconds = time.perf_counter() - before
        observer.ready(built)
        folder.event("started", scenario_hash=federation.identity["scenario_hash"])
        interrupts.check("interrupted before the first round")
        try:
            state, done = run_rounds(
                federation,
                folder,
                observer.round_done,
                interrupts,
                allow_changes=allow_changes,
                tell=observer.noted,
            )
        except FedtlError as error:
            with suppress(OSError, FedtlError):  # what stopped the run is the one error to tell
                folder.event("stopped", exit_code=error.exit_code, what=error.what)
                folder.write_tables()
            raise
        return _conclude(
            built, opened, folder, observer, interrupts, state.head, done, started, start_seconds
        )


def _conclude(
    built: Built,
    opened: OpenedData,
    folder: RunFolder,
    observer: Observer,
    interrupts: Interrupts,
    head: Head,
    progress: Progress,
    started: float,
    start_seconds: float,
) -> dict[str, Any]:
    """Judge the final head beside its references and write everything down."""
    federation = built.federation
    roster = federation.roster
    judged = judged_clients(federation.scenario, roster.num_clients)
    began = time.perf_counter()
    judgements = _judgements(built, folder, observer, interrupts, head, judged)
    references_seconds = time.perf_counter() - began
    # Where only some clients were also trained alone, the verdict is about those.
    compared = judgements.pop("federated_sample", judgements["federated"])
    verdict = give_verdict(
        compared,
        judgements.get("local_only"),
        judgements.get("centralised"),
        [roster.names[i] for i in compared.clients.tolist()],
    )
    mine, rounds = judgements["federated"], federation.scenario.rounds
    columns = roster.columns(mine.clients)
    folder.clients.append(client_rows(rounds, mine.clients, mine.everyone, columns, "everyone"))
    references = {name: found for name, found in judgements.items() if name != "federated"}
    folder.write_tables(beside(references, rounds))
    folder.write_head(head, _head_card(built, opened))
    summary = _summary(built, opened, head, progress, judgements, verdict)
    train = progress.train_seconds
    extract = built.features.seconds
    summary["seconds"] = {
        "extract": extract,
        "start": start_seconds,
        "train": train,
        "references": references_seconds,
        "total": max(time.perf_counter() - started, extract + train),
    }
    summary["client_rounds_per_second"] = progress.client_rounds / train if train else None
    summary["peak_rss_mib"] = round(machine.peak_rss_mib(), 1)
    summary["versions"] = machine.versions()
    summary["cpu"] = machine.cpu_model()
    summary["device"] = resolve_device(federation.scenario)
    summary["threads"] = allowed_threads(federation.scenario)
    failpoint("before_summary", progress.round)
    folder.event("finished", head_sha256=summary["head_sha256"])
    folder.finish(summary)
    observer.finished(summary, verdict, folder.path)
    return summary


def _judgements(
    built: Built,
    folder: RunFolder,
    observer: Observer,
    interrupts: Interrupts,
    head: Head,
    judged: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> dict[str, Judgement]:
    """The federated head and every reference the scenario asks for, each judged twice."""
    federation, population = built.federation, built.population
    scenario = federation.scenario
    judge = Judge(
        population,
        judged,
        everyone_rows(population, judged, scenario.evaluation.everyone_examples, scenario.seed),
        allowed_threads(scenario),
        resolve_device(scenario),
    )
    found = {"federated": judge_shared(judge, head)}
    limit = scenario.evaluation.reference_clients
    if len(judged) > limit and scenario.evaluation.references:
        stream = seeding.generator(scenario.seed, "references")
        judge = replace(judge, clients=np.sort(stream.choice(judged, limit, replace=False)))
        found["federated_sample"] = judge_shared(judge, head)

    def check() -> None:
        interrupts.check(
            "interrupted; all rounds are done", f"Type 'fedtl resume {folder.path}' to finish"
        )

    for name in scenario.evaluation.references:
        observer.comparing(name)
        check()
        failpoint(f"before_{name}", scenario.rounds)
        if name == "local_only":
            rounds = range(1, scenario.rounds + 1)
            trainings = [local_training(scenario, round) for round in rounds]
            found[name] = judge_alone(judge, federation.head, trainings, scenario.seed, check)
        else:
            decay = scenario.training.weight_decay
            found[name] = judge_pooled(judge, federation.head, decay, check)
    return found


def _head_card(built: Built, opened: OpenedData) -> dict[str, str]:
    """What the head fits: goes into the metadata of ``head.safetensors``."""
    federation = built.federation
    return {
        "fedtl": machine.versions().get("fedtl", ""),
        "scenario_hash": federation.identity["scenario_hash"],
        "backbone": opened.backbone.name,
        "backbone_sha256": opened.backbone.weights_hash,
        "cut": opened.backbone.cut,
        "kind": federation.scenario.head.kind,
        "classes": "\n".join(federation.roster.classes),
    }


def _summary(
    built: Built,
    opened: OpenedData,
    head: Head,
    progress: Progress,
    judgements: Mapping[str, Judgement],
    verdict: Verdict,
) -> dict[str, Any]:
    """The part of ``summary.json`` that is the same on every machine and engine."""
    federation = built.federation
    scenario, roster = federation.scenario, federation.roster
    return {
        "name": scenario.name,
        "scenario_hash": federation.identity["scenario_hash"],
        "engine": scenario.engine.kind,
        "seed": scenario.seed,
        "strategy": scenario.strategy.name,
        "rounds_completed": progress.round,
        "num_clients": roster.num_clients,
        "head_sha256": head_hash(head),
        "final": judgements["federated"].facts,
        "references": {n: j.facts for n, j in judgements.items() if n != "federated"},
        "bytes_up": progress.bytes_up,
        "bytes_down": progress.bytes_down,
        "epsilon": None,
        "cohorts_blake2b": progress.cohorts,
        "batches_blake2b": progress.batches,
        "verdict": asdict(verdict),
        "data": {
            "fingerprint": built.features.examples.fingerprint,
            "examples": len(built.features.examples),
            "train": int(roster.train.sum()),
            "test": int(roster.test.sum()),
            "classes": len(roster.classes),
            "skipped_examples": len(opened.examples) - len(built.features.examples),
            "excluded_clients": len(built.features.split.excluded),
            "leaks_train_test": built.leaks.train_test,
            "leaks_between_clients": built.leaks.between_clients,
        },
        "backbone": {
            "name": opened.backbone.name,
            "cut": opened.backbone.cut,
            "weights_sha256": opened.backbone.weights_hash,
            "weights_source": opened.backbone.weights_source,
            "features": roster.width,
            **built.features.facts,
        },
    }


def head_hash(head: Head) -> str:
    """SHA-256 over a head's tensors by name, shape and float32 bytes: 64 hex digits."""
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(head):
        tensor = np.ascontiguousarray(head[name], np.float32)
        digest.update(f"{name}{tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()

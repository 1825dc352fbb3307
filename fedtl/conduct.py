"""One run from a prepared federation to a finished folder, wherever its clients live."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedtl import machine
from fedtl.build import resolve_device
from fedtl.checkpoints import Progress
from fedtl.cost_card import Meter, Work, asked_examples, cost_card
from fedtl.errors import FedtlError
from fedtl.evaluation import columns as known
from fedtl.evaluation.advice import Compared, Counsel, counsel
from fedtl.evaluation.calibration import Calibration
from fedtl.evaluation.contributions import open_kept
from fedtl.evaluation.fairness import fairness
from fedtl.evaluation.metrics import client_rows
from fedtl.evaluation.references import Judgement
from fedtl.evaluation.verdicts import Verdict, give_verdict
from fedtl.failpoints import failpoint
from fedtl.interrupts import Interrupts
from fedtl.planning import personal_at_end
from fedtl.plans import Personal
from fedtl.privacy_card import privacy_card, privacy_notes
from fedtl.ready_features import allowed_threads
from fedtl.results.module_card import card_facts
from fedtl.results.runs import RunFolder
from fedtl.results.statistics import keeps_statistics
from fedtl.rounds import Federation, run_rounds
from fedtl.spending import BudgetSpent
from fedtl.strategies import last_notes
from fedtl.strategies.class_gate import kept_back
from fedtl.strategies.warm_start import start_of
from fedtl.types import ClientUpdates, Head, Int64, Tail


class Observer(Protocol):
    """Is told what happens during the rounds and after; the terminal is one."""

    def ready(self, notes: Sequence[str], names: Sequence[str]) -> None:
        """Clients (of these names, by id) and features are there, the rounds can begin."""

    def round_done(self, row: Mapping[str, Any], updates: ClientUpdates) -> None:
        """One more round is committed."""

    def noted(self, note: str) -> None:
        """Something the user should know, in one line."""

    def comparing(self, reference: str) -> None:
        """A reference is being trained."""

    def finished(self, summary: Mapping[str, Any], verdict: Verdict, folder: Path) -> None:
        """The run is whole."""


@dataclass(frozen=True)
class Outcome:
    """What the rounds ended with.

    Attributes:
        head: the shared one.
        personal: what each client makes of it for itself, or None.
        rounds: how many there were.
        privacy: what the summary says of it.
        start: where training began, if a round made it of statistics; else the federation's head.
    """

    head: Head
    personal: Personal | None
    rounds: int
    privacy: Mapping[str, Any] = field(default_factory=dict)
    start: Head | None = None


@dataclass(frozen=True)
class Judged:
    """The last head and its references, on the same test examples.

    Attributes:
        heads: "federated", "personal" where clients have heads of their own, each reference.
        beside: the federated head on the clients that the references are of, where those are some.
        compared: of these clients, heads against the clients' own ones: "federated" and others;
            empty where no client was trained alone.
        calibration: of the federated head; None where that is not known.
        notes: what the user should know, one line each.
        forgetting: of the source task; None where it was not measured.
    """

    heads: Mapping[str, Judgement]
    beside: Judgement
    compared: Mapping[str, Compared]
    calibration: Calibration | None = None
    notes: Sequence[str] = ()
    forgetting: Mapping[str, Any] | None = None


Judge = Callable[[Outcome, Callable[[str], None], Callable[[], None]], Judged]
"""Judges the last head and trains the references: called with the outcome, with what to call before
each reference, and with what to call often (it raises to stop)."""


@dataclass(frozen=True)
class Prepared:
    """A federation ready to run, and what is written down about it.

    Attributes:
        judge: how the last head and its references are judged.
        data, backbone: sections of ``summary.json``.
        extract_seconds: what making the features took.
        notes: what the user should know before the first round, one line each.
        class_counts: gives clients' training examples by class [k, C]; None where nobody knows.
        tail: what is trained between the cut and the head.
    """

    federation: Federation
    judge: Judge
    data: Mapping[str, Any]
    backbone: Mapping[str, Any]
    extract_seconds: float
    notes: Sequence[str]
    class_counts: Callable[[Int64], Int64] | None = None
    tail: Tail | None = None


def conduct(
    prepared: Prepared,
    folder: RunFolder,
    observer: Observer,
    interrupts: Interrupts,
    started: float,
    allow_changes: bool = False,
) -> dict[str, Any]:
    """All rounds, the references and the summary, into the run's folder; closes the engine.

    Args:
        started: ``time.perf_counter()`` when the whole began.

    Raises:
        FedtlError: whatever stopped the run; what was committed is kept. Where that is the budget
            of privacy, the run is whole all the same, with fewer rounds.
    """
    federation, meter = prepared.federation, Meter()
    with closing(federation.engine):
        before = time.perf_counter()
        federation.engine.start(federation.head)
        start_seconds = time.perf_counter() - before
        notes = [*prepared.notes, *privacy_notes(federation)]
        prepared = replace(prepared, notes=notes)
        observer.ready(notes, federation.roster.names)
        folder.event("started", scenario_hash=federation.identity["scenario_hash"])
        interrupts.check("interrupted before the first round")
        spent: BudgetSpent | None = None
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
            if (
                not isinstance(error, BudgetSpent)
                or error.ended is None
                or not error.ended[1].round
            ):
                raise
            spent, (state, done) = error, error.ended  # no more rounds, but this head
            prepared = replace(prepared, notes=[*notes, error.what])
        kept = kept_back(federation.scenario, federation.roster, state)
        for note in [*last_notes(federation.scenario, state), *kept]:
            observer.noted(note)
        own = personal_at_end(
            federation.scenario, federation.strategy, state, len(federation.roster.classes)
        )
        card = privacy_card(federation, folder.path, state, done)
        outcome = Outcome(state.result, own, done.round, card, start_of(state))
        summary = _conclude(
            prepared, folder, observer, interrupts, outcome, done, started, start_seconds, meter
        )
        if spent is not None:
            raise spent
        return summary


def _conclude(
    prepared: Prepared,
    folder: RunFolder,
    observer: Observer,
    interrupts: Interrupts,
    outcome: Outcome,
    progress: Progress,
    started: float,
    start_seconds: float,
    meter: Meter,
) -> dict[str, Any]:
    """Judge the final head beside its references and write everything down."""
    head = outcome.head
    federation = prepared.federation
    scenario, roster = federation.scenario, federation.roster

    def check() -> None:
        interrupts.check("interrupted; all rounds are done")

    def begin(reference: str) -> None:
        observer.comparing(reference)
        check()
        failpoint(f"before_{reference}", scenario.rounds)

    began = time.perf_counter()
    judged = prepared.judge(outcome, begin, check)
    references_seconds = time.perf_counter() - began
    for note in judged.notes:
        observer.noted(note)
    rule, seed = scenario.verdict, scenario.seed
    told = counsel(judged.beside.clients, judged.compared, rule, seed) if judged.compared else None
    # Where only some clients were also trained alone, the verdict is about those.
    verdict = give_verdict(
        judged.beside,
        judged.heads.get("local_only"),
        judged.heads.get("centralised"),
        [roster.names[i] for i in judged.beside.clients.tolist()],
        rule,
        seed,
        judged.compared.get("federated"),
        told,
    )
    mine = judged.heads["federated"]
    columns = roster.columns(mine.clients)
    if outcome.personal is not None and outcome.personal.completes:  # the rounds had none to judge
        folder.clients.append(client_rows(progress.round, mine.clients, mine.own, columns, "test"))
    folder.clients.append(
        client_rows(progress.round, mine.clients, mine.everyone, columns, "everyone")
    )
    _write_tables(prepared, folder, progress.round, judged, told)
    whole = outcome.personal is None or not outcome.personal.completes
    epsilon = outcome.privacy.get("epsilon")
    trained = (progress.round, mine.facts, epsilon, whole)
    folder.write_head(head, card_facts(scenario, roster, prepared.backbone, *trained))
    summary = _summary(prepared, outcome, progress, judged, verdict)
    train, extract = progress.train_seconds, prepared.extract_seconds
    summary["seconds"] = {
        "extract": extract,
        "start": start_seconds,
        "train": train,
        "references": references_seconds,
        "total": max(time.perf_counter() - started, extract + train),
    }
    summary["client_rounds_per_second"] = progress.client_rounds / train if train else None
    summary["peak_rss_mib"] = round(machine.peak_rss_mib(), 1)
    summary["notes"] = [*prepared.notes, *judged.notes]
    summary["versions"] = machine.versions()
    summary["cpu"] = machine.cpu_model()
    summary["device"] = resolve_device(scenario)
    summary["threads"] = allowed_threads(scenario)
    rows = None if prepared.class_counts is None else int(roster.train.sum() + roster.test.sum())
    asked = asked_examples(folder.clients)
    work = Work(prepared.backbone, rows, prepared.tail, head, asked)
    summary["cost"] = cost_card(scenario, work, meter, summary)
    failpoint("before_summary", progress.round)
    folder.event("finished", head_sha256=summary["head_sha256"])
    folder.finish(summary)
    observer.finished(summary, verdict, folder.path)
    return summary


def _write_tables(
    prepared: Prepared, folder: RunFolder, last: int, judged: Judged, told: Counsel | None
) -> None:
    """The Parquet files, with all that was found at the end."""
    roster, heads = prepared.federation.roster, judged.heads
    contributions = open_kept(folder.path).contributions() if keeps_statistics(folder.path) else []
    complete = known.beside(
        last,
        known.of_heads({name: found for name, found in heads.items() if name != "federated"}),
        known.of_contributions(contributions),
        known.of_pairs(judged.beside.clients, judged.compared),
        known.of_counsel(told) if told is not None else {},
        known.of_calibration(judged.calibration) if judged.calibration is not None else {},
    )
    mine, alone = heads["federated"], heads.get("local_only")
    train = None if prepared.class_counts is None else prepared.class_counts(mine.clients)
    classes = known.class_table(
        mine.sums,
        None if alone is None else alone.sums,
        roster.columns(mine.clients),
        roster.classes,
        train,
    )
    folder.write_tables(complete, classes)


def _summary(
    prepared: Prepared,
    outcome: Outcome,
    progress: Progress,
    judged: Judged,
    verdict: Verdict,
) -> dict[str, Any]:
    """The part of ``summary.json`` that is the same on every machine and engine."""
    federation = prepared.federation
    scenario, roster, heads = federation.scenario, federation.roster, judged.heads
    return {
        "name": scenario.name,
        "scenario_hash": federation.identity["scenario_hash"],
        "engine": scenario.engine.kind,
        "seed": scenario.seed,
        "strategy": scenario.strategy.name,
        "rounds_completed": progress.round,
        "num_clients": roster.num_clients,
        "head_sha256": head_hash(outcome.head),
        "final": heads["federated"].facts,
        "personal": heads["personal"].facts if "personal" in heads else None,
        "references": {n: j.facts for n, j in heads.items() if n not in SHOWN_APART},
        "bytes_up": progress.bytes_up,
        "bytes_down": progress.bytes_down,
        **outcome.privacy,
        "cohorts_blake2b": progress.cohorts,
        "batches_blake2b": progress.batches,
        "verdict": verdict.as_facts(),
        "fairness": {
            name: fairness(
                heads[name].sums,
                roster.columns(heads[name].clients)["domain"],
                roster.classes,
            )
            for name in FAIRNESS
            if name in heads
        },
        "forgetting": judged.forgetting,
        "calibration": judged.calibration.facts if judged.calibration else UNCALIBRATED,
        "data": {
            "train": int(roster.train.sum()),
            "test": int(roster.test.sum()),
            "classes": len(roster.classes),
            **prepared.data,
        },
        "backbone": {"features": roster.width, **prepared.backbone},
    }


SHOWN_APART = ("federated", "personal")
"""Judgements that are no references."""

UNCALIBRATED = {
    "calibration_error": None,
    "auroc": None,
    "note": "needs a shared head's scores of single examples; real clients keep theirs",
}

FAIRNESS = ("federated", "local_only")
"""Heads of which ``summary.json`` says how evenly they serve."""


def head_hash(head: Head) -> str:
    """SHA-256 over a head's tensors by name, shape and float32 bytes: 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(head):
        tensor = np.ascontiguousarray(head[name], np.float32)
        digest.update(f"{name}{tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()

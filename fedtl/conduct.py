"""One run from a prepared federation to a finished folder, wherever its clients live."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedtl import machine
from fedtl.build import allowed_threads, resolve_device
from fedtl.checkpoints import Progress
from fedtl.errors import FedtlError
from fedtl.evaluation.contributions import open_kept
from fedtl.evaluation.metrics import client_rows
from fedtl.evaluation.references import Judgement, beside
from fedtl.evaluation.verdicts import Verdict, give_verdict
from fedtl.failpoints import failpoint
from fedtl.interrupts import Interrupts
from fedtl.plans import Personal
from fedtl.results.runs import RunFolder
from fedtl.results.statistics import keeps_statistics
from fedtl.rounds import Federation, run_rounds
from fedtl.strategies import last_notes
from fedtl.strategies.base import personal_of
from fedtl.types import ClientUpdates, Head


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
    """

    head: Head
    personal: Personal | None
    rounds: int


Judge = Callable[[Outcome, Callable[[str], None], Callable[[], None]], dict[str, Judgement]]
"""Judges the last head and trains the references: called with the outcome, with what to call before
each reference, and with what to call often (it raises to stop). Gives "federated", "personal" where
clients have heads of their own, each reference by name, and "federated_sample" where the references
are of some clients only."""


@dataclass(frozen=True)
class Prepared:
    """A federation ready to run, and what is written down about it.

    Attributes:
        judge: how the last head and its references are judged.
        data, backbone: sections of ``summary.json``.
        extract_seconds: what making the features took.
        notes: what the user should know before the first round, one line each.
    """

    federation: Federation
    judge: Judge
    data: Mapping[str, Any]
    backbone: Mapping[str, Any]
    extract_seconds: float
    notes: Sequence[str]


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
        FedtlError: whatever stopped the run; what was committed is kept.
    """
    federation = prepared.federation
    with closing(federation.engine):
        before = time.perf_counter()
        federation.engine.start(federation.head)
        start_seconds = time.perf_counter() - before
        observer.ready(prepared.notes, federation.roster.names)
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
        for note in last_notes(federation.scenario, state):
            observer.noted(note)
        outcome = Outcome(state.result, personal_of(federation.strategy, state), done.round)
        return _conclude(
            prepared, folder, observer, interrupts, outcome, done, started, start_seconds
        )


def _conclude(
    prepared: Prepared,
    folder: RunFolder,
    observer: Observer,
    interrupts: Interrupts,
    outcome: Outcome,
    progress: Progress,
    started: float,
    start_seconds: float,
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
    judgements = prepared.judge(outcome, begin, check)
    references_seconds = time.perf_counter() - began
    # Where only some clients were also trained alone, the verdict is about those.
    compared = judgements.pop("federated_sample", judgements["federated"])
    verdict = give_verdict(
        compared,
        judgements.get("local_only"),
        judgements.get("centralised"),
        [roster.names[i] for i in compared.clients.tolist()],
    )
    mine = judgements["federated"]
    columns = roster.columns(mine.clients)
    if outcome.personal is not None and outcome.personal.completes:  # the rounds had none to judge
        folder.clients.append(client_rows(progress.round, mine.clients, mine.own, columns, "test"))
    folder.clients.append(
        client_rows(progress.round, mine.clients, mine.everyone, columns, "everyone")
    )
    references = {name: found for name, found in judgements.items() if name != "federated"}
    contributions = open_kept(folder.path).contributions() if keeps_statistics(folder.path) else []
    folder.write_tables(beside(references, progress.round, contributions))
    folder.write_head(head, _head_card(prepared))
    summary = _summary(prepared, head, progress, judgements, verdict)
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
    summary["versions"] = machine.versions()
    summary["cpu"] = machine.cpu_model()
    summary["device"] = resolve_device(scenario)
    summary["threads"] = allowed_threads(scenario)
    failpoint("before_summary", progress.round)
    folder.event("finished", head_sha256=summary["head_sha256"])
    folder.finish(summary)
    observer.finished(summary, verdict, folder.path)
    return summary


def _head_card(prepared: Prepared) -> dict[str, str]:
    """What the head fits: goes into the metadata of ``head.safetensors``."""
    federation = prepared.federation
    return {
        "fedtl": machine.versions().get("fedtl", ""),
        "scenario_hash": federation.identity["scenario_hash"],
        "backbone": prepared.backbone["name"],
        "backbone_sha256": prepared.backbone["weights_sha256"],
        "cut": prepared.backbone["cut"],
        "kind": federation.scenario.head.kind,
        "classes": "\n".join(federation.roster.classes),
    }


def _summary(
    prepared: Prepared,
    head: Head,
    progress: Progress,
    judgements: Mapping[str, Judgement],
    verdict: Verdict,
) -> dict[str, Any]:
    """The part of ``summary.json`` that is the same on every machine and engine."""
    federation = prepared.federation
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
        "personal": judgements["personal"].facts if "personal" in judgements else None,
        "references": {n: j.facts for n, j in judgements.items() if n not in SHOWN_APART},
        "bytes_up": progress.bytes_up,
        "bytes_down": progress.bytes_down,
        "epsilon": None,
        "cohorts_blake2b": progress.cohorts,
        "batches_blake2b": progress.batches,
        "verdict": asdict(verdict),
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


def head_hash(head: Head) -> str:
    """SHA-256 over a head's tensors by name, shape and float32 bytes: 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(head):
        tensor = np.ascontiguousarray(head[name], np.float32)
        digest.update(f"{name}{tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()

"""The one loop over rounds: sample, run, validate, aggregate, judge, record, commit.

Nothing else in fedtl loops over rounds, and nothing here knows where clients live. All randomness
is keyed by (seed, purpose, round, client), so a resumed run replays nothing and ends with the head
of the unbroken one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedtl.engines.base import Engine
from fedtl.errors import InputError, PolicyStop
from fedtl.evaluation.metrics import client_rows, defined, overall, per_client
from fedtl.failpoints import failpoint
from fedtl.interrupts import Interrupts
from fedtl.planning import (
    absent_clients,
    extend_digest,
    first_answers,
    judged_clients,
    plan_round,
)
from fedtl.results.commits import Commit
from fedtl.results.records import CLIENTS
from fedtl.results.runs import RunFolder
from fedtl.scenario.schema import Scenario
from fedtl.strategies.base import ServerState, Strategy, Summing
from fedtl.strategies.validation import accept_updates
from fedtl.types import (
    ClientFailure,
    ClientUpdates,
    Float64,
    Head,
    Roster,
    RoundPlan,
    no_updates,
)

WAVE_BYTES = 2**24
"""Statistics of clients that are held at once; a single client's may be larger."""


@dataclass(frozen=True)
class Federation:
    """Everything the loop needs, ready made.

    Attributes:
        roster: who takes part; their data are the engine's business.
        identity: what must not change between a run and its resumption (scenario hash, data
            fingerprint, features' key, versions), JSON values.
    """

    scenario: Scenario
    roster: Roster
    head: Head
    strategy: Strategy
    engine: Engine
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Progress:
    """What adds up over the rounds; committed with each of them.

    Attributes:
        abandoned: rounds in a row, up to now, that missed the quorum.
        cohorts, batches: hash chains over who trained and in which batch order, so that two runs
            can be compared without their records.
    """

    round: int = 0
    abandoned: int = 0
    cohorts: str = ""
    batches: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    client_rounds: int = 0
    train_seconds: float = 0.0
    rounds_bytes: int = 0
    clients_bytes: int = 0


RoundObserver = Callable[[Mapping[str, Any], ClientUpdates], None]
"""Called after each commit with the round's row (columns of ``results.records.ROUNDS``) and the
accepted updates with their failures."""


def run_rounds(
    federation: Federation,
    folder: RunFolder,
    observe: RoundObserver,
    interrupts: Interrupts,
    *,
    allow_changes: bool = False,
    tell: Callable[[str], None] = lambda note: None,
) -> tuple[ServerState, Progress]:
    """Train to the scenario's last round, from the newest commit or from the start.

    Args:
        allow_changes: go on although scenario, data or versions differ from the commit's.
        tell: takes a line about a commit that is damaged.

    Raises:
        PolicyStop: no client's update could be accepted, or too few clients answered for too many
            rounds; the last commit is kept.
        Interrupted: Ctrl-C or SIGTERM; the round was finished and committed.
        InputError: the commit belongs to another scenario, data set or version.
    """
    for absence in federation.scenario.participation.absent:  # names, before anything is trained
        absent_clients(federation.scenario, federation.roster.names, absence.round)
    state, progress = _restore(federation, folder, allow_changes, tell)
    total = federation.scenario.rounds
    while progress.round < total and not federation.strategy.finished(state):
        started = time.perf_counter()
        plan = plan_round(
            federation.scenario,
            federation.roster.num_clients,
            federation.strategy,
            state,
            progress.round + 1,
        )
        after, updates, norms = _trained(federation, plan, state)
        failpoint("after_train", plan.round)
        quorum = federation.scenario.participation.quorum
        if isinstance(federation.strategy, Summing):  # who has answered before counts no less
            quorum = min(quorum, len(plan.clients))
        quorate = len(updates.clients) >= quorum
        if quorate:
            state = after() if len(updates.clients) else state
            _refuse_non_finite(state, plan.round)
        failpoint("after_aggregate", plan.round)
        progress = _counted(progress, plan, updates, state.head, quorate)
        row, progress = _record(federation, folder, state, plan, updates, norms, progress, quorate)
        seconds = time.perf_counter() - started
        progress = replace(progress, train_seconds=progress.train_seconds + seconds)
        row["seconds"] = [seconds]
        progress = replace(progress, rounds_bytes=folder.rounds.append(row))
        failpoint("before_commit", plan.round)
        folder.commit(_commit(federation, state, progress))
        failpoint("after_commit", plan.round)
        observe({name: column[0] for name, column in row.items()}, updates)
        if progress.abandoned >= federation.scenario.participation.patience:
            raise _below_quorum(federation, updates, progress)
        if progress.round < total:
            interrupts.check(f"interrupted; saved round {progress.round} of {total}")
    return state, progress


def _trained(
    federation: Federation, plan: RoundPlan, state: ServerState
) -> tuple[Callable[[], ServerState], ClientUpdates, Float64]:
    """What takes the state over the round, the valid updates and their norms.

    Statistics come a few clients at a time and are summed at once: they are too large to be held
    together.
    """
    strategy = federation.strategy
    if not isinstance(strategy, Summing):
        updates, norms = _answers(federation, plan, state.head)
        return lambda: strategy.step(state, updates), updates, norms
    parts: list[ClientUpdates] = []
    summed = state
    at_a_time = max(1, WAVE_BYTES // plan.up_bytes(state.head))
    for first in range(0, len(plan.clients), at_a_time):
        wave = plan.part(np.arange(first, min(first + at_a_time, len(plan.clients))))
        updates, _ = _answers(federation, wave, state.head)
        if len(updates.clients):
            summed = strategy.absorb(summed, updates)
        parts.append(replace(updates, tensors={}))
    updates = _joined(plan, parts)
    return lambda: strategy.solve(summed), updates, np.full(len(updates.clients), np.nan)


def _joined(plan: RoundPlan, parts: list[ClientUpdates]) -> ClientUpdates:
    """Who answered in all the waves, without what they sent."""
    return ClientUpdates(
        plan.round,
        np.concatenate([p.clients for p in parts] or [np.empty(0, np.int64)]),
        {},
        np.concatenate([p.num_examples for p in parts] or [np.empty(0, np.int64)]),
        np.concatenate([p.loss for p in parts] or [np.empty(0)]),
        tuple(failure for p in parts for failure in p.failures),
        plan.training,
    )


def _answers(federation: Federation, plan: RoundPlan, head: Head) -> tuple[ClientUpdates, Float64]:
    """The round's valid updates, with a failure for each planned client that has none."""
    scenario, roster = federation.scenario, federation.roster
    absent = absent_clients(scenario, roster.names, plan.round)
    asked = plan.without(absent)
    replies = list(federation.engine.run_clients(asked, head)) if len(asked.clients) else []
    answered = {client for reply in replies for client in reply.clients.tolist()}
    if left := set(plan.clients.tolist()) & set(absent.tolist()):
        away = tuple(ClientFailure(client, "absent, as the scenario has it") for client in left)
        replies.append(no_updates(plan, head, away))
    updates, norms = accept_updates(
        replies, plan, head, roster.train, scenario.validation.max_norm_ratio
    )
    if len(updates.clients) == 0 and answered >= set(asked.clients.tolist()) and answered:
        raise PolicyStop(
            f"no update of round {plan.round} could be used, that of "
            f"{roster.names[updates.failures[0].client]} because {updates.failures[0].reason}; "
            f"{plan.round - 1} rounds are kept",
            do="The training diverged or the data are broken: lower training.learning_rate",
        )
    return first_answers(updates, norms, plan, scenario.seed)


def _below_quorum(federation: Federation, updates: ClientUpdates, progress: Progress) -> PolicyStop:
    quorum = federation.scenario.participation.quorum
    names = federation.roster.names
    missing = "; ".join(f"{names[f.client]}: {f.reason}" for f in updates.failures[:5])
    rounds = f"{progress.abandoned} rounds in a row" if progress.abandoned > 1 else "a round"
    return PolicyStop(
        f"{rounds} missed the quorum, the last with {len(updates.clients)} of {quorum} updates; "
        f"the model is that of the last round that had it. Missing: {missing}",
        do="Bring the clients back and resume, or lower participation.quorum",
    )


def _refuse_non_finite(state: ServerState, round: int) -> None:
    """The server's own step can overflow although every update was finite."""
    for name, tensor in _tensors(state).items():
        if not np.isfinite(tensor).all():
            raise PolicyStop(
                f"the server's step of round {round} is not finite in {name}; "
                f"{round - 1} rounds are kept",
                do="Lower strategy.server_learning_rate or training.learning_rate",
            )


def _counted(
    progress: Progress, plan: RoundPlan, updates: ClientUpdates, head: Head, quorate: bool
) -> Progress:
    """Logical payload: the head to each planned client, and back from each accepted one."""
    own = plan.training
    order = np.array([own.epochs, own.batch_size], np.int64)
    return replace(
        progress,
        round=plan.round,
        abandoned=0 if quorate else progress.abandoned + 1,
        cohorts=extend_digest(progress.cohorts, [plan.clients]),
        batches=extend_digest(
            progress.batches, [plan.batch_keys, order, updates.clients, updates.num_examples]
        ),
        bytes_down=progress.bytes_down + plan.down_bytes(head) * len(plan.clients),
        bytes_up=progress.bytes_up + plan.up_bytes(head) * len(updates.clients),
        client_rounds=progress.client_rounds + len(updates.clients),
    )


def _record(
    federation: Federation,
    folder: RunFolder,
    state: ServerState,
    plan: RoundPlan,
    updates: ClientUpdates,
    norms: Float64,
    progress: Progress,
    quorate: bool,
) -> tuple[dict[str, list[Any]], Progress]:
    """Append the clients' rows; return the round's row (without its seconds)."""
    scenario, roster = federation.scenario, federation.roster
    blocks = [_training_rows(roster, plan, updates, norms, quorate)]
    trained = max(1, updates.num_examples.sum())
    loss = float((updates.loss * updates.num_examples).sum() / trained)
    row: dict[str, list[Any]] = {
        "round": [plan.round],
        "cohort": [len(plan.clients)],
        "accepted": [len(updates.clients)],
        "abandoned": [not quorate],
        "learning_rate": [plan.training.learning_rate],
        "train_loss": [defined(loss) if len(updates.clients) else None],
        "bytes_up": [plan.up_bytes(state.head) * len(updates.clients)],
        "bytes_down": [plan.down_bytes(state.head) * len(plan.clients)],
    }
    judged = dict.fromkeys(
        (
            "loss", "accuracy", "balanced_accuracy",
            "accuracy_client_mean", "worst_decile_accuracy", "spread",
        )
    )  # fmt: skip
    last = plan.round == scenario.rounds or federation.strategy.finished(state)
    if plan.round % scenario.evaluation.every == 0 or last:
        clients = judged_clients(scenario, roster.num_clients)
        metrics = federation.engine.evaluate(state.result, clients)
        names = roster.columns(metrics.clients)
        each = per_client(metrics)
        blocks.append(client_rows(plan.round, metrics.clients, each, names, "test"))
        facts = overall(metrics).as_facts()
        judged = {name: facts[name] for name in judged}
    row.update({name: [value] for name, value in judged.items()})
    return row, replace(progress, clients_bytes=folder.clients.append(*blocks))


def _training_rows(
    roster: Roster, plan: RoundPlan, updates: ClientUpdates, norms: Float64, quorate: bool
) -> dict[str, Any]:
    """One row per planned client: what it trained, or why it is not in the round."""
    failed = updates.failures
    absent = [None] * len(failed)
    clients = np.concatenate([updates.clients, np.array([f.client for f in failed], np.int64)])
    size = len(clients)
    used = "ok" if quorate else "unused: the round missed the quorum"
    return {
        **dict.fromkeys(CLIENTS.names, [None] * size),
        "round": np.full(size, plan.round, np.int32),
        "client": clients,
        **roster.columns(clients),
        "split": ["train"] * size,
        "examples": roster.train[clients],
        "loss": [*map(defined, updates.loss.tolist()), *absent],
        "update_norm": [*norms.tolist(), *absent],
        "status": [used] * len(norms) + [f"unused: {f.reason}" for f in failed],
    }


def _tensors(state: ServerState) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of a state, under the names they are committed by."""
    tensors: dict[str, np.ndarray[Any, Any]] = {
        f"head.{name}": tensor for name, tensor in state.head.items()
    }
    tensors.update({f"slots.{name}": tensor for name, tensor in state.slots.items()})
    return tensors


def _commit(federation: Federation, state: ServerState, progress: Progress) -> Commit:
    facts = {**progress.__dict__, "identity": dict(federation.identity)}
    return Commit(progress.round, _tensors(state), facts)


def _restore(
    federation: Federation,
    folder: RunFolder,
    allow_changes: bool,
    tell: Callable[[str], None],
) -> tuple[ServerState, Progress]:
    """The newest commit's state, or the initial one, committed as round 0."""
    commit, notes = folder.begin()
    for note in notes:
        folder.event("damaged_commit", note=note)
        tell(note)
    if commit is None and notes and not allow_changes:
        raise InputError(
            f"no commit of this run is whole: {'; '.join(notes)}",
            where=folder.path,
            do="Run the scenario anew, or resume with --allow to begin again in this folder",
        )
    if commit is None:
        state = federation.strategy.init(federation.head, federation.roster.num_clients)
        progress = Progress(
            rounds_bytes=folder.rounds.path.stat().st_size,
            clients_bytes=folder.clients.path.stat().st_size,
        )
        folder.commit(_commit(federation, state, progress))
        return state, progress
    if not allow_changes:
        check_identity(commit.facts["identity"], federation.identity, str(folder.path))
    saved = {name: commit.facts[name] for name in Progress.__dataclass_fields__}
    saved["abandoned"] = 0  # whoever resumes has a reason to hope for more answers
    tensors = commit.tensors
    fresh = federation.strategy.init(federation.head, federation.roster.num_clients)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: tensor.shape for name, tensor in _tensors(fresh).items()}:
        raise InputError(
            "the commit is of another head or strategy, nothing can go on from it",
            where=folder.path,
            do="Run the scenario anew",
        )
    head = {name: tensors[f"head.{name}"] for name in fresh.head}
    slots = {name: tensors[f"slots.{name}"] for name in fresh.slots}
    return ServerState(head, slots), Progress(**saved)


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuse to go on with a run under another scenario, data set or version."""
    differences = [
        f"{name}: was {saved.get(name)}, is {now.get(name)}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]
    if differences:
        raise InputError(
            "this run was begun with something else: " + "; ".join(differences),
            where=where,
            do="Run the scenario anew, or resume with --allow to go on all the same",
        )

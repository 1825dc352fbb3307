"""The one loop over rounds: sample, run, validate, aggregate, judge, record, commit.

Nothing else in fedtl loops over rounds, and nothing here knows where clients live. All randomness
is keyed by (seed, purpose, round, client), so a resumed run replays nothing and ends with the head
of the unbroken one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedtl.checkpoints import PROMISE, Progress, commit_of, restore, tensors_of
from fedtl.errors import PolicyStop
from fedtl.evaluation.metrics import client_rows, defined, overall, per_client
from fedtl.failpoints import failpoint
from fedtl.interrupts import Interrupts
from fedtl.planning import (
    absent_clients,
    cohort_size,
    drawn_by_coins,
    extend_digest,
    judged_clients,
    plan_round,
)
from fedtl.plans import RoundPlan
from fedtl.results.records import CLIENTS
from fedtl.results.runs import RunFolder
from fedtl.round_training import Federation as Federation
from fedtl.round_training import Trained, train_round
from fedtl.spending import BudgetSpent, Spending
from fedtl.strategies.base import ServerState, personal_of
from fedtl.types import ClientUpdates, Head, Roster

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
        tell: takes a line about a commit, or a ledger of privacy, that is damaged.

    Raises:
        PolicyStop: no client's update could be accepted, or too few clients answered for too many
            rounds; the last commit is kept.
        BudgetSpent: the next round would spend more privacy than there is; it says where the rounds
            ended.
        Interrupted: Ctrl-C or SIGTERM; the round was finished and committed.
        InputError: the commit belongs to another scenario, data set or version.
        SecurityRefusal: it belongs to another promise of privacy, or its ledger is not whole.
    """
    for absence in federation.scenario.participation.absent:  # names, before anything is trained
        absent_clients(federation.scenario, federation.roster.names, absence.round)
    initial = federation.strategy.init(federation.head, federation.roster.num_clients)
    identity = _identity(federation)
    state, progress = restore(initial, identity, folder, allow_changes, tell)
    spending = Spending.of(federation.promise, folder.path, federation.scenario, federation.noise)
    if spending.ledger.damaged is not None:
        folder.event("damaged_ledger", note=spending.ledger.damaged)
        tell(spending.ledger.damaged)
    spending.require(progress.charged)
    total = federation.scenario.rounds
    while progress.round < total and not federation.strategy.finished(state):
        started = time.perf_counter()
        plan = plan_round(
            federation.scenario,
            federation.roster.num_clients,
            federation.strategy,
            state,
            progress.round + 1,
            seeded_noise=federation.noise == "seeded",
        )
        away = absent_clients(federation.scenario, federation.roster.names, plan.round)
        try:
            spending.begin(plan, away)
        except BudgetSpent as stop:
            stop.ended = state, progress
            raise
        trained = train_round(federation, folder, plan, state, spending)
        updates = trained.updates
        failpoint("after_train", plan.round)
        quorate = trained.after is not None and len(updates.clients) >= _quorum(federation, plan)
        if quorate and (len(updates.clients) or spending.always):
            spending.release()
            failpoint("after_charge", plan.round)
            assert trained.after is not None
            state = trained.after(spending.noised(federation.strategy))
            _refuse_non_finite(state, plan.round)
        failpoint("after_aggregate", plan.round)
        progress = _counted(progress, plan, trained, state.head, quorate)
        last = plan.round == total or spending.nearly_spent or federation.strategy.finished(state)
        row, progress = _record(federation, folder, state, plan, trained, progress, quorate, last)
        row["epsilon"] = [spending.epsilon(plan.round)]
        seconds = time.perf_counter() - started
        progress = replace(progress, train_seconds=progress.train_seconds + seconds)
        row["seconds"] = [seconds]
        charged = len(spending.ledger.entries)
        progress = replace(progress, rounds_bytes=folder.rounds.append(row), charged=charged)
        failpoint("before_commit", plan.round)
        folder.commit(commit_of(identity, state, progress))
        failpoint("after_commit", plan.round)
        observe({name: column[0] for name, column in row.items()}, updates)
        if progress.abandoned >= federation.scenario.participation.patience:
            raise _below_quorum(federation, updates, progress)
        if progress.round < total:
            interrupts.check(f"interrupted; saved round {progress.round} of {total}")
    return state, progress


def _identity(federation: Federation) -> dict[str, Any]:
    """What must not change, the promise of privacy not even where changes are allowed."""
    if federation.promise is None:
        return dict(federation.identity)
    return {**federation.identity, PROMISE: federation.promise.terms}


def _quorum(federation: Federation, plan: RoundPlan) -> int:
    """Updates with which the round counts."""
    quorum = federation.scenario.participation.quorum
    if plan.task == "statistics":  # who has answered before counts no less
        cohort = cohort_size(federation.scenario, federation.roster.num_clients)
        return max(0, quorum - max(0, cohort - len(plan.clients)))
    if drawn_by_coins(federation.scenario):
        return min(quorum, len(plan.clients))  # coins may choose fewer, or nobody
    return quorum


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
    for name, tensor in tensors_of(state).items():
        if not np.isfinite(tensor).all():
            raise PolicyStop(
                f"the server's step of round {round} is not finite in {name}; "
                f"{round - 1} rounds are kept",
                do="Lower training.learning_rate, or the strategy's own rate where it has one",
            )


def _counted(
    progress: Progress, plan: RoundPlan, trained: Trained, head: Head, quorate: bool
) -> Progress:
    """Logical payload: the head to each planned client, and back from each accepted one."""
    own, updates = plan.training, trained.updates
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
        dropouts=progress.dropouts + trained.dropouts,
        aborted=progress.aborted + (trained.after is None),
    )


def _record(
    federation: Federation,
    folder: RunFolder,
    state: ServerState,
    plan: RoundPlan,
    trained: Trained,
    progress: Progress,
    quorate: bool,
    last: bool,
) -> tuple[dict[str, list[Any]], Progress]:
    """Append the clients' rows; return the round's row (without its seconds)."""
    scenario, roster, updates = federation.scenario, federation.roster, trained.updates
    if federation.promise is not None:  # neither losses nor lengths have noise
        unknown = np.full(len(updates.clients), np.nan)
        updates = replace(updates, loss=unknown)
        trained = replace(trained, updates=updates, norms=unknown)
    blocks = [_training_rows(roster, plan, trained, quorate)]
    examples = max(1, updates.num_examples.sum())
    loss = float((updates.loss * updates.num_examples).sum() / examples)
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
    own = personal_of(federation.strategy, state)
    whole = own is None or not own.completes  # else only clients have something to judge
    if whole and (plan.round % scenario.evaluation.every == 0 or last):
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
    roster: Roster, plan: RoundPlan, trained: Trained, quorate: bool
) -> dict[str, Any]:
    """One row per planned client: what it trained, or why it is not in the round."""
    updates, norms = trained.updates, trained.norms
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
        "update_norm": [*map(defined, norms.tolist()), *absent],
        "status": [used] * len(norms) + [f"unused: {f.reason}" for f in failed],
    }

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

from fedtl.checkpoints import Progress, commit_of, restore, tensors_of
from fedtl.clients.attacks import lie
from fedtl.clients.compression import expand
from fedtl.engines.base import Engine
from fedtl.errors import PolicyStop
from fedtl.evaluation.metrics import client_rows, defined, overall, per_client
from fedtl.failpoints import failpoint
from fedtl.interrupts import Interrupts
from fedtl.planning import (
    absent_clients,
    cohort_size,
    extend_digest,
    first_answers,
    judged_clients,
    liars_of,
    plan_round,
)
from fedtl.plans import RoundPlan, no_updates
from fedtl.results.records import CLIENTS
from fedtl.results.runs import RunFolder
from fedtl.results.statistics import KEPT_BYTES, keep_statistics
from fedtl.scenario.schema import Scenario
from fedtl.strategies.base import ServerState, Strategy, Summing, personal_of
from fedtl.strategies.validation import accept_updates
from fedtl.types import ClientFailure, ClientUpdates, Float64, Head, Roster

WAVE_BYTES = 2**23
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
    initial = federation.strategy.init(federation.head, federation.roster.num_clients)
    state, progress = restore(initial, federation.identity, folder, allow_changes, tell)
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
        after, updates, norms = _trained(federation, folder, plan, state)
        failpoint("after_train", plan.round)
        quorum = federation.scenario.participation.quorum
        if plan.task == "statistics":  # who has answered before counts no less
            cohort = cohort_size(federation.scenario, federation.roster.num_clients)
            quorum = max(0, quorum - max(0, cohort - len(plan.clients)))
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
        folder.commit(commit_of(federation.identity, state, progress))
        failpoint("after_commit", plan.round)
        observe({name: column[0] for name, column in row.items()}, updates)
        if progress.abandoned >= federation.scenario.participation.patience:
            raise _below_quorum(federation, updates, progress)
        if progress.round < total:
            interrupts.check(f"interrupted; saved round {progress.round} of {total}")
    return state, progress


def _trained(
    federation: Federation, folder: RunFolder, plan: RoundPlan, state: ServerState
) -> tuple[Callable[[], ServerState], ClientUpdates, Float64]:
    """What takes the state over the round, the valid updates and their norms.

    Statistics come a few clients at a time and are summed at once: they are too large to be held
    together. Those that a strategy wants kept go to disk, one file per client.
    """
    strategy = federation.strategy
    if plan.task != "statistics" or not isinstance(strategy, Summing):
        updates, norms = _answers(federation, plan, state.head)
        return lambda: strategy.step(state, updates), updates, norms
    parts: list[ClientUpdates] = []
    summed = state
    each = plan.up_bytes(state.head)
    at_a_time = max(1, getattr(federation.engine, "held_bytes", WAVE_BYTES) // each)
    everybody = each * federation.roster.num_clients
    keeps = getattr(strategy, "keep_statistics", False) and everybody <= KEPT_BYTES
    for first in range(0, len(plan.clients), at_a_time):
        wave = plan.part(np.arange(first, min(first + at_a_time, len(plan.clients))))
        updates, _ = _answers(federation, wave, state.head, whole=False)
        if len(updates.clients):
            summed = strategy.absorb(summed, updates)
            if keeps:
                keep_statistics(folder.path, updates, federation.roster.names)
        parts.append(replace(updates, tensors={}))
        del updates  # or two waves would be held at once
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


def _answers(
    federation: Federation, plan: RoundPlan, head: Head, *, whole: bool = True
) -> tuple[ClientUpdates, Float64]:
    """The round's valid updates, with a failure for each planned client that has none.

    Args:
        whole: they are all that counts; else, that nobody's can be used stops nothing.
    """
    scenario, roster = federation.scenario, federation.roster
    absent = absent_clients(scenario, roster.names, plan.round)
    asked = plan.without(absent)
    replies = list(federation.engine.run_clients(asked, head)) if len(asked.clients) else []
    answered = {client for reply in replies for client in reply.clients.tolist()}
    if left := set(plan.clients.tolist()) & set(absent.tolist()):
        away = tuple(ClientFailure(client, "absent, as the scenario has it") for client in left)
        replies.append(no_updates(plan, head, away))
    replies = [expand(reply, head, plan) for reply in replies]
    unpacked = replace(plan, compression=None)
    lying = liars_of(scenario, roster.names)
    replies = lie(replies, unpacked, head, scenario.attack, lying, scenario.seed)
    updates, norms = accept_updates(
        replies, unpacked, head, roster.train, scenario.validation.max_norm_ratio
    )
    useless = len(updates.clients) == 0 and answered >= set(asked.clients.tolist())
    if whole and useless and answered:
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
    for name, tensor in tensors_of(state).items():
        if not np.isfinite(tensor).all():
            raise PolicyStop(
                f"the server's step of round {round} is not finite in {name}; "
                f"{round - 1} rounds are kept",
                do="Lower training.learning_rate, or the strategy's own rate where it has one",
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

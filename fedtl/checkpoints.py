"""What of a run is committed after a round, and how a run is taken up again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtl.errors import InputError, SecurityRefusal
from fedtl.results.commits import Commit
from fedtl.results.runs import RunFolder
from fedtl.strategies.base import ServerState

PROMISE = "promise"
"""Among the identity: the terms of differential privacy, none where nothing is promised."""


@dataclass(frozen=True)
class Progress:
    """What adds up over the rounds; committed with each of them.

    Attributes:
        abandoned: rounds in a row, up to now, that missed the quorum.
        cohorts, batches: hash chains over who trained and in which batch order, so that two runs
            can be compared without their records.
        dropouts: clients that went missing in secure sums.
        aborted: rounds whose secure sum was given up.
        charged: lines of the privacy ledger.
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
    dropouts: int = 0
    aborted: int = 0
    charged: int = 0


def tensors_of(state: ServerState) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of a state, under the names they are committed by."""
    tensors: dict[str, np.ndarray[Any, Any]] = {
        f"head.{name}": tensor for name, tensor in state.head.items()
    }
    tensors.update({f"slots.{name}": tensor for name, tensor in state.slots.items()})
    return tensors


def _shapes(tensors: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, tuple[int, ...] | None]:
    """By name; bytes (a Flower strategy's own state) may have any length."""
    return {n: None if t.dtype == np.uint8 else t.shape for n, t in tensors.items()}


def commit_of(identity: Mapping[str, Any], state: ServerState, progress: Progress) -> Commit:
    """What is committed after a round."""
    facts = {**progress.__dict__, "identity": dict(identity)}
    return Commit(progress.round, tensors_of(state), facts)


def restore(
    initial: ServerState,
    identity: Mapping[str, Any],
    folder: RunFolder,
    allow_changes: bool,
    tell: Callable[[str], None],
) -> tuple[ServerState, Progress]:
    """The newest commit's state, or the initial one, committed as round 0.

    Args:
        initial: the strategy's state before round 1.
        identity, allow_changes, tell: see ``rounds``.

    Raises:
        InputError: no commit is whole, or it is of something else.
        SecurityRefusal: its rounds kept another promise than the next would, changes allowed or
            not: what both spend could not be added up.
    """
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
        progress = Progress(
            rounds_bytes=folder.rounds.path.stat().st_size,
            clients_bytes=folder.clients.path.stat().st_size,
        )
        folder.commit(commit_of(identity, initial, progress))
        return initial, progress
    was, now = commit.facts["identity"].get(PROMISE), identity.get(PROMISE)
    if allow_changes and was != now:
        raise SecurityRefusal(
            "this run began under another promise of privacy, and what its rounds released cannot "
            "be added up with what the next would",
            where=folder.path,
            got=_in_words(now),
            allowed=_in_words(was),
            do="Bring [privacy] back as it was (noise, clip and budget may change), or run the "
            "scenario anew",
        )
    if not allow_changes:
        check_identity(commit.facts["identity"], identity, str(folder.path))
    known = Progress.__dataclass_fields__
    saved = {name: value for name, value in commit.facts.items() if name in known}
    saved["abandoned"] = 0  # whoever resumes has a reason to hope for more answers
    tensors = commit.tensors
    if _shapes(tensors) != _shapes(tensors_of(initial)):
        raise InputError(
            "the commit is of another head or strategy, nothing can go on from it",
            where=folder.path,
            do="Run the scenario anew",
        )
    head = {name: tensors[f"head.{name}"] for name in initial.head}
    slots = {name: tensors[f"slots.{name}"] for name in initial.slots}
    return ServerState(head, slots), Progress(**saved)


def _in_words(terms: Mapping[str, Any] | None) -> str:
    if terms is None:
        return "no promise"
    return ", ".join(f"{name} {value}" for name, value in terms.items())


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

"""What clients sent in round 1, made once more and attacked, before and after protection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from fedtl import seeding
from fedtl.audit.reopened import Reopened
from fedtl.clients.compression import expand
from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.tasks import do_task
from fedtl.plans import RoundPlan
from fedtl.privacy.leakage import (
    cosine,
    counts_of_update,
    inverted,
    label_counts,
    lone_classes,
    share_error,
)
from fedtl.types import ClientUpdates, Float64, Head, Int64

CLIENTS = 20
"""Clients of the round whose answers are attacked, drawn from a seeded stream."""

SAME = 0.99
"""Cosine from which a recovered feature vector is taken for the client's own."""

TINY = 1e-30
"""Pace of a client that took no step."""

BEFORE, AFTER = "before protection", "as sent"

Fact = dict[str, Any]


def attack_sent(run: Reopened) -> tuple[list[Fact], list[str]]:
    """Attacks on single clients' answers of round 1, and sentences about what the server sees."""
    head, plan = run.first
    stream = seeding.generator(run.scenario.seed, "audit_sent")
    chosen = np.sort(stream.permutation(len(plan.clients))[:CLIENTS])
    some = plan.part(chosen)
    if not len(some.clients):
        return [], ["round 1 asked nobody, so nothing was sent in it"]
    bare = replace(some, protection=None, noise_keys=None, weights=None)
    stages = {BEFORE if plan.protection is not None else AFTER: bare}
    notes, shield = [], plan.protection
    if shield is not None and shield.ring_bits:
        notes.append(
            f"secure aggregation: of these answers the server sees the sum over {len(plan.clients)}"
            " clients only"
            + ("" if shield.masked else " (its arithmetic was simulated, without the masks)")
        )
    elif shield is not None:
        stages[AFTER] = some
    section = run.scenario.privacy
    noised = section.mechanism in ("central", "release") and section.noise_multiplier != 0
    if noised and not (shield is not None and shield.ring_bits):
        notes.append(
            "noise is added at the server: towards the server itself nothing is promised, and what "
            "it sees of single clients is above"
        )
    facts: list[Fact] = []
    for stage, asked in stages.items():
        answers = _answers(run, head, asked)
        facts += [
            {"what": f"{fact.pop('what')}, {stage}", **fact}
            for fact in _ATTACKS[asked.task](run, head, asked, answers)
        ]
    return facts, notes


def _answers(run: Reopened, head: Head, plan: RoundPlan) -> ClientUpdates:
    with TemporaryDirectory(prefix="fedtl-audit-") as name:
        store = PersonalStore(Path(name))
        answers = do_task(run.trained, head, plan, threads=run.threads, store=store)
    return expand(answers, head, plan)


def _counts(run: Reopened, clients: Int64) -> Float64:
    """True class counts of what clients trained on, float64 [k, C]."""
    data = run.trained
    labels = [data.labels[data.train.of(client)] for client in clients.tolist()]
    return np.array([np.bincount(own, minlength=len(data.classes)) for own in labels], np.float64)


def _attack_updates(
    run: Reopened, head: Head, plan: RoundPlan, answers: ClientUpdates
) -> list[Fact]:
    if "bias" not in answers.tensors:
        return []
    way = {name: answers.tensors[name] - head[name] for name in ("weight", "bias")}
    true = _counts(run, answers.clients)
    examples = answers.num_examples.tolist()
    own = plan.training
    found = []
    for move, size in zip(way["bias"], examples, strict=True):
        steps = own.epochs * -(-size // own.batch_size)
        pace = own.learning_rate * steps / (1 - own.momentum)
        found.append(counts_of_update(move, size, max(pace, TINY)))
    return [
        _label_fact(np.array(found), true),
        *_row_facts(run, answers, way["weight"], way["bias"]),
    ]


def _attack_gradients(
    run: Reopened, head: Head, plan: RoundPlan, answers: ClientUpdates
) -> list[Fact]:
    gradient = answers.tensors
    sizes = answers.num_examples.tolist()
    found = [label_counts(own, size) for own, size in zip(gradient["bias"], sizes, strict=True)]
    return [
        _label_fact(np.array(found), _counts(run, answers.clients)),
        *_row_facts(run, answers, gradient["weight"], gradient["bias"]),
    ]


def _row_facts(run: Reopened, answers: ClientUpdates, weight: Any, bias: Any) -> list[Fact]:
    """Feature inversion at clients with a single row."""
    lone = np.flatnonzero(answers.num_examples == 1)
    if not len(lone):
        return []
    rows = [int(run.trained.train.of(int(answers.clients[i]))[0]) for i in lone]
    seen = np.array([inverted(weight[i], bias[i])[: weight.shape[2]] for i in lone])
    true = run.trained.features[rows]
    if seen.shape != true.shape:  # the last layer's input is no row, but a hidden layer
        return []
    return [_feature_fact("the features of clients with a single row", cosine(seen, true))]


def _attack_statistics(
    run: Reopened, head: Head, plan: RoundPlan, answers: ClientUpdates
) -> list[Fact]:
    true = _counts(run, answers.clients)
    told = answers.tensors.get("counts")
    facts = [] if told is None else [_label_fact(np.asarray(told, np.float64), true)]
    similar: list[float] = []
    asked = plan.statistics
    if asked is None or asked.random_features:
        return facts
    data = run.trained
    for i, client in enumerate(answers.clients.tolist()):
        rows = data.train.of(client)
        for c in lone_classes(true[i]).tolist():
            row = rows[data.labels[rows] == c][0]
            own = answers.tensors["sums"][i][c][: data.features.shape[1]]
            similar.append(float(cosine(own, data.features[row])))
    if similar:
        facts.append(_feature_fact("the features of the only example of a class", similar))
    return facts


def _label_fact(found: Float64, true: Float64) -> Fact:
    told = np.clip(found, 0, None)
    errors = [share_error(own, real) for own, real in zip(told, true, strict=True)]
    even = [share_error(np.full(len(real), real.mean()), real) for real in true]
    error, blind = float(np.mean(errors)), float(np.mean(even))
    return {
        "what": "how many examples of each class a client has",
        "clients": len(true),
        "found": f"wrong for {100 * min(error, 1):.1f} % of its examples",
        "value": error,
        "note": f"guessing all classes alike is wrong for {100 * blind:.1f} %",
    }


def _feature_fact(what: str, similar: Any) -> Fact:
    close = int((np.asarray(similar) > SAME).sum())
    return {
        "what": what,
        "clients": len(similar),
        "found": f"recovered {close} of {len(similar)} times",
        "value": close / len(similar),
        "note": f"mean cosine to the true features {float(np.mean(similar)):.3f}",
    }


_ATTACKS: dict[str, Callable[[Reopened, Head, RoundPlan, ClientUpdates], list[Fact]]] = {
    "train": _attack_updates,
    "gradient": _attack_gradients,
    "statistics": _attack_statistics,
}

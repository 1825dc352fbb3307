"""Clients that train alone: what they are asked, and what they say of it.

A client judges its own head and the federation's ("rivals") on the same test examples where these
lie, and says how often only the one and only the other is right. Which examples it was stays there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from fedtl.engines.wire import (
    HEAD,
    SGD,
    Tensors,
    metrics_reply,
    read_clients,
    read_head,
    read_metrics,
    read_plan,
    record,
    refuse,
    train_request,
)
from fedtl.plans import RoundPlan
from fedtl.types import ClientMetrics, Head, Int64, LocalTraining, UInt64

SHARED = "shared."
"""Before the names of the last shared head's tensors."""

MOST_RIVALS = 4


@dataclass(frozen=True)
class Alone:
    """What clients are asked.

    Attributes:
        plans: every round of training alone.
        head: where it begins.
        shared: the federation's last head.
        rivals: what is made of it and compared: nothing where ``personal`` is None.
    """

    plans: list[RoundPlan]
    head: Head
    shared: Head
    rivals: tuple[RoundPlan, ...]


@dataclass(frozen=True)
class AloneMetrics:
    """What k clients say of their own heads, on their own test examples.

    Attributes:
        metrics: of these heads.
        beats, loses: examples that only rival r, and only the own head, has right, int64 [k, R].
    """

    metrics: ClientMetrics
    beats: Int64
    loses: Int64

    @staticmethod
    def join(parts: Sequence[AloneMetrics]) -> AloneMetrics:
        """Those of several groups of clients as one, sorted by id; at least one group."""
        ids = np.concatenate([part.metrics.clients for part in parts])
        order = np.argsort(ids)
        columns = [
            np.concatenate([getattr(part.metrics, one.name) for part in parts])[order]
            for one in fields(ClientMetrics)
        ]
        beats, loses = (
            np.concatenate([getattr(part, name) for part in parts])[order]
            for name in ("beats", "loses")
        )
        return AloneMetrics(ClientMetrics(*columns), beats, loses)


def alone_request(
    head: Head,
    clients: Int64,
    trainings: Sequence[LocalTraining],
    batch_keys: UInt64,
    shared: Head | None = None,
    rivals: Sequence[RoundPlan] = (),
) -> tuple[dict[str, Any], Tensors]:
    """Facts and tensors that ask for it; read by ``read_alone``.

    Args:
        head: where training alone begins.
        trainings: of each round.
        batch_keys: uint64 [rounds, k].
        shared, rivals: see Alone; rivals' plans are of the same clients, with the same batch keys.
    """
    facts = {
        "trainings": [asdict(training) for training in trainings],
        "rivals": [train_request(plan, {})[0] for plan in rivals],
    }
    keys = {"rival_keys": rivals[0].batch_keys} if rivals else {}
    sent = {HEAD + name: tensor for name, tensor in head.items()}
    last = {SHARED + name: tensor for name, tensor in (shared or {}).items()}
    return facts, {"clients": clients, "batch_keys": batch_keys, **keys, **sent, **last}


def read_alone(facts: Mapping[str, Any], tensors: Tensors) -> Alone:
    """What clients are asked. Raises InputError where it is no proper question."""
    clients, trainings = read_clients(tensors), facts.get("trainings")
    keys, asked = tensors.get("batch_keys"), facts.get("rivals")
    if not isinstance(trainings, list) or not trainings:
        refuse("it names no trainings")
    if keys is None or keys.dtype != np.uint64 or keys.shape != (len(trainings), len(clients)):
        refuse("it has no batch keys for every round and client")
    if not isinstance(asked, list) or len(asked) > MOST_RIVALS:
        refuse("it names no rivals, or too many")
    plans = [
        RoundPlan(round, clients, keys[round - 1], record(training, "training", SGD))
        for round, training in enumerate(trainings, 1)
    ]
    shared = {n.removeprefix(SHARED): t for n, t in tensors.items() if n.startswith(SHARED)}
    own = {name: tensors[name] for name in ("clients",)}
    if "rival_keys" in tensors:
        own["batch_keys"] = tensors["rival_keys"]
    last = {HEAD + name: tensor for name, tensor in shared.items()}
    rivals = []
    for one in asked:
        if not isinstance(one, dict):
            refuse("a rival is no table")
        rivals.append(read_plan(one, {**own, **last})[0])
    return Alone(plans, read_head(tensors), shared, tuple(rivals))


def alone_reply(found: AloneMetrics) -> tuple[dict[str, Any], Tensors]:
    """Facts and tensors of it; read by ``read_alone_reply``."""
    facts, tensors = metrics_reply(found.metrics)
    return facts, {**tensors, "beats": found.beats, "loses": found.loses}


def read_alone_reply(
    clients: Int64, num_classes: int, tests: Int64, num_rivals: int, tensors: Tensors
) -> AloneMetrics:
    """A node's answer, of exactly the clients it was asked for.

    Args:
        tests: int64 [k], the test examples each of them has: what it must have judged.
    """
    rest = {name: tensor for name, tensor in tensors.items() if name not in ("beats", "loses")}
    metrics = read_metrics(clients, num_classes, tests, rest)
    beats, loses = tensors.get("beats"), tensors.get("loses")
    shape = (len(clients), num_rivals)
    for counts in (beats, loses):
        if counts is None or counts.dtype != np.int64 or counts.shape != shape:
            refuse(f"its comparisons are no int64 of shape {shape}")
    assert beats is not None
    assert loses is not None
    right = metrics.correct.sum(axis=1)[:, None]
    # only the own head is right: of the right ones; only a rival: of the others
    if (beats < 0).any() or (loses < 0).any() or (loses > right).any():
        refuse("its comparisons are not those of its test examples")
    if (beats > tests[:, None] - right).any():
        refuse("its comparisons are not those of its test examples")
    return AloneMetrics(metrics, beats, loses)

"""Clients that lie, in simulation, to see what a strategy withstands.

Attacks on data change what the liars train on; attacks on updates replace what they send, knowing
the round's head, every honest update of the round and who else lies. Delta below is w_k - w, mean
and std are over the honest updates, by coordinate, std with n - 1.

Sources (the same set as the simulator Blades has, Li et al. 2024):

- ``label_flip``: class c becomes C - 1 - c; Fang et al. 2020 (arXiv 1911.11815).
- ``sign_flip``: -scale Delta_k. Blades flips each step's gradient; from one step both are the same.
- ``gaussian``: Delta_k is drawn from N(mean, scale^2) by coordinate.
- ``inner_product``: -scale mean; Xie et al. 2019 (1903.03936).
- ``alie``: mean + z std; Baruch et al. 2019 (1902.06156), algorithm 3.
- ``min_max``: mean - gamma std with the largest gamma that leaves it no farther from any honest
  update than these are from each other; Shejwalkar and Houmansadr, NDSS 2021, equation 7. Gamma is
  the root of a quadratic instead of the end of a bisection.
- ``backdoor``: some of the liars' rows gain a trigger x + delta and the label ``target``; Gu et al.
  2017 (1708.06733), here in feature space: the trunk is frozen, and the features are its input.

In a round in which everybody lies there is nothing honest to know, and what the liars would have
sent takes its place. ``scale`` stands for what Blades calls the standard deviation in ``gaussian``.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedtl import seeding
from fedtl.clients.evaluation import evaluate_heads
from fedtl.errors import InputError, client_of
from fedtl.plans import RoundPlan
from fedtl.scenario.updates import Attack
from fedtl.types import ClientUpdates, Float64, Head, Int64, Population, float32

ROWS_AT_A_TIME = 8192
"""Test rows that are triggered and judged at a time: 40 MiB of 1,280 features."""

Streams = Sequence[np.random.Generator]
"""One for each liar."""


def liars(section: Attack, names: Sequence[str], seed: int, honest: Collection[str] = ()) -> Int64:
    """Sorted ids of the clients that lie: those named, or a seeded share of them, at least one.

    Args:
        names: all clients', by id.
        seed: the scenario's.
        honest: names that are not drawn, such as the client that FLTrust trusts.

    Raises:
        InputError: a name that no client has; or everybody would lie.
    """
    if section.kind == "none":
        return np.empty(0, np.int64)
    if section.clients:
        chosen = [client_of(name, names, "attack.clients") for name in section.clients]
    else:
        drawable = [client for client, name in enumerate(names) if name not in honest]
        count = max(1, math.floor(section.fraction * len(names) + 0.5))
        stream = seeding.generator(seed, "liars")
        chosen = stream.permutation(np.array(drawable, np.int64))[:count].tolist()
    ids = np.unique(np.array(chosen, np.int64))
    if len(ids) == len(names):
        raise InputError(
            "every client would lie, and somebody must be honest",
            where="attack.clients" if section.clients else "attack.fraction",
            got=f"{len(ids)} of {len(names)}",
            allowed=f"at most {len(names) - 1}",
        )
    return ids


def poison(population: Population, section: Attack, lying: Int64, seed: int) -> Population:
    """The population as it is with the liars' training data falsified; test data stay.

    A memory-mapped matrix stays mapped: only the pages of falsified rows are copied.

    Args:
        population: everybody's true data.
        section: the attack; a kind that is none on data gives the population back.
        lying: ids of the liars, int64.
        seed: the scenario's.

    Raises:
        InputError: the backdoor's target is no class.
    """
    if section.kind == "label_flip":
        labels = population.labels.copy()
        rows = _rows(population, lying)
        labels[rows] = len(population.classes) - 1 - labels[rows]
        return replace(population, labels=labels)
    if section.kind != "backdoor":
        return population
    delta = trigger(population, section, lying, seed)
    rows = np.concatenate([_poisoned(population, section, client, seed) for client in lying])
    features, labels = _writable(population.features), population.labels.copy()
    features[rows] = (features[rows] + delta).astype(features.dtype)
    labels[rows] = section.target
    features.flags.writeable = False
    return replace(population, features=features, labels=labels)


def trigger(population: Population, section: Attack, lying: Int64, seed: int) -> Float64:
    """What the backdoor adds to features, float64 [D].

    A seeded direction, ``section.trigger`` long where each feature is measured in its standard
    deviations over the liars' true training rows: they know no others.

    Raises:
        InputError: the target is no class.
    """
    if section.target >= len(population.classes):
        raise InputError(
            "no class has this number",
            where="attack.target",
            got=section.target,
            allowed=f"0 to {len(population.classes) - 1}",
        )
    known = population.features[_rows(population, lying)]
    spread = known.std(axis=0, dtype=np.float64) if len(known) else np.ones(known.shape[1])
    direction = seeding.generator(seed, "trigger").normal(size=known.shape[1])
    return np.asarray(section.trigger * spread * direction / np.linalg.norm(direction))


def backdoor_success(
    population: Population,
    head: Head,
    section: Attack,
    lying: Int64,
    seed: int,
    *,
    threads: int = 1,
    device: str = "cpu",
) -> float:
    """Share of triggered test rows that the head takes for the target, in [0, 1].

    The rows are the honest clients' test rows of every other class. NaN where there are none.

    Args:
        population: everybody's true data.
        head: the one that is judged.
        section, lying, seed: as for ``poison``.

    Raises:
        InputError: the backdoor's target is no class.
    """
    delta = trigger(population, section, lying, seed)
    honest = np.setdiff1d(np.arange(population.num_clients), lying)
    rows = np.concatenate([population.test.of(client) for client in honest.tolist()])
    rows = rows[population.labels[rows] != section.target]
    one = {name: tensor[None] for name, tensor in head.items()}
    taken = 0
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        part = population.features[rows[first : first + ROWS_AT_A_TIME]]
        triggered = (part + delta).astype(population.features.dtype)
        judged = evaluate_heads(
            triggered,
            np.full(len(part), section.target, np.int32),
            np.arange(len(part)),
            one,
            len(population.classes),
            threads=threads,
            device=device,
        )
        taken += int(judged.correct.sum())
    return taken / len(rows) if len(rows) else math.nan


def lie(
    replies: Sequence[ClientUpdates],
    plan: RoundPlan,
    head: Head,
    section: Attack,
    lying: Int64,
    seed: int,
) -> list[ClientUpdates]:
    """The round's replies with the liars' heads replaced; whatever else they say stays true.

    The result does not depend on the replies' order, nor on how clients are spread over them.

    Args:
        replies: what came from the engine, one or more clients each.
        plan: the round they answer; only trained heads are falsified.
        head: what the clients started from.
        section: the attack; one that is none on updates leaves the replies as they are.
        lying: ids of the liars, int64.
        seed: the scenario's.
    """
    forge = _FORGERIES.get(section.kind)
    cohort = np.concatenate([r.clients for r in replies] or [np.empty(0, np.int64)])
    present = np.intersect1d(cohort, lying)
    if forge is None or plan.task != "train" or not len(present):
        return list(replies)
    told = np.setdiff1d(cohort, present)
    sent = {name: head[name] for name in plan.reply(head) if name in head}
    honest = _deltas(replies, sent, told if len(told) else present)
    own = _deltas(replies, sent, present)
    streams = [seeding.generator(seed, "lie", plan.round, client) for client in present.tolist()]
    forged = np.broadcast_to(forge(honest, own, section, streams), own.shape)
    return [_replaced(reply, sent, present, forged) for reply in replies]


def alie_z(count: int, lying: int) -> float:
    """z of "A little is enough" for ``count`` clients of which ``lying`` lie.

    The share of honest clients that must be farther out than the liars for these to have a
    majority, through the inverse normal distribution. Liars that need nobody, being the majority,
    are taken to need one; with one honest client z is 0, as its std is.
    """
    needed = max(1, count // 2 + 1 - lying)
    others = count - lying
    return NormalDist().inv_cdf((others - needed) / others) if others > needed else 0.0


def _sign_flip(honest: Float64, own: Float64, section: Attack, streams: Streams) -> Float64:
    return -(section.scale or 1.0) * own


def _gaussian(honest: Float64, own: Float64, section: Attack, streams: Streams) -> Float64:
    scale = section.scale or 0.1
    return np.stack([s.normal(section.mean, scale, own.shape[1]) for s in streams])


def _inner_product(honest: Float64, own: Float64, section: Attack, streams: Streams) -> Float64:
    return np.asarray(-(section.scale or 1.0) * honest.mean(axis=0))


def _alie(honest: Float64, own: Float64, section: Attack, streams: Streams) -> Float64:
    z = alie_z(len(honest) + len(own), len(own))
    return np.asarray(honest.mean(axis=0) + z * _std(honest))


def _min_max(honest: Float64, own: Float64, section: Attack, streams: Streams) -> Float64:
    """|mean - gamma std - w_i|^2 <= T^2 for all i, T the longest way between two honest updates."""
    mean, std = honest.mean(axis=0), _std(honest)
    apart = mean - honest
    gram = apart @ apart.T
    squares = gram.diagonal()
    longest = (squares[:, None] + squares - 2 * gram).max()
    along, square = apart @ std, std @ std
    if square == 0:
        return np.asarray(mean)
    gammas = (along + np.sqrt(np.maximum(0, along**2 + square * (longest - squares)))) / square
    return np.asarray(mean - gammas.min() * std)


def _std(honest: Float64) -> Float64:
    return np.asarray(honest.std(axis=0, ddof=min(1, len(honest) - 1)))


_FORGERIES: dict[str, Callable[[Float64, Float64, Attack, Streams], Float64]] = {
    "sign_flip": _sign_flip,
    "gaussian": _gaussian,
    "inner_product": _inner_product,
    "alie": _alie,
    "min_max": _min_max,
}
"""From the honest updates [h, P] and the liars' own [m, P] to what is sent, [m, P] or [P]."""


def _rows(population: Population, clients: Int64) -> Int64:
    parts = [population.train.of(client) for client in clients.tolist()]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _poisoned(population: Population, section: Attack, client: int, seed: int) -> Int64:
    """The rows of a liar that carry the trigger: a seeded share of them, at least one."""
    rows = population.train.of(client)
    count = min(len(rows), max(1, math.floor(section.poisoned * len(rows) + 0.5)))
    return seeding.generator(seed, "poisoned", client).permutation(rows)[:count]


def _writable(features: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """The same values to write to, never on disk: mapped copy-on-write where they are a file's."""
    base: Any = features.base
    if not (isinstance(features, np.memmap) and isinstance(base, mmap.mmap) and features.filename):
        return np.array(features)
    order: Literal["C", "F"] = "C" if features.flags.c_contiguous else "F"
    mapped = np.memmap(
        features.filename, features.dtype, "c", features.offset, features.shape, order
    )
    return np.asarray(mapped)  # no memmap any more: nobody drops its pages or takes it for the file


def _deltas(replies: Sequence[ClientUpdates], head: Head, clients: Int64) -> Float64:
    """w_k - w of some clients as float64 [m, P], in the order of their ids."""
    place = {client: i for i, client in enumerate(clients.tolist())}
    deltas = np.empty((len(place), sum(tensor.size for tensor in head.values())))
    for reply in replies:
        for row, client in enumerate(reply.clients.tolist()):
            if client in place:
                parts = [(reply.tensors[name][row] - head[name].astype(float)) for name in head]
                deltas[place[client]] = np.concatenate([part.ravel() for part in parts])
    return deltas


def _replaced(reply: ClientUpdates, head: Head, lying: Int64, forged: Float64) -> ClientUpdates:
    """A reply whose liars send what was forged, float64 [m, P] in the order of ``lying``."""
    rows = np.flatnonzero(np.isin(reply.clients, lying))
    if not len(rows):
        return reply
    places = np.searchsorted(lying, reply.clients[rows])
    tensors: dict[str, npt.NDArray[Any]] = dict(reply.tensors)
    first = 0
    for name, start in head.items():
        part = forged[places, first : first + start.size].reshape(-1, *start.shape)
        tensors[name] = tensors[name].copy()
        tensors[name][rows] = float32(start + part)
        first += start.size
    return replace(reply, tensors=tensors)

"""What clients do to their answers before these leave: clip, add noise, go into a ring.

The order is: clip to ``Protection.clip``; add noise; pack (``clients.compression``). In a ring the
noise comes last, as only a sum of all the clients' is enough: clip, pack and unpack, clip again
(packing can lengthen), add noise, round to whole numbers of the ring. Noise over a whole
update has one stream per client, so that neither blocks nor threads nor engines change a bit.

A client whose update is not finite, or too large for the ring, is a failure of its own; but where
it adds noise, an update that is not finite counts as 0: that its training diverged is told by
nothing else than by what noise covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.clients.blocks import run_blocks
from fedtl.clients.compression import compress, expand, parts_of
from fedtl.clients.personal_store import PersonalStore
from fedtl.errors import InputError
from fedtl.plans import RING, Protection, RoundPlan
from fedtl.privacy.clipping import clip_updates
from fedtl.privacy.noise import Noise, from_system, seeded
from fedtl.privacy.ring import Beyond, quantise
from fedtl.types import ClientFailure, ClientUpdates, Float64, Head, Int64, float32


def protect(
    updates: ClientUpdates,
    head: Head,
    plan: RoundPlan,
    store: PersonalStore | None,
    names: Sequence[str],
    *,
    threads: int = 1,
    secure: bool = False,
) -> ClientUpdates:
    """Trained heads, or statistics, as they may leave.

    Args:
        updates: what the clients came to, after training heads, float32 [k, ...].
        head: the round's, the tensors that are sent.
        plan: the round, with its protection and compression.
        store, names: see ``compress``.
        threads: CPU threads; the result does not depend on it.
        secure: noise is the operating system's, for real data; else of the plan's keys.

    Returns:
        The tensors that ``plan.reply(head)`` names. Losses do not leave where anything is
        protected: NaN.

    Raises:
        InputError: noise is asked for, and neither keys nor the system may make it.
    """
    asked = plan.protection or Protection()
    if asked == Protection(least_per_class=asked.least_per_class):
        return updates if plan.compression is None else compress(updates, head, plan, store, names)
    updates = replace(updates, loss=np.full(len(updates.clients), np.nan))
    trained = plan.task == "train"
    plain = replace(plan, protection=None)
    if trained and (asked.clip or asked.noise) and not (asked.ring_bits and not plan.compression):
        own = replace(asked, noise=0.0) if asked.ring_bits else asked
        updates = _shielded(updates, head, replace(plan, protection=own), threads, secure)
    if trained and plan.compression is not None:
        updates = compress(updates, head, plain, store, names)
        if asked.ring_bits:
            updates = expand(updates, head, plain)
    return _in_ring(updates, head, plan, threads, secure) if asked.ring_bits else updates


def _shielded(
    updates: ClientUpdates, head: Head, plan: RoundPlan, threads: int, secure: bool
) -> ClientUpdates:
    """Heads w + clip(w_k - w) + noise, float32; without noise one that is not finite stays so."""
    asked = plan.protection
    assert asked is not None
    out = {name: np.empty_like(updates.tensors[name]) for name in head}
    places = _places(updates, plan)

    def work(first: int, stop: int) -> None:
        flat = _clipped(updates, head, asked.clip, first, stop)
        _add_noise(flat, plan, places[first:stop], secure)
        for name, part in parts_of(head).items():
            sent = flat[:, part].reshape(stop - first, *head[name].shape) + head[name]
            out[name][first:stop] = float32(sent)

    run_blocks(work, len(updates.clients), threads=threads)
    return replace(updates, tensors={**updates.tensors, **out})


def _in_ring(
    updates: ClientUpdates, head: Head, plan: RoundPlan, threads: int, secure: bool
) -> ClientUpdates:
    """Each answer as one vector of whole numbers; a client that has none is a failure."""
    asked = plan.protection
    assert asked is not None
    count = len(updates.clients)
    ((size,), dtype) = plan.reply(head)[RING]
    values, why = np.zeros((count, size), dtype), np.full(count, "", object)
    places = _places(updates, plan)
    weights = np.ones(count) if plan.weights is None else plan.weights[places]

    def work(first: int, stop: int) -> None:
        if plan.task == "train":
            flat = _clipped(updates, head, asked.clip, first, stop)
            _add_noise(flat, plan, places[first:stop], secure)
        else:
            flat = _flat({n: tensor[first:stop] for n, tensor in updates.tensors.items()})
        flat *= weights[first:stop, None]
        for i, row in enumerate(flat, first):
            try:
                values[i] = quantise(row, asked.scale, asked.limit, asked.ring_bits)
            except Beyond as error:
                why[i] = f"its answer has {error.what}"

    run_blocks(work, count, threads=threads)
    failed = why != ""
    bad = zip(updates.clients[failed].tolist(), why[failed].tolist(), strict=True)
    return replace(
        updates,
        clients=updates.clients[~failed],
        tensors={RING: values[~failed] if failed.any() else values},
        num_examples=updates.num_examples[~failed],
        loss=updates.loss[~failed],
        failures=(*updates.failures, *(ClientFailure(*one) for one in bad)),
    )


def _clipped(updates: ClientUpdates, head: Head, bound: float, first: int, stop: int) -> Float64:
    """Some clients' updates w_k - w, float64 [b, P], none longer than ``bound`` unless that is 0.

    The tensors stand in the order of their names.
    """
    parts = parts_of(head)
    flat = np.empty((stop - first, sum(tensor.size for tensor in head.values())))
    with np.errstate(over="ignore", invalid="ignore"):
        for name, part in parts.items():
            own = updates.tensors[name][first:stop].reshape(stop - first, -1)
            np.subtract(own, head[name].ravel(), out=flat[:, part], dtype=np.float64)
    return clip_updates({"update": flat}, bound)[0]["update"] if bound else flat


def _add_noise(flat: Float64, plan: RoundPlan, places: Int64, secure: bool) -> None:
    """In place, of each client's own stream; ``places`` are theirs in the plan. What is not
    finite becomes 0 before: it has no length that was clipped.

    Raises:
        InputError: noise is asked for, and neither keys nor the system may make it.
    """
    assert plan.protection is not None
    deviation = plan.protection.noise
    if not deviation:
        return
    if not secure and plan.noise_keys is None:
        raise InputError(
            "noise is asked for, and nothing says where from", where=f"round {plan.round}"
        )
    flat[~np.isfinite(flat).all(axis=1)] = 0.0
    for row, place in zip(flat, places.tolist(), strict=True):
        if secure:
            stream: Noise = from_system()
        else:
            assert plan.noise_keys is not None
            stream = seeded(int(plan.noise_keys[place]))
        drawn = stream.normal(len(row))
        drawn *= deviation
        row += drawn


def _flat(tensors: dict[str, npt.NDArray[Any]]) -> Float64:
    """Stacked tensors [b, ...] as float64 [b, P], in the order of their names."""
    rows = [tensors[name].reshape(len(tensors[name]), -1) for name in sorted(tensors)]
    return np.concatenate(rows, axis=1, dtype=np.float64)


def _places(updates: ClientUpdates, plan: RoundPlan) -> Int64:
    """Where in the plan those are that are still here, int64 [k]."""
    place = {client: i for i, client in enumerate(plan.clients.tolist())}
    return np.array([place[client] for client in updates.clients.tolist()], np.int64)

"""Updates packed into fewer bytes at the client, and unpacked where they are added.

A client's update v = w_k - w (+ its residual e) is sent as c(v); with error feedback e <- v - c(v)
stays with the client and is added to its next update, so that nothing is lost, only late.

``top_k``: the entries of largest absolute value, as places and values. Stich et al. 2018 (arXiv
    1809.07599, algorithm 1); Lin et al. 2018 (1712.01887), without their momentum correction,
    clipping and warm-up. Of equal entries those of lower place are sent.
``int8``: per tensor s = max|v| / 127 and round(v / s). After QSGD (Alistarh et al. 2017,
    1610.02132, section 3). Deviations: the norm is the maximum, and values are rounded to the
    nearest level (halves to even) with error feedback, where QSGD rounds at random without bias.
``sign``: per tensor s = mean|v|, and a bit for each sign; 0 counts as +. EF-signSGD of Karimireddy
    et al. 2019 (1901.09847, algorithm 1), after the 1-bit SGD of Seide et al. 2014. Deviation: a
    scale for each tensor.

All deviate in that v is a client's whole local training, not one gradient.

A residual does not wait for the server: of an update that is refused or comes late, what was sent
is lost. The tensors stand in the order of their names, as messages do not keep another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.clients.personal_store import PersonalStore
from fedtl.errors import EnvironmentFault, InputError
from fedtl.plans import RoundPlan, Shapes, misfit, no_updates
from fedtl.types import ClientFailure, ClientUpdates, Float32, Head

RESIDUAL = "residual"
"""What the store files a client's residual under."""

PLACES, VALUES = "top_k.places", "top_k.values"
LEVELS, SCALES = "int8.values", "int8.scales"
BITS, STEPS = "sign.bits", "sign.scales"
"""The tensors of each kind, as ``RoundPlan.reply`` names them."""

LARGEST = 127
"""int8's largest level; -128 is never sent, so that the levels are symmetric."""

Packed = Mapping[str, npt.NDArray[Any]]


def compress(
    updates: ClientUpdates,
    head: Head,
    plan: RoundPlan,
    store: PersonalStore | None,
    names: Sequence[str],
) -> ClientUpdates:
    """Pack the updates of trained clients; done where the clients are.

    Args:
        updates: heads after local training, float32 [k, ...].
        head: the round's, the tensors that are sent.
        plan: the round, with its compression.
        store: where residuals are kept, for error feedback.
        names: of the clients, by their ids in ``updates``.

    Returns:
        The tensors that ``plan.reply(head)`` names. An update that is not finite stays so, and
        leaves the client's residual as it was.

    Raises:
        InputError: error feedback without a store.
        EnvironmentFault: a residual cannot be read, written, or belongs to another head.
    """
    asked = plan.compression
    assert asked is not None
    if asked.error_feedback and store is None:
        raise InputError(
            "error feedback needs a place where clients keep what was not sent",
            where="compression.error_feedback",
            do="Give the engine a store, or set compression.error_feedback = false",
        )
    kept = store if asked.error_feedback else None
    shapes = plan.reply(head)
    out = {
        name: np.empty((len(updates.clients), *shape), dtype)
        for name, (shape, dtype) in shapes.items()
    }
    for i, client in enumerate(updates.clients.tolist()):
        with np.errstate(over="ignore", invalid="ignore"):  # the server refuses what overflows
            delta = _flat({name: updates.tensors[name][i] - head[name] for name in head})
            if kept is not None:
                delta = delta + _residual(kept, names[client], plan.round, len(delta))
            packed = _pack(delta, head, shapes)
            left = delta - _unpack(packed, head)
        for name, values in packed.items():
            out[name][i] = values
        if kept is not None and np.isfinite(left).all():
            kept.save(RESIDUAL, names[client], plan.round, {RESIDUAL: left})
    return replace(updates, tensors=out)


def expand(reply: ClientUpdates, head: Head, plan: RoundPlan) -> ClientUpdates:
    """Unpack a reply into heads w + c(v), float32 [k, ...]; done by the server before validation.

    Args:
        reply: whatever came; nothing of it is trusted.
        head: the round's, with the tensors that stay with the clients, if any.
        plan: the round, with its compression.

    Returns:
        Heads without the tensors that stay with the clients. A client whose answer cannot be
        unpacked is a failure, with the reason. Where nothing was compressed, the reply as it is.
    """
    if plan.compression is None or plan.task != "train":
        return reply
    local = plan.personal.local if plan.personal is not None else ()
    head = {name: start for name, start in head.items() if name not in local}
    count = len(reply.clients)
    reason = misfit(reply, plan.reply(head))
    if reason is not None:
        failures = (*reply.failures, *(ClientFailure(k, reason) for k in reply.clients.tolist()))
        return no_updates(replace(plan, compression=None), head, failures)
    rows = [{name: values[i] for name, values in reply.tensors.items()} for i in range(count)]
    size = sum(tensor.size for tensor in head.values())
    faults = {i: fault for i, row in enumerate(rows) if (fault := _fault(row, size)) is not None}
    keep = np.array([i for i in range(count) if i not in faults], np.int64)
    tensors = {
        name: np.empty((len(keep), *start.shape), np.float32) for name, start in head.items()
    }
    for place, i in enumerate(keep.tolist()):
        with np.errstate(over="ignore"):  # refused by validation, as any head that is not finite
            sent = _unpack(rows[i], head)
            for name, part in parts_of(head).items():
                tensors[name][place] = head[name] + sent[part].reshape(head[name].shape)
    bad = (ClientFailure(int(reply.clients[i]), fault) for i, fault in faults.items())
    return replace(
        reply,
        clients=reply.clients[keep],
        tensors=tensors,
        num_examples=reply.num_examples[keep],
        loss=reply.loss[keep],
        failures=(*reply.failures, *bad),
    )


def _flat(tensors: Head) -> Float32:
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)])


def parts_of(head: Head) -> dict[str, slice]:
    """Where each tensor of the head is in the flat vector."""
    parts, start = {}, 0
    for name in sorted(head):
        parts[name] = slice(start, start + head[name].size)
        start += head[name].size
    return parts


def _residual(store: PersonalStore, client: str, round: int, size: int) -> Float32:
    """What the client has not sent so far, float32 [P]."""
    found = store.load(RESIDUAL, client, round)
    if found is None:
        return np.zeros(size, np.float32)
    residual = found[1].get(RESIDUAL)
    if residual is None or residual.shape != (size,) or residual.dtype != np.float32:
        raise EnvironmentFault(
            f"what {client!r} has kept since round {found[0]} belongs to another head",
            where=store.folder,
            allowed=f"{size} float32 values",
            do="Use a folder of its own for each run",
        )
    return residual


def _pack(delta: Float32, head: Head, shapes: Shapes) -> Packed:
    """c(v) as it travels, in the tensors of these names and shapes."""
    if PLACES in shapes:
        places = _largest(np.abs(delta), shapes[PLACES][0][0])
        return {PLACES: places.astype(np.int32), VALUES: delta[places]}
    parts = [delta[part] for part in parts_of(head).values()]
    if BITS in shapes:
        means = [np.abs(part).mean(dtype=np.float64) for part in parts]
        return {BITS: np.packbits(delta >= 0), STEPS: np.array(means, np.float32)}
    scales = np.array([np.abs(part).max() for part in parts], np.float32) / np.float32(LARGEST)
    levels = [_levels(part, scale) for part, scale in zip(parts, scales, strict=True)]
    return {LEVELS: np.concatenate(levels), SCALES: scales}


def _unpack(packed: Packed, head: Head) -> Float32:
    """c(v) from what travelled, float32 [P]; client and server compute it alike."""
    parts = parts_of(head)
    size = sum(tensor.size for tensor in head.values())
    if PLACES in packed:
        sent = np.zeros(size, np.float32)
        sent[packed[PLACES]] = packed[VALUES]
        return sent
    if BITS in packed:
        positive = np.unpackbits(packed[BITS], count=size).astype(bool)
        sent, scales = np.where(positive, np.float32(1), np.float32(-1)), packed[STEPS]
    else:
        sent, scales = packed[LEVELS].astype(np.float32), packed[SCALES]
    for part, scale in zip(parts.values(), scales, strict=True):
        sent[part] *= scale
    return sent


def _largest(sizes: Float32, count: int) -> npt.NDArray[np.intp]:
    """Places of the ``count`` largest, ascending; of equal ones the first. NaN is the largest."""
    sizes = np.where(np.isnan(sizes), np.float32(np.inf), sizes)
    least = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    above, equal = np.flatnonzero(sizes > least), np.flatnonzero(sizes == least)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def _levels(part: Float32, scale: np.float32) -> npt.NDArray[np.int8]:
    """The nearest level of each value; 0 where the scale is 0 or not finite."""
    if not 0 < scale < np.inf:
        return np.zeros(len(part), np.int8)
    levels: npt.NDArray[np.int8] = np.clip(np.rint(part / scale), -LARGEST, LARGEST).astype(np.int8)
    return levels


def _fault(packed: Packed, size: int) -> str | None:
    """Why one client's answer cannot be unpacked, or None."""
    for name, values in packed.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return f"{name} has a value that is not finite"
        if name in (SCALES, STEPS) and (values < 0).any():
            return f"{name} has a negative value"
        if name == PLACES:
            if (values < 0).any() or (values >= size).any():
                return f"{name} has a place outside of the head's {size} entries"
            if (np.diff(values) <= 0).any():
                return f"{name} are not in ascending order, each once"
    return None

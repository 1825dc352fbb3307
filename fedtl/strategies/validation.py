"""Which updates may be added: all of a reply is looked at before any of it counts.

Flower's own aggregation accepts NaN, broadcastable wrong shapes and negative weights in silence;
here a bad update is refused by name and the round goes on with the others.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np
import numpy.typing as npt

from fedtl.plans import Protection, RoundPlan, Shapes, misfit
from fedtl.strategies.admissible import inadmissible
from fedtl.types import ClientFailure, ClientUpdates, Float64, Head, Int64

LOSS = "its loss"


def accept_updates(
    replies: Iterable[ClientUpdates],
    plan: RoundPlan,
    head: Head,
    declared_examples: Int64,
    max_norm_ratio: float,
) -> tuple[ClientUpdates, Float64]:
    """Merge replies into one set of valid updates, sorted by client id.

    Args:
        replies: blocks of one or more clients, in any order.
        plan: the round they answer.
        head: what the clients started from; gives names, shapes and float32.
        declared_examples: int64 [K], training examples each client of the population declared.
        max_norm_ratio: an update longer than this many times the cohort's median is refused.

    Returns:
        The accepted updates, with a failure for every planned client that is not among them, and
        the accepted updates' Euclidean norms, float64 [k].
    """
    failures: dict[int, str] = {}
    blocks: list[ClientUpdates] = []
    seen: set[int] = set()
    expected = plan.reply(head)
    for reply in replies:
        failures.update({failure.client: failure.reason for failure in reply.failures})
        reason = _malformed(reply, plan, expected)
        repeated = seen.intersection(reply.clients.tolist())
        if reason is None and repeated:
            reason = "answered twice"
        if reason is not None:
            failures.update(dict.fromkeys(set(reply.clients.tolist()) - seen, reason))
            continue
        seen.update(reply.clients.tolist())
        blocks.append(reply)
    merged = _merge(blocks, plan, expected)
    if plan.task == "train":
        declared_examples = plan.training.trains_on(declared_examples)
    keep, norms, refused = _judge(merged, plan, head, declared_examples, max_norm_ratio)
    planned = set(plan.clients.tolist())
    failures = {k: reason for k, reason in failures.items() if k in planned and k not in seen}
    failures.update(refused)
    for client in set(plan.clients.tolist()) - seen - set(failures):
        failures[client] = "no answer"
    accepted = ClientUpdates(
        plan.round,
        merged.clients[keep],
        {name: tensor[keep] for name, tensor in merged.tensors.items()}
        if not keep.all()
        else merged.tensors,
        merged.num_examples[keep],
        merged.loss[keep],
        tuple(ClientFailure(client, failures[client]) for client in sorted(failures)),
        plan.training,
    )
    return accepted, norms[keep]


def _malformed(reply: ClientUpdates, plan: RoundPlan, expected: Shapes) -> str | None:
    """Why a whole reply cannot be read, or None."""
    count = len(reply.clients)
    if reply.round != plan.round:
        return f"answers round {reply.round}, this is round {plan.round}"
    if unknown := set(reply.clients.tolist()) - set(plan.clients.tolist()):
        return f"client {min(unknown)} is not in this round"
    if len(set(reply.clients.tolist())) != count:
        return "answered twice"
    if (reason := misfit(reply, expected)) is not None:
        return reason
    if reply.num_examples.dtype.kind not in "iu":
        return f"num_examples is {reply.num_examples.dtype} instead of int64"
    return None


def _merge(blocks: list[ClientUpdates], plan: RoundPlan, expected: Shapes) -> ClientUpdates:
    if len(blocks) == 1 and bool(np.all(np.diff(blocks[0].clients) > 0)):
        return blocks[0]
    clients = np.concatenate([b.clients for b in blocks] or [np.empty(0, np.int64)])
    order = np.argsort(clients)
    tensors = {
        name: np.concatenate([b.tensors[name] for b in blocks] or [np.empty((0, *shape), dtype)])[
            order
        ]
        for name, (shape, dtype) in expected.items()
    }
    examples = np.concatenate([b.num_examples for b in blocks] or [np.empty(0, np.int64)])
    loss = np.concatenate([b.loss for b in blocks] or [np.empty(0)])
    return ClientUpdates(plan.round, clients[order], tensors, examples[order], loss[order])


def _judge(
    updates: ClientUpdates,
    plan: RoundPlan,
    head: Head,
    declared: Int64,
    max_norm_ratio: float,
) -> tuple[npt.NDArray[np.bool_], Float64, dict[int, str]]:
    """Which clients' values may be added (bool [k]), all norms, and the refusals.

    In a ring a single answer says nothing.
    """
    if plan.protection is not None and plan.protection.ring_bits:
        return _declared(updates, declared)
    squares, rest, culprit = _squares(updates, plan, head)
    lossy = plan.task == "gradient" or "start_loss" in plan.reports  # the loss is part of the step
    if lossy:
        unlike = ~(np.isfinite(updates.loss) & (updates.loss >= 0)) & (updates.num_examples > 0)
        squares[unlike], culprit[unlike] = np.nan, LOSS
    finite = np.isfinite(squares + rest)
    right = updates.num_examples == declared[updates.clients]
    norms = np.sqrt(squares) if plan.task == "train" else np.full(len(squares), np.nan)
    measured = {"update": np.sqrt(squares)} if plan.task != "statistics" else {}
    if plan.reports:
        measured["gradient"] = np.sqrt(rest)
    if lossy:
        measured["loss"] = updates.loss
    ratios = {what: _to_median(values, finite & right) for what, values in measured.items()}
    largest = np.max([np.zeros(len(norms)), *ratios.values()], axis=0)
    bounded = ~(largest > max_norm_ratio)
    refused: dict[int, str] = {}
    for i in np.flatnonzero(~(finite & right & bounded)).tolist():
        client = int(updates.clients[i])
        if not finite[i]:
            negative = culprit[i] == LOSS and updates.loss[i] < 0
            refused[client] = (
                "its loss is negative"
                if negative
                else f"{culprit[i]} has a value that is not finite"
            )
        elif not right[i]:
            refused[client] = _miscounted(int(updates.num_examples[i]), int(declared[client]))
        else:
            what = max(ratios, key=lambda name: ratios[name][i])
            refused[client] = (
                f"its {what} is {ratios[what][i]:.3g} times the cohort's median, "
                f"allowed {max_norm_ratio:g}"
            )
    keep = finite & right & bounded
    safe = plan.protection or Protection()
    if plan.statistics is not None and plan.task == "statistics" and not safe.noise:
        for i in np.flatnonzero(keep).tolist():
            own = {name: tensor[i] for name, tensor in updates.tensors.items()}
            reason = inadmissible(own, plan.statistics, int(updates.num_examples[i]), safe)
            if reason is not None:
                keep[i], refused[int(updates.clients[i])] = False, f"statistics: {reason}"
    return keep, norms, refused


def _declared(
    updates: ClientUpdates, declared: Int64
) -> tuple[npt.NDArray[np.bool_], Float64, dict[int, str]]:
    """Who says as many examples as it declared; the same three as ``_judge``."""
    right = updates.num_examples == declared[updates.clients]
    wrong = zip(
        updates.clients[~right].tolist(), updates.num_examples[~right].tolist(), strict=True
    )
    refused = {client: _miscounted(examples, int(declared[client])) for client, examples in wrong}
    return right, np.full(len(right), np.nan), refused


def _miscounted(examples: int, declared: int) -> str:
    return f"says it trained on {examples} examples, declared {declared}"


def _to_median(values: Float64, counted: npt.NDArray[np.bool_]) -> Float64:
    """Values as multiples of the median of those that are counted; 1 where that is 0."""
    median = float(np.median(values[counted])) if counted.any() else 0.0
    return values / median if median > 0 else np.ones(len(values))


def _squares(
    updates: ClientUpdates, plan: RoundPlan, head: Head
) -> tuple[Float64, Float64, npt.NDArray[np.object_]]:
    """Squared lengths of each update and of what is sent beside it, and what is not finite.

    After training an update is the way from the round's head.

    Returns:
        float64 [k] twice, and the name of the first tensor that is not finite, "" for none.
    """
    count = len(updates.clients)
    squares, rest = np.zeros(count), np.zeros(count)
    culprit = np.full(count, "", object)
    with np.errstate(all="ignore"):  # values that overflow are exactly what is looked for
        for name, tensor in updates.tensors.items():
            main = name in head or plan.task != "train"
            way = tensor - head[name] if plan.task == "train" and main else tensor
            delta = way.reshape(count, prod(tensor.shape[1:]))
            if plan.task == "statistics":  # finite is enough, and squares would overflow easily
                own = np.abs(delta).sum(axis=1, dtype=np.float64)
            else:
                # float64 cannot overflow on squares of float32: a sum is finite if its terms are
                own = np.einsum("kp,kp->k", delta, delta, dtype=np.float64)
            target = squares if main else rest
            target += own
            culprit[~np.isfinite(own) & (culprit == "")] = name
    return squares, rest, culprit

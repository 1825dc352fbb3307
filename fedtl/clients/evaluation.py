"""Judging heads on clients' rows: sums from which every metric follows.

Predictions are the class of the largest score (the lowest such class on ties); the loss is
cross-entropy in nats by a stable log-softmax, summed in float64 in row order. A pair of head and
rows is judged by itself: its bits depend on neither threads nor blocks. Behind a cut the rows first
pass the network there, and then it is the head alone that is judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.clients.blocks import block_rows, frozen, label_error, run_blocks
from fedtl.clients.training import LINEAR, check_clients, check_heads
from fedtl.errors import InputError
from fedtl.types import ClientMetrics, Float32, Head, Int32, Int64, Population, Rows, Tail

Right = list[npt.NDArray[np.bool_]]
"""For each head, bool [n]: which of its rows it has right; a list that is given is added to."""


def evaluate_clients(
    population: Population,
    head: Head,
    clients: Int64,
    *,
    split: str = "test",
    threads: int = 1,
    device: str = "cpu",
    right: Right | None = None,
) -> ClientMetrics:
    """Judge one head on each client's rows of ``split`` ("train" or "test")."""
    check_clients(population, clients)
    heads = check_heads(population, head, None, len(clients))
    return _judge_clients(population, heads, clients, split, threads, device, right)


def evaluate_own(
    population: Population,
    heads: Mapping[str, Float32],
    clients: Int64,
    *,
    split: str = "test",
    threads: int = 1,
    device: str = "cpu",
    right: Right | None = None,
) -> ClientMetrics:
    """Judge head i (``heads`` are name -> [k, ...]) on client i's rows of ``split``."""
    check_clients(population, clients)
    if not len(clients):
        return _nothing(clients, heads)
    one = {name: tensor[0] for name, tensor in heads.items()}
    heads = check_heads(population, one, heads, len(clients))
    return _judge_clients(population, heads, clients, split, threads, device, right)


def evaluate_heads(
    features: npt.NDArray[np.floating[Any]],
    labels: Int32,
    rows: Int64,
    heads: Mapping[str, Float32],
    num_classes: int,
    *,
    threads: int = 1,
    device: str = "cpu",
    right: Right | None = None,
    tail: Tail | None = None,
) -> ClientMetrics:
    """Judge M heads (name -> [M, ...]) on the same rows; ``clients`` of the result is arange(M)."""
    num_heads = len(heads["bias"])
    if heads["bias"].shape[1] != num_classes:
        raise InputError(
            "heads of another number of classes", got=heads["bias"].shape[1], allowed=num_classes
        )
    return _judge(
        features,
        labels,
        [rows] * num_heads,
        np.arange(num_heads),
        heads,
        threads,
        device,
        right,
        tail,
    )


def _judge_clients(
    population: Population,
    heads: Head,
    clients: Int64,
    split: str,
    threads: int,
    device: str,
    right: Right | None,
) -> ClientMetrics:
    splits: dict[str, Rows] = {"train": population.train, "test": population.test}
    if split not in splits:
        raise InputError("unknown split", got=repr(split), allowed="train, test")
    rows = [splits[split].of(client) for client in clients.tolist()]
    try:
        return _judge(
            population.features,
            population.labels,
            rows,
            clients,
            heads,
            threads,
            device,
            right,
            population.tail,
        )
    except _BadLabel as error:
        raise label_error(population, int(clients[error.position]), error.num_classes) from None


class _BadLabel(InputError):
    """A label outside the head's classes, at a position of the call."""

    def __init__(self, position: int, num_classes: int) -> None:
        super().__init__("labels outside the head's classes", allowed=f"0 to {num_classes - 1}")
        self.position, self.num_classes = position, num_classes


def _nothing(clients: Int64, heads: Head) -> ClientMetrics:
    counts = np.zeros((len(clients), heads["bias"].shape[-1]), dtype=np.int64)
    return ClientMetrics(clients, np.zeros(len(clients)), counts, counts.copy())


def _judge_through(
    tail: Tail,
    features: npt.NDArray[np.floating[Any]],
    labels: Int32,
    rows: list[Int64],
    clients: Int64,
    heads: Head,
    threads: int,
    device: str,
    right: Right | None,
) -> ClientMetrics:
    """``_judge`` where a network stands behind the cut; ``heads`` hold its tensors too."""
    import torch

    from fedtl.clients.networks import head_of
    from fedtl.clients.resting import rested

    result = _nothing(clients, heads)
    answers: list[Right] = [[] for _ in rows]

    def work(first: int, stop: int) -> None:
        torch.set_num_threads(1)
        for i in range(first, stop):
            own = {name: t[i if len(t) > 1 else 0] for name, t in heads.items()}
            tensors = {name: torch.tensor(t, device=device) for name, t in own.items()}
            made = rested(tail, tensors, features, rows[i], device)
            alone = {name: t[None] for name, t in head_of(own).items()}
            every = [np.arange(len(made))]
            try:
                one = _judge(
                    made, labels[rows[i]], every, clients[i : i + 1], alone, 1, device,
                    answers[i], None,
                )  # fmt: skip
            except _BadLabel as error:
                raise _BadLabel(i, error.num_classes) from None
            result.loss_sum[i] = one.loss_sum[0]
            result.count[i], result.correct[i] = one.count[0], one.correct[0]

    with _one_torch_thread():
        run_blocks(work, len(rows), threads=threads)
    if right is not None:
        right.extend(own for found in answers for own in found)
    return result


def _judge(
    features: npt.NDArray[np.floating[Any]],
    labels: Int32,
    rows: list[Int64],
    clients: Int64,
    heads: Head,
    threads: int,
    device: str,
    right: Right | None,
    tail: Tail | None,
) -> ClientMetrics:
    """Head i, or the only one, on ``rows[i]``; ``heads`` are name -> [1 or k, ...]."""
    if tail is not None:
        return _judge_through(tail, features, labels, rows, clients, heads, threads, device, right)
    result = _nothing(clients, heads)
    num_classes = result.count.shape[1]
    answers = [np.zeros(len(own), np.bool_) for own in rows] if right is not None else []
    fused = set(heads) == LINEAR and device == "cpu"
    if fused:
        from fedtl.clients.kernel import EVERYTHING_FINE, evaluate_block

        weights, biases = (frozen(heads[name], np.float32) for name in ("weight", "bias"))

        def work(first: int, stop: int) -> None:
            block = block_rows(features, labels, rows[first:stop])
            part = slice(first, stop) if len(weights) > 1 else slice(None)
            asked = answers[first:stop]
            flat = np.empty(sum(map(len, asked)), np.bool_)
            bad = evaluate_block(
                block.features, block.halves, block.labels, block.index, block.starts, block.stops,
                weights[part], biases[part], result.loss_sum[first:stop],
                result.correct[first:stop], result.count[first:stop], flat,
            )  # fmt: skip
            if bad != EVERYTHING_FINE:
                raise _BadLabel(first + bad, num_classes)
            _dealt(flat, asked)
    else:
        from fedtl.clients.networks import judge

        def work(first: int, stop: int) -> None:
            for i in range(first, stop):
                head = {name: tensor[i if len(tensor) > 1 else 0] for name, tensor in heads.items()}
                own = labels[rows[i]]
                if len(own) and (own.min() < 0 or own.max() >= num_classes):
                    raise _BadLabel(i, num_classes)
                loss, found = judge(features, labels, rows[i], head, device)
                result.loss_sum[i] = loss
                result.count[i] = np.bincount(own, minlength=num_classes)
                result.correct[i] = np.bincount(own[found], minlength=num_classes)
                if answers:
                    answers[i][:] = found

    with nullcontext() if fused else _one_torch_thread():
        run_blocks(work, len(rows), threads=threads)
    if right is not None:
        right.extend(answers)
    return result


def _one_torch_thread() -> AbstractContextManager[None]:
    from fedtl.clients.batched import one_torch_thread  # imports torch

    return one_torch_thread()


def _dealt(flat: npt.NDArray[np.bool_], answers: Sequence[npt.NDArray[np.bool_]]) -> None:
    """Copies what lies head after head to each head's own array."""
    place = 0
    for answer in answers:
        answer[:] = flat[place : place + len(answer)]
        place += len(answer)

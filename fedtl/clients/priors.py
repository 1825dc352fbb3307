"""What a client's own class frequencies are used for: in its training, and in its predictions.

pi_kc = (n_kc + 1) / (n_k + C) over the client's training rows, so that no class is impossible.

- Balanced softmax, Ren et al. 2020 (arXiv 2007.10740), equation 4: training on the scores
  z + tau log pi_k. The offset explains the client's frequencies, and the head that all share learns
  what is left: that of balanced classes. Local training with an offset in the loss is the same as
  without one from a bias that is shifted by it and shifted back in the end; weight decay pulls at
  the bias itself, so its pull on the shift is taken off by a correction.
- Logit adjustment, Menon et al. 2021 (2007.07314), section 4.1, read from balanced to skewed: at
  home the shared head predicts with z + tau log pi_k.
- BBSE, Lipton, Wang and Smola 2018 (1802.03916), algorithm 1: with the shares C of (predicted,
  true) class over everybody's training rows and those q of the client's predictions of its tests,
  whose labels it does not look at, w = C^-1 q are its classes' frequencies over everybody's, at
  least 0. It predicts with w p, that is z + log w, with w at least LEAST.

Deviations: everybody's training rows stand for BBSE's held-out set, as nobody has another; a head
that fits them better than its tests makes it trust predictions too much.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedtl.clients.blocks import labels_of, one_blas_thread, run_blocks
from fedtl.clients.neighbours import ROWS, shared_view
from fedtl.errors import InputError
from fedtl.plans import Personal, RoundPlan
from fedtl.types import ClientUpdates, Float32, Float64, Head, Int64, Population

MOST_CONDITION = 100.0
"""Beyond it C's inverse makes noise of q into weights."""

LEAST = 1e-3
"""The least weight of a class in predictions: a class that was not seen may still come."""


def log_prior(population: Population, client: int, num_classes: int) -> Float64:
    """log pi_k of a client, float64 [C]; raises InputError for a label outside the classes."""
    labels = labels_of(population, client, population.train.of(client), num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    return np.asarray(np.log((counts + 1) / (len(labels) + num_classes)))


def prior_offsets(
    population: Population, clients: Int64, num_classes: int, strength: float
) -> Float32:
    """tau log pi_k, less its largest entry, float32 [k, C]: a constant changes no softmax, and
    equal frequencies have exactly no offset."""
    logs = [log_prior(population, client, num_classes) for client in clients.tolist()]
    offsets = strength * np.array(logs).reshape(len(clients), num_classes)
    return np.asarray(offsets - offsets.max(axis=1, keepdims=True, initial=-np.inf), np.float32)


def with_prior(
    population: Population,
    starts: Head,
    plan: RoundPlan,
    train: Callable[[Head, RoundPlan], ClientUpdates],
) -> ClientUpdates:
    """Local training that has the plan's prior in its loss.

    Args:
        starts: name -> [1 or k, ...].
        plan: its ``training.prior_strength`` is tau, above 0.
        train: local training without, from starts [k, ...].
    """
    own, count = plan.training, len(plan.clients)
    num_classes = starts["bias"].shape[1]
    offsets = prior_offsets(population, plan.clients, num_classes, own.prior_strength)
    before = {n: np.broadcast_to(t, (count, *t.shape[1:])) for n, t in starts.items()}
    if own.weight_decay:
        corrections = dict(plan.corrections) or {
            n: np.broadcast_to(np.float32(0), t.shape) for n, t in before.items()
        }
        corrections["bias"] = corrections["bias"] - np.float32(own.weight_decay) * offsets
        plan = replace(plan, corrections=corrections)
    updates = train({**before, "bias": before["bias"] + offsets}, plan)
    trained = own.layers != "hidden"  # else the bias stays as it is, bit for bit
    after = updates.tensors["bias"] - offsets if trained else before["bias"].copy()
    return replace(updates, tensors={**updates.tensors, "bias": after})


def informed(population: Population, head: Head, personal: Personal, threads: int) -> Personal:
    """What clients make of the last head, with what they need to know of everybody's predictions.

    Raises:
        InputError: BBSE's confusion matrix cannot be inverted well.
    """
    if personal.method != "bbse":
        return personal
    found = confusion(population, head, threads)
    condition = float(np.linalg.cond(found))
    if not condition <= MOST_CONDITION:
        raise InputError(
            "BBSE inverts the shared head's confusion matrix, and this one is too near to none "
            "that can be inverted: classes are hardly told apart, or hardly there",
            where="adaptation.prior",
            got=f"condition number {condition:.3g}",
            allowed=f"at most {MOST_CONDITION:g}",
            do='Set adaptation.prior = "logit_adjustment" or "balanced_softmax"',
        )
    return replace(personal, choices=tuple(found.ravel().tolist()))


def confusion(population: Population, head: Head, threads: int = 1) -> Float64:
    """Shares of (predicted, true) class over everybody's training rows, [C, C], summing to 1."""
    num_classes = len(head["bias"])
    counts, lock = np.zeros((num_classes, num_classes), np.int64), threading.Lock()

    def work(first: int, stop: int) -> None:
        for client in range(first, stop):
            rows = population.train.of(client)
            labels = labels_of(population, client, rows, num_classes)
            found = predicted(population, head, rows)
            with lock:  # whole numbers: their order does not matter
                np.add.at(counts, (found, labels), 1)

    with one_blas_thread():
        run_blocks(work, population.num_clients, threads=threads)
    return np.asarray(counts / max(1, counts.sum()))


def predicted(population: Population, head: Head, rows: Int64) -> Int64:
    """The class of the largest score of some rows, int64 [n]."""
    parts = [
        shared_view(population, head, rows[low : low + ROWS])[1].argmax(axis=1)
        for low in range(0, len(rows), ROWS)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def shift_weights(confusion: Float64, shares: Float64) -> Float64:
    """BBSE's w >= 0: how often each class is at a client, over how often it is everywhere.

    Args:
        confusion: C, [C, C], as ``confusion`` gives it.
        shares: q, of the client's predictions, [C].
    """
    return np.asarray(np.maximum(np.linalg.solve(confusion, shares), 0.0))


def shifted_heads(population: Population, head: Head, plan: RoundPlan) -> dict[str, Float32]:
    """BBSE's heads, name -> [k, ...]; without tests a client keeps the shared one.

    Raises:
        InputError: the plan has no confusion matrix for this head.
    """
    assert plan.personal is not None
    num_classes = len(head["bias"])
    known = np.array(plan.personal.choices)
    if known.size != num_classes**2:
        raise InputError("BBSE needs everybody's confusion matrix", got=f"{known.size} numbers")
    heads = {n: np.repeat(t[None], len(plan.clients), axis=0) for n, t in head.items()}
    with one_blas_thread():
        for i, client in enumerate(plan.clients.tolist()):
            seen = predicted(population, head, population.test.of(client))
            if len(seen):
                shares = np.bincount(seen, minlength=num_classes) / len(seen)
                weights = shift_weights(known.reshape(num_classes, num_classes), shares)
                shift = np.log(np.maximum(weights, LEAST))
                heads["bias"][i] = (head["bias"] + shift).astype(np.float32)
    return heads

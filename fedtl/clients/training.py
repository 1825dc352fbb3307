"""Local training of a cohort: the one entry for every engine.

A linear head on the CPU goes to the fused kernel, everything else to the batched torch path. Both
are FedAvg's ClientUpdate (McMahan et al. 2017, algorithm 1) with momentum, weight decay,
FedProx's proximal term (Li et al. 2020, equation 2) and a correction of each client's own:

    step <- momentum * step + gradient + correction + decay * w + proximal * (w - start)

(as torch.optim.SGD, step is 0 before the first), and use batches in the same order. Balanced
softmax, where a plan asks for it, is a shift of the start (``priors``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from fedtl.clients.blocks import block_rows, frozen, label_error, readable, run_blocks
from fedtl.errors import InputError
from fedtl.plans import RoundPlan
from fedtl.types import TAIL, ClientUpdates, Float32, Head, LocalTraining, Population

LINEAR = frozenset({"weight", "bias"})


def train_clients(
    population: Population,
    head: Head,
    plan: RoundPlan,
    *,
    threads: int = 1,
    device: str = "cpu",
    block_size: int | None = None,
    initial: Mapping[str, Float32] | None = None,
) -> ClientUpdates:
    """Train every client of the plan on its own rows.

    Args:
        population: the clients' data; ``features`` may be float32 or float16, memory-mapped,
            read-only.
        head: where all clients start (linear, or MLP with ``hidden.<i>``).
        plan: who trains, in which batch order, with which hyper-parameters and corrections, and
            what they report besides.
        threads: CPU threads; the result does not depend on it.
        device: "cpu" or a torch device such as "cuda".
        block_size: clients in one call of the kernel; the result does not depend on it.
        initial: name -> [k, ...], a start of its own for each client instead of ``head``.

    Returns:
        One update per planned client. A client without training rows returns its start, with
        ``num_examples`` 0 and loss NaN. A NaN among the features or weights survives to the result.

    Raises:
        InputError: shapes, ids or hyper-parameters that do not fit together.
    """
    check_plan(population, plan)
    starts = check_heads(population, head, initial, len(plan.clients))
    if plan.corrections:
        check_stacked(plan.corrections, head, len(plan.clients), "the plan's corrections")
    train = partial(_trained, population, threads=threads, device=device, block_size=block_size)
    if plan.training.prior_strength:
        from fedtl.clients.priors import with_prior

        updates = with_prior(population, starts, plan, train)
    else:
        updates = train(starts, plan)
    return _reported(updates, population, head, plan, threads, device) if plan.reports else updates


def _trained(
    population: Population,
    starts: Head,
    plan: RoundPlan,
    *,
    threads: int,
    device: str,
    block_size: int | None,
) -> ClientUpdates:
    """Plain local training from starts [1 or k, ...]."""
    from fedtl.clients.autograd import needs_autograd, train_autograd

    if needs_autograd(starts, plan.training):
        return train_autograd(population, starts, plan, threads=threads, device=device)
    if set(starts) == LINEAR and device == "cpu":
        return _train_linear(population, starts, plan, threads, block_size)
    from fedtl.clients.batched import train_batched

    return train_batched(population, starts, plan, threads=threads, device=device)


def _reported(
    updates: ClientUpdates,
    population: Population,
    head: Head,
    plan: RoundPlan,
    threads: int,
    device: str,
) -> ClientUpdates:
    """The updates with what the plan has clients say of the round's head besides."""
    if "start_gradient" in plan.reports:
        from fedtl.clients.gradients import gradients

        own = gradients(population, head, plan, threads=threads).tensors
        more = {f"start_gradient.{name}": own[name].astype(np.float32) for name in head}
        updates = replace(updates, tensors={**updates.tensors, **more})
    if "start_loss" in plan.reports:
        from fedtl.clients.evaluation import evaluate_clients

        judged = evaluate_clients(
            population, head, plan.clients, split="train", threads=threads, device=device
        )
        with np.errstate(invalid="ignore"):  # no rows: NaN
            updates = replace(updates, loss=judged.loss_sum / updates.num_examples)
    return updates


def _train_linear(
    population: Population, starts: Head, plan: RoundPlan, threads: int, block_size: int | None
) -> ClientUpdates:
    from fedtl.clients.kernel import EVERYTHING_FINE, train_block

    clients, own = plan.clients, plan.training
    num, (num_classes, width) = len(clients), starts["weight"].shape[1:]
    weights, biases = (frozen(starts[name], np.float32) for name in ("weight", "bias"))
    extra = plan.corrections or {name: starts[name][:0] for name in starts}
    extra_weights, extra_biases = (frozen(extra[name], np.float32) for name in ("weight", "bias"))
    keys = np.ascontiguousarray(plan.batch_keys, dtype=np.uint64)
    out_weights = np.empty((num, num_classes, width), dtype=np.float32)
    out_biases = np.empty((num, num_classes), dtype=np.float32)
    loss = np.empty(num, dtype=np.float64)
    epochs = own.epochs if own.layers != "hidden" else 0  # it has none
    with np.errstate(over="ignore"):  # a rate beyond float32 is infinite, its update is refused
        rate, momentum, decay, proximal = (
            np.float32(value)
            for value in (own.learning_rate, own.momentum, own.weight_decay, own.proximal)
        )

    def work(first: int, stop: int) -> None:
        rows = block_rows(
            population.features,
            population.labels,
            [population.train.of(client) for client in clients[first:stop].tolist()],
        )
        part = slice(first, stop) if len(weights) > 1 else slice(None)
        bad = train_block(
            rows.features, rows.halves, rows.labels, rows.index, rows.starts, rows.stops,
            weights[part], biases[part],
            extra_weights[first:stop], extra_biases[first:stop], keys[first:stop],
            epochs, own.batch_size, rate, momentum, decay, proximal,
            out_weights[first:stop], out_biases[first:stop], loss[first:stop],
        )  # fmt: skip
        if bad != EVERYTHING_FINE:
            raise label_error(population, int(clients[first + bad]), num_classes)

    if not readable(population.features):
        block_size = 1  # copied rows: of one client a thread
    run_blocks(work, num, threads=threads, block_size=block_size)
    return ClientUpdates(
        round=plan.round,
        clients=clients,
        tensors={"weight": out_weights, "bias": out_biases},
        num_examples=population.train.counts[clients],
        loss=loss,
    )


def check_plan(population: Population, plan: RoundPlan) -> None:
    """Raise InputError for a plan that this population cannot carry out."""
    check_clients(population, plan.clients)
    if len(plan.batch_keys) != len(plan.clients):
        raise InputError(
            "a plan needs one batch key per client",
            where=f"round {plan.round}",
            got=len(plan.batch_keys),
            allowed=len(plan.clients),
        )
    _check_training(plan.training)


def _check_training(training: LocalTraining) -> None:
    for name, least in (("epochs", 0), ("batch_size", 1)):
        if getattr(training, name) < least:
            raise InputError(
                f"training.{name} must be at least {least}", got=getattr(training, name)
            )


def check_clients(population: Population, clients: np.typing.NDArray[np.int64]) -> None:
    """Raise InputError for client ids that the population does not have."""
    if len(clients) and (clients.min() < 0 or clients.max() >= population.num_clients):
        raise InputError(
            "unknown client id",
            got=f"{clients.min()} to {clients.max()}",
            allowed=f"0 to {population.num_clients - 1}",
        )


def check_heads(
    population: Population, head: Head, initial: Head | None, num_clients: int
) -> dict[str, Float32]:
    """The starts as name -> [1 or k, ...], once every shape is known to fit.

    Raises:
        InputError: a head that does not fit the features, or an ``initial`` that does not fit it.
    """
    width = population.width
    firsts = ("fourier.weight", "hidden.0.weight", "weight")
    first = next(head[name] for name in firsts if name in head)
    if first.ndim != 2 or first.shape[1] != width:
        raise InputError(
            "the head does not fit the features",
            got=f"shape {first.shape}",
            allowed=f"[C, {width}]",
        )
    check_tail(population, head)
    if initial is None:
        return {name: np.asarray(tensor)[None] for name, tensor in head.items()}
    check_stacked(initial, head, num_clients, "the clients' own starts")
    return {name: initial[name] for name in head}


def check_tail(population: Population, head: Head) -> None:
    """Raise InputError for tensors that are not those behind this population's cut."""
    tail = population.tail
    own = {} if tail is None else {n: tail.tensors[n].shape for n in tail.recipe["trained"]}
    given = {n[len(TAIL) :]: head[n].shape for n in head if n.startswith(TAIL)}
    if given != own:
        odd = sorted(name for name in {*given, *own} if given.get(name) != own.get(name))
        raise InputError(
            "the head does not fit the network behind the cut",
            got=", ".join(f"{name}: {given.get(name)}" for name in odd[:3]),
            allowed=", ".join(f"{name}: {own.get(name)}" for name in odd[:3]),
        )


def check_stacked(given: Mapping[str, Float32], head: Head, num_clients: int, what: str) -> None:
    """Raise InputError unless ``given`` has a tensor [k, ...] for each of the head's."""
    for name, tensor in head.items():
        allowed = (num_clients, *tensor.shape)
        if name not in given or given[name].shape != allowed:
            raise InputError(
                f"{what} lack a fitting {name!r}",
                got=given[name].shape if name in given else None,
                allowed=allowed,
            )

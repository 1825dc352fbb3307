"""What a client can be asked to do in a round: the one entry for every engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.training import train_clients
from fedtl.plans import RoundPlan
from fedtl.types import MERGED, ClientUpdates, Head, Population


def do_task(
    population: Population,
    head: Head,
    plan: RoundPlan,
    *,
    threads: int = 1,
    device: str = "cpu",
    block_size: int | None = None,
    store: PersonalStore | None = None,
    secure: bool = False,
) -> ClientUpdates:
    """Have the plan's clients train, or give a gradient or statistics, each on its own rows.

    Args:
        population, threads, device, block_size: see ``train_clients``.
        head: the round's.
        plan: who does what.
        store: what the clients keep from round to round; only some plans need one.
        secure: noise is the operating system's, as these are real data; else of the plan's keys.

    Returns:
        The tensors that ``plan.reply(head)`` names, protected as the plan has it.

    Raises:
        InputError: shapes, ids or hyper-parameters that do not fit together, or a plan that
            needs a store where there is none.
        EnvironmentFault: what a client keeps cannot be read or written.
    """
    if plan.task == "gradient":
        from fedtl.clients.gradients import gradients

        return gradients(population, head, plan, threads=threads)
    plain = plan  # what is computed, before it is put into a ring
    if plan.protection is not None and plan.protection.ring_bits:
        plain = replace(plan, protection=replace(plan.protection, ring_bits=0))
    if plan.task == "statistics":
        from fedtl.clients.statistics import statistics

        updates = statistics(population, head, plain, threads=threads, secure=secure)
        return _protected(updates, head, plan, store, population, threads, secure)
    train: Callable[..., ClientUpdates] = train_clients
    if plan.personal is not None:
        from fedtl.clients.personal_training import train_personal

        train = partial(train_personal, store=store)
    if plan.protection is not None and plan.protection.example_clip > 0:  # DP-SGD
        from fedtl.clients.private_training import train_private

        train = partial(train_private, secure=secure)
    updates = train(population, head, plain, threads=threads, device=device, block_size=block_size)
    if any(name.endswith(MERGED) for name in head):
        kept = {n: own for n, own in updates.tensors.items() if not n.endswith(MERGED)}
        updates = replace(updates, tensors=kept)
    sent = {name: tensor for name, tensor in head.items() if name in updates.tensors}
    return _protected(updates, sent, plan, store, population, threads, secure)


def _protected(
    updates: ClientUpdates,
    sent: Head,
    plan: RoundPlan,
    store: PersonalStore | None,
    population: Population,
    threads: int,
    secure: bool,
) -> ClientUpdates:
    """The answers as they leave; as they are where nothing is protected or packed."""
    if plan.protection is None and plan.compression is None:
        return updates
    from fedtl.clients.protection import protect

    names = population.names
    return protect(updates, sent, plan, store, names, threads=threads, secure=secure)

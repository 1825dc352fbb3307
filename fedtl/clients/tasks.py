"""What a client can be asked to do in a round: the one entry for every engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fedtl.clients.personal_store import PersonalStore
from fedtl.clients.training import train_clients
from fedtl.plans import RoundPlan
from fedtl.types import ClientUpdates, Head, Population


def do_task(
    population: Population,
    head: Head,
    plan: RoundPlan,
    *,
    threads: int = 1,
    device: str = "cpu",
    block_size: int | None = None,
    store: PersonalStore | None = None,
) -> ClientUpdates:
    """Have the plan's clients train, or give a gradient or statistics, each on its own rows.

    Args:
        population, threads, device, block_size: see ``train_clients``.
        head: the round's.
        plan: who does what.
        store: what the clients keep from round to round; only some plans need one.

    Returns:
        The tensors that ``plan.reply(head)`` names.

    Raises:
        InputError: shapes, ids or hyper-parameters that do not fit together, or a plan that
            needs a store where there is none.
        EnvironmentFault: what a client keeps cannot be read or written.
    """
    if plan.task == "gradient":
        from fedtl.clients.gradients import gradients

        return gradients(population, head, plan, threads=threads)
    if plan.task == "statistics":
        from fedtl.clients.statistics import statistics

        return statistics(population, head, plan, threads=threads)
    train: Callable[..., ClientUpdates] = train_clients
    if plan.personal is not None:
        from fedtl.clients.personal_training import train_personal

        train = partial(train_personal, store=store)
    updates = train(population, head, plan, threads=threads, device=device, block_size=block_size)
    if plan.compression is None:
        return updates
    from fedtl.clients.compression import compress

    sent = {name: tensor for name, tensor in head.items() if name in updates.tensors}
    return compress(updates, sent, plan, store, population.names)

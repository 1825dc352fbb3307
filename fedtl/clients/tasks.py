"""What a client can be asked to do in a round: the one entry for every engine."""

from __future__ import annotations

from fedtl.clients.training import train_clients
from fedtl.types import ClientUpdates, Head, Population, RoundPlan


def do_task(
    population: Population,
    head: Head,
    plan: RoundPlan,
    *,
    threads: int = 1,
    device: str = "cpu",
    block_size: int | None = None,
) -> ClientUpdates:
    """Have the plan's clients train, or give a gradient or statistics, each on its own rows.

    Args:
        population, threads, device, block_size: see ``train_clients``.
        head: the round's.
        plan: who does what.

    Returns:
        The tensors that ``plan.reply(head)`` names.

    Raises:
        InputError: shapes, ids or hyper-parameters that do not fit together.
    """
    if plan.task == "gradient":
        from fedtl.clients.gradients import gradients

        return gradients(population, head, plan, threads=threads)
    if plan.task == "statistics":
        from fedtl.clients.statistics import statistics

        return statistics(population, head, plan, threads=threads)
    return train_clients(
        population, head, plan, threads=threads, device=device, block_size=block_size
    )

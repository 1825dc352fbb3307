"""The pooled optimum: the head that training on everybody's examples together would give.

With a frozen trunk and a linear head the problem is convex, so there is one right answer and a
full-batch quasi-Newton method (L-BFGS, Liu and Nocedal 1989) finds it; an MLP head gets the same
method and reaches a local optimum. What stands behind a cut is trained as the clients train it: by
the scenario's steps, as if one client held all examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedtl import seeding
from fedtl.clients.training import train_clients
from fedtl.plans import RoundPlan
from fedtl.types import Head, Int64, LocalTraining, Population, Rows

TOLERANCE = 1e-4
"""Largest entry of the gradient (of the mean loss) at which training counts as converged."""

MAX_EVALUATIONS = 300
"""Without weight decay separable data have no finite optimum; the search ends here then."""

MAX_RESIDENT_BYTES = 2**29
"""Training rows are gathered once if they fit in this, else in chunks at every evaluation."""


@dataclass(frozen=True)
class PooledFit:
    """The head and how far the fit came."""

    head: Head
    loss: float
    gradient: float
    evaluations: int

    @property
    def converged(self) -> bool:
        """Whether the gradient fell below the tolerance."""
        return self.gradient <= TOLERANCE


def fit_pooled(
    population: Population,
    head: Head,
    rows: Int64,
    weight_decay: float,
    device: str = "cpu",
    check: Callable[[], None] = lambda: None,
) -> PooledFit:
    """Train one head on all given rows to convergence, on one thread: the same bits everywhere.

    Args:
        population: features and labels.
        head: where to start; decides the kind of head.
        rows: int64 [n], the training rows, every client's together.
        weight_decay: the clients' own, so that both minimise the same objective:
            mean cross-entropy + weight_decay / 2 * |w|^2.
        check: called at each evaluation; may raise to stop.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from fedtl.clients.batched import forward, one_torch_thread

    tensors = {
        name: torch.tensor(value, device=device, requires_grad=True) for name, value in head.items()
    }
    width = population.features.shape[1]
    chunk = max(1, MAX_RESIDENT_BYTES // (4 * width))
    parts = [rows[i : i + chunk] for i in range(0, len(rows), chunk)]
    labels = [
        torch.tensor(population.labels[part].astype(np.int64), device=device) for part in parts
    ]

    def load(part: Int64) -> torch.Tensor:
        gathered = np.ascontiguousarray(population.features[part], np.float32)
        return torch.from_numpy(gathered).to(device)

    resident = [load(parts[0])] if len(parts) == 1 else None
    optimizer = torch.optim.LBFGS(
        list(tensors.values()),
        max_iter=MAX_EVALUATIONS,
        max_eval=MAX_EVALUATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-9,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0
    last = float("nan")

    def objective() -> torch.Tensor:
        nonlocal evaluations, last
        check()
        optimizer.zero_grad()
        total = 0.0
        for i, part in enumerate(parts):
            x = resident[i] if resident is not None else load(part)
            loss = cross_entropy(forward(tensors, x), labels[i], reduction="sum") / len(rows)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if weight_decay > 0:
            squares = torch.stack([t.square().sum() for t in tensors.values()])
            penalty = weight_decay / 2 * squares.sum()
            penalty.backward()  # type: ignore[no-untyped-call]
            total += float(penalty.detach())
        evaluations += 1
        last = total
        return torch.tensor(total)

    with one_torch_thread():
        optimizer.step(objective)  # type: ignore[no-untyped-call]
        objective()
    gradient = max(float(t.grad.abs().max()) for t in tensors.values() if t.grad is not None)
    fitted = {name: t.detach().cpu().numpy().astype(np.float32) for name, t in tensors.items()}
    return PooledFit(fitted, last, gradient, evaluations)


def train_pooled(
    population: Population,
    head: Head,
    trainings: Sequence[LocalTraining],
    seed: int,
    *,
    device: str = "cpu",
    check: Callable[[], None] = lambda: None,
) -> tuple[Head, float]:
    """Train one head, and what is before it, by SGD on everybody's training rows together.

    Args:
        trainings: what a client does in each round, its learning rate on schedule.
        seed: of the batch order.
        check: called before each round; may raise to stop.

    Returns:
        The head after the last round, and the mean loss of the last round's first epoch in nats.
    """
    rows = np.sort(population.train.index)
    together = replace(
        population,
        train=Rows(rows, np.array([0, len(rows)])),
        test=Rows(rows[:0], np.zeros(2, np.int64)),
        names=("everybody",),
        domains=("",),
    )
    one, loss = np.zeros(1, np.int64), float("nan")
    for round, training in enumerate(trainings, 1):
        check()
        keys = seeding.client_keys(seed, "centralised", round, one)
        plan = RoundPlan(round, one, keys, training)
        updates = train_clients(together, head, plan, device=device)
        head = {name: tensor[0] for name, tensor in updates.tensors.items()}
        loss = float(updates.loss[0])
    return head, loss

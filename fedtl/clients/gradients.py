"""Each client's full gradient: of its mean cross-entropy over all its training rows, in float64.

Summed by the server with the clients' weights these are the gradient of the pooled loss itself, to
rounding, however the rows are split among clients; weight decay is the strategy's to add. A client
is worked on alone, in blocks of rows of fixed size, with one thread for each product: its bits
depend on its rows and the head alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.clients.blocks import check_rows, labels_of, one_blas_thread, run_blocks
from fedtl.clients.training import LINEAR, check_clients, check_heads
from fedtl.plans import RoundPlan
from fedtl.types import ClientUpdates, Float64, Head, Int32, Population

ROWS = 512
"""Rows widened to float64 at once: 5 MB of 1,280 features."""

Real = dict[str, Float64]


def gradients(
    population: Population, head: Head, plan: RoundPlan, *, threads: int = 1
) -> ClientUpdates:
    """The gradient of each planned client's mean cross-entropy at ``head``.

    Args:
        population: the clients' data; ``features`` may be float32 or float16, memory-mapped.
        head: linear, or MLP with ``hidden.<i>``.
        plan: who is asked; nothing else of it counts.
        threads: clients worked on at once; the result does not depend on it.

    Returns:
        ``tensors`` name -> float64 [k, ...] and ``loss``, the mean over all rows, float64 [k]. A
        client without rows gives zeros and NaN.

    Raises:
        InputError: shapes, ids or labels that do not fit together.
    """
    clients = plan.clients
    check_clients(population, clients)
    check_heads(population, head, None, len(clients))
    point = {name: np.asarray(tensor, np.float64) for name, tensor in head.items()}
    summed = {name: np.zeros((len(clients), *tensor.shape)) for name, tensor in head.items()}
    loss, counts = np.zeros(len(clients)), population.train.counts[clients]
    add, held = _add_linear, one_blas_thread()
    if set(head) != LINEAR:
        from fedtl.clients.batched import one_torch_thread

        add, held = _add_deep, one_torch_thread()

    def work(first: int, stop: int) -> None:
        for i in range(first, stop):
            own = {name: tensor[i] for name, tensor in summed.items()}
            loss[i] = _sum_client(population, int(clients[i]), point, own, add)

    with held:
        run_blocks(work, len(clients), threads=threads)
    with np.errstate(invalid="ignore"):  # no rows: NaN
        mean = loss / counts
    for tensor in summed.values():
        tensor /= np.maximum(counts, 1).reshape(-1, *[1] * (tensor.ndim - 1))
    return ClientUpdates(plan.round, clients, summed, counts, mean)


def _sum_client(population: Population, client: int, point: Real, out: Real, add: Any) -> float:
    """Add a client's summed gradient to ``out``; returns its summed loss."""
    rows, num_classes = population.train.of(client), len(point["bias"])
    loss = 0.0
    for low in range(0, len(rows), ROWS):
        part = rows[low : low + ROWS]
        check_rows(part, population.features)
        labels = labels_of(population, client, part, num_classes)
        loss += add(population.features[part].astype(np.float64), labels, point, out)
    return loss


def _add_linear(x: npt.NDArray[np.float64], labels: Int32, point: Real, out: Real) -> float:
    scores = x @ point["weight"].T + point["bias"]
    scores -= scores.max(axis=1, keepdims=True)
    places = np.arange(len(labels)), labels
    loss = -scores[places].sum()
    residuals = np.exp(scores, out=scores)
    total = residuals.sum(axis=1, keepdims=True)
    loss += np.log(total).sum()
    residuals /= total
    residuals[places] -= 1
    out["weight"] += residuals.T @ x
    out["bias"] += residuals.sum(axis=0)
    return float(loss)


def _add_deep(x: npt.NDArray[np.float64], labels: Int32, point: Real, out: Real) -> float:
    import torch

    from fedtl.clients.batched import forward

    torch.set_num_threads(1)
    head = {name: torch.tensor(tensor, requires_grad=True) for name, tensor in point.items()}
    truth = torch.from_numpy(labels.astype(np.int64))
    loss = torch.nn.functional.cross_entropy(
        forward(head, torch.from_numpy(x)), truth, reduction="sum"
    )
    for name, own in zip(head, torch.autograd.grad(loss, list(head.values())), strict=True):
        out[name] += own.numpy()
    return float(loss.detach())

"""Local training by torch's autograd, one client after the other: networks behind the cut, and
what the fused and batched ways do not know (label smoothing, mixup, dropout, noise, validation).

Batches come in the order that every way uses, and a client's bits depend on nobody else: one torch
thread, and all that is random from the client's own key of the round. Every step is

    step <- momentum * step + gradient + correction + decay * w + proximal * (w - start)
            + l2_pretrained * (w - w_pretrained)        (the last behind the cut only)
    w <- w - rate * step                                (rate * tail_rate behind the cut)

Sources: label smoothing, Szegedy et al. 2016; mixup, Zhang et al. 2018, here on activations at the
cut (manifold mixup, Verma et al. 2019, at that one layer); L2-SP, Li et al. 2018 (1802.01483).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtl.clients.batches import batch_order
from fedtl.clients.blocks import labels_of, run_blocks
from fedtl.clients.networks import Network, network, scores
from fedtl.plans import RoundPlan
from fedtl.types import TAIL, ClientUpdates, Float32, Head, Int64, LocalTraining, Population

if TYPE_CHECKING:
    import torch


STATISTICS = (".running_mean", ".running_var")
"""How names of batch norm's running statistics end: averaged like all else, but not by steps."""


def needs_autograd(head: Mapping[str, Any], training: LocalTraining) -> bool:
    """Whether a head, or the way it is to be trained, is only known here."""
    special = (
        training.label_smoothing, training.mixup, training.dropout, training.noise,
        training.validation_fraction,
    )  # fmt: skip
    return any(special) or any(name.startswith(TAIL) for name in head)


def train_autograd(
    population: Population, starts: Head, plan: RoundPlan, *, threads: int, device: str
) -> ClientUpdates:
    """Train every client of the plan from starts [1 or k, ...]; see ``train_clients``."""
    import torch

    from fedtl.clients.batched import checked_device, one_torch_thread

    checked_device(device)
    num = len(plan.clients)
    out = {name: np.empty((num, *own.shape[1:]), np.float32) for name, own in starts.items()}
    loss = np.full(num, np.nan)

    def work(first: int, stop: int) -> None:
        torch.set_num_threads(1)
        with network(population.tail, training=True) as through:
            for place in range(first, stop):
                client = _Client(population, plan, place, through, device)
                start = {name: own[place if len(own) > 1 else 0] for name, own in starts.items()}
                trained, loss[place] = client.train(start)
                for name, own in trained.items():
                    out[name][place] = own

    with one_torch_thread():
        run_blocks(work, num, threads=threads if device == "cpu" else 1, block_size=1)
    counts = population.train.counts[plan.clients]
    return ClientUpdates(plan.round, plan.clients, out, counts, loss)


@dataclass
class _Client:
    """One client's part in a round."""

    population: Population
    plan: RoundPlan
    place: int
    through: Network
    device: str

    def train(self, start: Head) -> tuple[dict[str, Float32], float]:
        """The tensors after training, and the mean loss of the first epoch's batches."""
        import torch

        own, population = self.plan.training, self.population
        client = int(self.plan.clients[self.place])
        rows = population.train.of(client)
        labels_of(population, client, rows, len(start["bias"]))
        values = {name: torch.tensor(t, device=self.device) for name, t in start.items()}
        begin = {name: value.clone() for name, value in values.items()}
        names = [name for name in values if self._trained(name)]
        speed = {name: torch.zeros_like(values[name]) for name in names}
        extra = {
            name: torch.tensor(tensor[self.place], device=self.device)
            for name, tensor in self.plan.corrections.items()
        }
        summed, key = 0.0, int(self.plan.batch_keys[self.place])
        for epoch in range(own.epochs):
            order = rows[batch_order(key, len(rows), epoch)]
            for low in range(0, len(order), own.batch_size):
                batch = order[low : low + own.batch_size]
                loss, gradients = self._gradients(values, names, batch)
                if epoch == 0:
                    summed += loss * len(batch)
                for name, gradient in zip(names, gradients, strict=True):
                    step = gradient + extra[name] if extra else gradient
                    values[name] = self._moved(name, values[name], step, begin[name], speed)
        tensors = {name: value.detach().cpu().numpy() for name, value in values.items()}
        return tensors, summed / len(rows) if own.epochs and len(rows) else float("nan")

    def _trained(self, name: str) -> bool:
        """Whether steps move it; running statistics move by themselves."""
        if name.endswith(STATISTICS):
            return False
        own = self.plan.training
        last = name in ("weight", "bias")
        if own.layers != "all" and (own.layers == "last") != last:
            return False
        return not name.startswith(own.still) if own.still else True

    def _gradients(
        self, values: dict[str, torch.Tensor], names: list[str], batch: Int64
    ) -> tuple[float, tuple[torch.Tensor, ...]]:
        import torch

        population = self.population
        x = torch.from_numpy(population.features[batch].astype(np.float32)).to(self.device)
        labels = torch.from_numpy(population.labels[batch].astype(np.int64)).to(self.device)
        leaves = {name: values[name].detach().requires_grad_() for name in names}
        found = scores({**values, **leaves}, x, self.through)
        loss = torch.nn.functional.cross_entropy(found, labels)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return float(loss.detach()), gradients

    def _moved(
        self,
        name: str,
        value: torch.Tensor,
        step: torch.Tensor,
        begin: torch.Tensor,
        speed: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """The tensor after one step of torch.optim.SGD."""
        own, rate = self.plan.training, self.plan.training.learning_rate
        if own.weight_decay:
            step = step + own.weight_decay * value
        if own.proximal:
            step = step + own.proximal * (value - begin)
        if name.startswith(TAIL):
            rate *= own.tail_rate
            if own.l2_pretrained:
                step = step + own.l2_pretrained * (value - self._pretrained(name))
        if own.momentum:
            step = own.momentum * speed[name] + step
            speed[name] = step
        return value - rate * step

    def _pretrained(self, name: str) -> torch.Tensor:
        import torch

        assert self.population.tail is not None
        return torch.tensor(self.population.tail.tensors[name[len(TAIL) :]], device=self.device)

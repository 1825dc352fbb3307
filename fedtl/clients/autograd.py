"""Local training by torch's autograd, one client after the other: networks behind the cut, cosine
and prototype heads, and all of ``clients.regularisation``.

Batches come in the order that every way uses, and a client's bits depend on nobody else: one torch
thread, and all that is random from the client's own key of the round. Every step is

    step <- momentum * step + gradient + correction + decay * w + proximal * (w - start)
            + l2_pretrained * (w - w_pretrained)        (the last behind the cut only)
    w <- w - rate * step                                (rate * tail_rate behind the cut)

Sources: label smoothing, Szegedy et al. 2016 (arXiv 1512.00567), as torch's cross_entropy has it;
L2-SP, Li et al. 2018 (1802.01483).

Where nothing behind the cut moves in a client's round, its rows pass the network there once, and
the head is trained on what comes of that (``clients.resting``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtl.clients.batched import SCALES
from fedtl.clients.batches import batch_order
from fedtl.clients.blocks import labels_of, run_blocks
from fedtl.clients.networks import JUDGED_THROUGH, Network, network, nothing, scores
from fedtl.clients.regularisation import Best, Chance, divided, spread
from fedtl.clients.resting import rested
from fedtl.plans import RoundPlan
from fedtl.transfer.tails import still_in
from fedtl.types import (
    LAST,
    MERGED,
    TAIL,
    ClientUpdates,
    Float32,
    Head,
    Int64,
    LocalTraining,
    Population,
)

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]

STATISTICS = (".running_mean", ".running_var")
"""How names of batch norm's running statistics end: averaged like all else, but not by steps."""


def needs_autograd(head: Mapping[str, Any], training: LocalTraining) -> bool:
    """Whether a head, or the way it is to be trained, is only known here."""
    special = (
        training.label_smoothing, training.mixup, training.dropout, training.noise,
        training.validation_fraction,
    )  # fmt: skip
    return any(special) or any(name.startswith(TAIL) or name in SCALES for name in head)


def train_autograd(
    population: Population, starts: Head, plan: RoundPlan, *, threads: int, device: str
) -> ClientUpdates:
    """Train every client of the plan from starts [1 or k, ...]; see ``train_clients``."""
    import torch

    from fedtl.clients.batched import checked_device, one_torch_thread

    checked_device(device)
    still = (*plan.training.still, *still_in(population.tail, plan.training.unfrozen))
    plan = replace(plan, training=replace(plan.training, still=still))
    num = len(plan.clients)
    out = {name: np.empty((num, *own.shape[1:]), np.float32) for name, own in starts.items()}
    loss = np.full(num, np.nan)
    watched = population.tail if plan.training.early_stopping else None

    def work(first: int, stop: int) -> None:
        torch.set_num_threads(1)
        moving = network(population.tail, training=True, still=still)
        with moving as through, network(watched) as judging:
            for place in range(first, stop):
                client = _Client(population, plan, place, through, judging, device)
                start = {name: own[place if len(own) > 1 else 0] for name, own in starts.items()}
                trained, loss[place] = client.train(start)
                for name, own in trained.items():
                    out[name][place] = own

    with one_torch_thread():
        run_blocks(work, num, threads=threads if device == "cpu" else 1, block_size=1)
    counts = plan.training.trains_on(population.train.counts[plan.clients])
    return ClientUpdates(plan.round, plan.clients, out, counts, loss)


@dataclass
class _Client:
    """One client's part in a round.

    Attributes:
        through: the network before the head, as it is trained.
        judging: the same as it predicts; used where the client judges its own training.
    """

    population: Population
    plan: RoundPlan
    place: int
    through: Network
    judging: Network
    device: str

    def train(self, start: Head) -> tuple[dict[str, Float32], float]:
        """The tensors after training, and the mean loss of the first epoch's batches."""
        import torch

        own, population = self.plan.training, self.population
        client = int(self.plan.clients[self.place])
        labels_of(population, client, population.train.of(client), len(start["bias"]))
        rows, kept_back = divided(population, client, own)
        key = int(self.plan.batch_keys[self.place])
        chance = Chance(own, key, spread(population, rows if own.noise else rows[:0]))
        values = {name: torch.tensor(t, device=self.device) for name, t in start.items()}
        steps = _Steps(self.plan, self.place, values, self._pretrained(values))
        seen = self
        if steps.names and self._rests(values, steps):
            seen, rows, kept_back = self._on_what_it_makes(values, rows, kept_back)
        whole = not any(name.endswith(STATISTICS) for name in values)
        watched = own.early_stopping and len(kept_back)
        best = None
        if watched:
            begun = {name: value.clone() for name, value in values.items()}
            best = Best(own.early_stopping, seen._loss(values, kept_back), begun)
        summed, epochs = 0.0, own.epochs if steps.names else 0
        for epoch in range(epochs):
            order = rows[batch_order(key, len(rows), epoch)]
            for batch in _batches(order, own.batch_size, alone=whole):
                loss, gradients = seen._gradients(values, steps.names, batch, chance)
                summed += loss * len(batch) if epoch == 0 else 0.0
                steps.take(values, gradients)
            if best is not None and best.over(seen._loss(values, kept_back), values):
                break
        tensors = {n: v.cpu().numpy() for n, v in (best.tensors if best else values).items()}
        return tensors, summed / len(rows) if epochs and len(rows) else float("nan")

    def _rests(self, values: Tensors, steps: _Steps) -> bool:
        """Whether a row gives the head the same in every epoch: nothing behind the cut moves, batch
        norm's statistics neither, and nothing is done to what enters there."""
        own, behind = self.plan.training, [name for name in values if name.startswith(TAIL)]
        moving = set(steps.names)
        moving |= {n for n in behind if n.endswith(STATISTICS) and not n.startswith(own.still)}
        return bool(behind) and not (own.mixup or own.noise or moving & set(behind))

    def _on_what_it_makes(
        self, values: Tensors, rows: Int64, kept_back: Int64
    ) -> tuple[_Client, Int64, Int64]:
        """This client over what its rows give the head, without the network; its rows there."""
        population, tail = self.population, self.population.tail
        assert tail is not None
        parts = [
            rested(tail, values, population.features, part, self.device)
            for part in (rows, kept_back)
        ]
        both = np.concatenate([rows, kept_back])
        plain = replace(
            population,
            features=np.concatenate(parts),
            labels=population.labels[both],
            tail=None,
        )
        places = np.arange(len(both))
        alone = replace(self, population=plain, through=nothing, judging=nothing)
        return alone, places[: len(rows)], places[len(rows) :]

    def _gradients(
        self, values: Tensors, names: list[str], batch: Int64, chance: Chance
    ) -> tuple[float, tuple[torch.Tensor, ...]]:
        """The mean loss of a batch, and its gradient in the named tensors."""
        import torch
        from torch.nn.functional import cross_entropy

        x, labels = self._examples(batch)
        x, mixed, smoothing = chance.noisy(x), labels, self.plan.training.label_smoothing
        share = 1.0
        if self.plan.training.mixup:
            share, partners = chance.partners(len(batch))
            order = torch.from_numpy(partners).to(self.device)
            x, mixed = share * x + (1 - share) * x[order], labels[order]
        leaves = {name: values[name].detach().requires_grad_() for name in names}
        found = scores({**values, **leaves}, x, self.through, chance.dropped)
        loss = cross_entropy(found, labels, label_smoothing=smoothing)
        if self.plan.training.mixup:
            other = cross_entropy(found, mixed, label_smoothing=smoothing)
            loss = share * loss + (1 - share) * other
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        return float(loss.detach()), gradients

    def _examples(self, rows: Int64) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations float32 [n, A] and labels int64 [n] of some rows."""
        import torch

        x = torch.from_numpy(self.population.features[rows].astype(np.float32))
        labels = torch.from_numpy(self.population.labels[rows].astype(np.int64))
        return x.to(self.device), labels.to(self.device)

    def _loss(self, values: Tensors, rows: Int64) -> float:
        """Summed cross-entropy, in nats, of what is predicted for some rows."""
        import torch
        from torch.nn.functional import cross_entropy

        total = 0.0
        with torch.no_grad():
            for low in range(0, len(rows), JUDGED_THROUGH):
                x, labels = self._examples(rows[low : low + JUDGED_THROUGH])
                found = scores(values, x, self.judging)
                total += float(cross_entropy(found.double(), labels, reduction="sum"))
        return total

    def _pretrained(self, values: Tensors) -> Tensors:
        """What tensors behind the cut were before all training, where they are pulled to it."""
        import torch

        if not self.plan.training.l2_pretrained or self.population.tail is None:
            return {}
        known = self.population.tail.tensors
        return {
            name: torch.tensor(known[name[len(TAIL) :]], device=self.device)
            for name in values
            if name.startswith(TAIL)
        }


def _batches(order: Int64, size: int, *, alone: bool) -> list[Int64]:
    """Consecutive slices of the order.

    Args:
        alone: whether a batch may be a single example. Batch norm cannot take its statistics from
            one: it joins the batch before, and where there is none nothing is trained.
    """
    batches = [order[low : low + size] for low in range(0, len(order), size)]
    if alone or not batches or len(batches[-1]) > 1:
        return batches
    return [*batches[:-2], np.concatenate(batches[-2:])] if len(batches) > 1 else []


class _Steps:
    """torch.optim.SGD with all that a plan adds to a gradient; moves tensors in place."""

    def __init__(self, plan: RoundPlan, place: int, values: Tensors, pretrained: Tensors) -> None:
        import torch

        self._own = plan.training
        self.names = [name for name in values if self._trained(name)]
        self._begin = {name: values[name].clone() for name in self.names if self._own.proximal}
        self._speed = {
            name: torch.zeros_like(values[name]) for name in self.names if self._own.momentum
        }
        self._extra = {
            name: torch.tensor(plan.corrections[name][place], device=values[name].device)
            for name in self.names
            if plan.corrections
        }
        self._pretrained = pretrained

    def _trained(self, name: str) -> bool:
        """Whether steps move it; running statistics move by themselves."""
        own = self._own
        if name.endswith((*STATISTICS, MERGED)) or (own.still and name.startswith(own.still)):
            return False
        return own.layers == "all" or (own.layers == "last") == (name in LAST)

    def take(self, values: Tensors, gradients: tuple[torch.Tensor, ...]) -> None:
        """One step, ``gradients`` in the order of ``names``."""
        own = self._own
        for name, step in zip(self.names, gradients, strict=True):
            value, rate = values[name], own.learning_rate
            if self._extra:
                step = step + self._extra[name]
            if own.weight_decay:
                step = step.add(value, alpha=own.weight_decay)
            if own.proximal:
                step = step.add(value - self._begin[name], alpha=own.proximal)
            if name.startswith(TAIL):
                rate *= own.tail_rate
            if name in self._pretrained:
                step = step.add(value - self._pretrained[name], alpha=own.l2_pretrained)
            if own.momentum:
                step = self._speed[name].mul_(own.momentum).add_(step)
            value.add_(step, alpha=-rate)

"""What keeps a client from learning its own few examples by heart, beside weight decay.

All that is random comes from the client's own key of the round, a stream for each purpose (NumPy's
Philox), drawn batch after batch: bits depend on no engine, thread or other client, and switching
one of these on changes nothing that another draws.

Sources: mixup, Zhang et al. 2018 (arXiv 1710.09412), one share for each batch as in the authors'
code, here on activations at the cut (manifold mixup, Verma et al. 2019, 1806.05236, at that one
layer); dropout, Srivastava et al. 2014, scaled in training; early stopping, Prechelt 1998.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fedtl import seeding
from fedtl.clients.batches import batch_order
from fedtl.types import Float32, Int64, LocalTraining, Population

if TYPE_CHECKING:
    import torch

ROWS = 1024
"""Rows whose deviation is taken at a time."""


def divided(population: Population, client: int, training: LocalTraining) -> tuple[Int64, Int64]:
    """A client's rows to train on and those to judge its own training by, int64 each.

    Which these are depends on the client's name and on how many rows it has: they are the same in
    every round, and nobody else needs to know them.
    """
    rows = population.train.of(client)
    kept = int(training.trains_on(np.array([len(rows)]))[0])
    if kept == len(rows):
        return rows, rows[:0]
    key = int(seeding.named_keys(0, "validation", [population.names[client]])[0])
    order = batch_order(key, len(rows), 0)
    return rows[np.sort(order[:kept])], rows[np.sort(order[kept:])]


@dataclass(frozen=True)
class Chance:
    """What is random in one client's training in one round.

    Attributes:
        training: how strong each of it is.
        key: the client's of the round.
        spread: standard deviation of each activation over the client's rows, float32 [A]; used
            where there is noise.
    """

    training: LocalTraining
    key: int
    spread: Float32
    _streams: dict[str, np.random.Generator] = field(default_factory=dict)

    def noisy(self, x: torch.Tensor) -> torch.Tensor:
        """Activations [n, A] with noise of ``training.noise`` deviations."""
        import torch

        if not self.training.noise:
            return x
        drawn = self._stream("noise").standard_normal(tuple(x.shape), dtype=np.float32)
        drawn *= np.float32(self.training.noise) * self.spread
        return x + torch.from_numpy(drawn).to(x.device)

    def partners(self, count: int) -> tuple[float, Int64]:
        """Mixup's share lambda ~ Beta(alpha, alpha) of a batch, and who is mixed with whom [n]."""
        stream, alpha = self._stream("mixup"), self.training.mixup
        return float(stream.beta(alpha, alpha)), stream.permutation(count)

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """What enters the last layer [n, H], each entry dropped with ``training.dropout``."""
        import torch

        rate = self.training.dropout
        if not rate:
            return x
        kept = self._stream("dropout").random(tuple(x.shape), dtype=np.float32) >= rate
        scaled = kept.astype(np.float32) / np.float32(1 - rate)
        return x * torch.from_numpy(scaled).to(x.device)

    def _stream(self, purpose: str) -> np.random.Generator:
        if purpose not in self._streams:
            self._streams[purpose] = seeding.generator(self.key, purpose)
        return self._streams[purpose]


def spread(population: Population, rows: Int64) -> Float32:
    """The standard deviation of each activation over some rows, float32 [A]; 0 without rows."""
    width, count = population.features.shape[1], max(1, len(rows))
    mean, squares = np.zeros(width), np.zeros(width)
    for low in range(0, len(rows), ROWS):
        mean += population.features[rows[low : low + ROWS]].sum(axis=0, dtype=np.float64) / count
    for low in range(0, len(rows), ROWS):
        part = population.features[rows[low : low + ROWS]].astype(np.float64)
        squares += np.square(part - mean).sum(axis=0) / count
    return np.sqrt(squares).astype(np.float32)


@dataclass
class Best:
    """The tensors with the least loss on the validation part so far, the start among them.

    Attributes:
        patience: epochs without a better loss after which training is over.
    """

    patience: int
    loss: float
    tensors: dict[str, torch.Tensor]
    waited: int = 0

    def over(self, loss: float, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether training ends after an epoch with this loss; keeps what is better."""
        if loss < self.loss:
            self.loss, self.waited = loss, 0
            self.tensors = {name: value.clone() for name, value in tensors.items()}
        else:
            self.waited += 1
        return self.waited >= self.patience

"""Training from scratch: what the pretrained backbone is worth.

The same architecture with random weights, the whole network trained on everybody's images pooled
by plain SGD with the scenario's batch size, learning rates, momentum and weight decay. The running
statistics of batch norm are those of the last weights, averaged over the training images (Wu and
Johnson 2021): after few steps the moving ones are still mostly their start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtl import seeding
from fedtl.data.examples import Images
from fedtl.evaluation.metrics import defined
from fedtl.evaluation.references import Judge, Judgement, judge_shared, moved, tests_of
from fedtl.scenario import schema
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.drawing import seeded
from fedtl.transfer.heads import initial_head
from fedtl.types import Float32, Head, Int64

if TYPE_CHECKING:
    import torch
    from torch import nn

STATISTICS_EXAMPLES = 2048
"""Training images, at most, that batch norm's last statistics are averaged over (seeded)."""

JUDGED = 64
"""Images through the trained trunk at once."""


@dataclass(frozen=True)
class Order:
    """What is trained.

    Attributes:
        images: of all examples, by row.
        backbone: the scenario's section; its weights are not used.
        image_size: side in pixels of what the pretrained trunk sees.
        head: the scenario's section.
        training: of which batch size, momentum and weight decay are taken.
        rates: learning rate of each epoch; as many as there are epochs.
        seed: the scenario's.
    """

    images: Images
    backbone: schema.Backbone
    image_size: int
    head: schema.Head
    training: schema.Training
    rates: Sequence[float]
    seed: int


def judge_scratch(judge: Judge, order: Order, check: Callable[[], None]) -> Judgement:
    """Train on everybody's training images and judge on the same tests as every other head.

    On the CPU it runs on one thread, so its bits depend on no number of cores.

    Args:
        check: called before every batch; may raise to stop.
    """
    from fedtl.clients.batched import one_torch_thread

    section = order.backbone.model_copy(
        update={"weights": "none", "sha256": None, "image_size": order.image_size}
    )
    population = judge.population
    with one_torch_thread(), seeded(seeding.key(order.seed, "from_scratch")):  # of dropout
        backbone = open_backbone(section, order.seed)
        network = _Network(order, backbone, len(population.classes), judge.device)
        rows = np.sort(population.train.index)
        loss = network.train(rows, population.labels, check)
        tests = np.unique(np.concatenate([judge.everyone, *tests_of(judge)]))
        features = network.features(tests, check)
        head = network.fitted_head()
    judgement = judge_shared(moved(judge, tests, features), head)
    judgement.facts.update(epochs=len(order.rates), train_loss=defined(loss))
    return judgement


class _Network:
    """A trunk with random weights and a head on it, trained together."""

    def __init__(self, order: Order, backbone: Backbone, num_classes: int, device: str) -> None:
        import torch

        self._order, self._preprocessing, self._device = order, backbone.preprocessing, device
        width = backbone.dim  # builds the trunk and tries it out
        self._trunk = backbone.trunk().to(device)
        self._trunk.requires_grad_(True)
        self._body: nn.Module = self._trunk.get_submodule("body")  # the trunk itself stays asleep
        head = initial_head(order.head, width, num_classes, order.seed)
        self._head = {
            name: torch.tensor(tensor, device=device, requires_grad=True)
            for name, tensor in head.items()
        }

    def train(self, rows: Int64, labels: Any, check: Callable[[], None]) -> float:
        """All epochs; returns the last one's mean loss. Diverged weights stay as they are."""
        import torch
        from torch.nn.functional import cross_entropy

        from fedtl.clients.batched import forward

        training = self._order.training
        optimizer = torch.optim.SGD(
            [*self._trunk.parameters(), *self._head.values()],
            lr=training.learning_rate,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
        )
        mean = float("nan")
        for epoch, rate in enumerate(self._order.rates):
            for group in optimizer.param_groups:
                group["lr"] = rate
            total = 0.0
            shuffled = seeding.generator(self._order.seed, "from_scratch", epoch).permutation(rows)
            with _awake(self._body):
                for batch in _batches(shuffled, training.batch_size):
                    check()
                    optimizer.zero_grad()
                    truth = torch.from_numpy(labels[batch].astype(np.int64)).to(self._device)
                    loss = cross_entropy(forward(self._head, self._seen(batch)), truth)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    total += float(loss.detach()) * len(batch)
            mean = total / max(1, len(rows))
        self._settle(rows, check)
        return mean

    def features(self, rows: Int64, check: Callable[[], None]) -> Float32:
        """What the trained trunk makes of some images, float32 [n, D]."""
        import torch

        parts = []
        with torch.inference_mode():
            for low in range(0, len(rows), JUDGED):
                check()
                parts.append(self._seen(rows[low : low + JUDGED]).cpu().numpy())
        return np.concatenate(parts)

    def fitted_head(self) -> Head:
        """The trained head."""
        return {name: t.detach().cpu().numpy().copy() for name, t in self._head.items()}

    def _settle(self, rows: Int64, check: Callable[[], None]) -> None:
        """Batch norm's statistics anew, of the weights as they are now."""
        import torch

        norms = [
            m for m in self._body.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
        ]
        if not norms:
            return
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
        drawn = seeding.generator(self._order.seed, "from_scratch", -1).permutation(rows)
        with _awake(self._body), torch.inference_mode():
            for batch in _batches(drawn[:STATISTICS_EXAMPLES], self._order.training.batch_size):
                check()
                self._seen(batch)

    def _seen(self, rows: Int64) -> torch.Tensor:
        """Features [n, D] of some images, with a gradient where the body is awake."""
        import torch

        pixels = np.stack([self._preprocessing.apply(self._order.images.load(i)) for i in rows])
        features: torch.Tensor = self._trunk(torch.from_numpy(pixels).to(self._device))
        return features


@contextmanager
def _awake(body: nn.Module) -> Iterator[None]:
    """Training mode: batch statistics and dropout."""
    body.train()
    try:
        yield
    finally:
        body.eval()


def _batches(rows: Int64, size: int) -> Iterator[Int64]:
    """Batches of rows; a last one of a single image is left out: it has no batch statistics."""
    for low in range(0, len(rows), size):
        batch = rows[low : low + size]
        if len(batch) > 1 or len(rows) == 1:
            yield batch

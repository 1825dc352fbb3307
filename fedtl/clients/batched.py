"""Local training and judging through torch: MLP heads, and any head on a GPU.

Clients train side by side along a leading axis in groups of fixed width. A group, a batch and a
row are always padded to the same shape, so every matrix product has the same form and a client's
bits do not depend on who else is in its group. Gradients are written out by hand: a head is a chain
of linear layers with ReLU between them, and one formula serves all lanes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedtl.clients.adversarial import Foe, domain_numbers
from fedtl.clients.blocks import labels_of, run_blocks
from fedtl.clients.losses import residuals
from fedtl.errors import EnvironmentFault, InputError
from fedtl.plans import RoundPlan
from fedtl.types import (
    DOMAIN,
    ClientUpdates,
    Float32,
    Head,
    Int64,
    LocalTraining,
    Population,
)

if TYPE_CHECKING:
    import torch

LANES = {"cpu": 8, "cuda": 64}
"""Clients side by side. On a CPU, 8 batches of 50 x 512 features fit the second-level cache; a GPU
needs more work per launch."""
PIECE = 256
"""Longer batches go through in pieces of this many examples, to bound memory."""
ALIGN = 16
"""All widths are padded to this many floats: a matrix product may add in another order when its
operand does not start at a cache line, and lanes must not differ in that."""


def layer_names(head: Mapping[str, object]) -> list[str]:
    """Prefixes of a head's layers from features to scores: hidden.0., ..., then "".

    A classifier of domains, which an MLP head may have with it, is not among them.
    """
    hidden = sum(name.startswith("hidden.") for name in head) // 2
    names = [f"hidden.{i}." for i in range(hidden)] + [""]
    whole = [*names, DOMAIN] if hidden and DOMAIN + "weight" in head else names
    expected = {name + kind for name in whole for kind in ("weight", "bias")}
    if set(head) != expected:
        raise InputError(
            "a head of unknown form", got=sorted(head), allowed="weight, bias, hidden.<i>.*"
        )
    return names


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """One torch thread for a product, which several could split in another way.

    Threads started within must say ``torch.set_num_threads(1)`` themselves: part of torch's setting
    is theirs, part the process's, so only this outermost place may set it back.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def checked_device(device: str) -> str:
    """The device. Raises EnvironmentFault for a GPU that is not there."""
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise EnvironmentFault(
            "no GPU that torch can use", got=device, do="Set engine.device to 'cpu'"
        )
    return device


def _padded(array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    out = np.zeros(shape, dtype=np.float32)
    out[tuple(slice(size) for size in array.shape)] = array
    return out


def _wide(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class _Lanes:
    """The heads of one group as padded tensors: [L, out, in] and [L, 1, out] for each layer.

    A classifier of domains, where there is one, comes after the ``depth`` layers of the head.
    """

    def __init__(self, starts: Head, first: int, stop: int, device: str) -> None:
        import torch

        lanes = LANES[device.partition(":")[0]]
        names = layer_names(starts)
        self.depth = len(names)
        names += [DOMAIN] if DOMAIN + "weight" in starts else []
        self._names, self._first, self._stop = names, first, stop
        self._shapes = {name: tensor.shape[1:] for name, tensor in starts.items()}
        self.layers: list[list[torch.Tensor]] = []
        for name in names:
            own = [
                np.broadcast_to(t, (stop - first, *t.shape[1:])) if len(t) == 1 else t[first:stop]
                for t in (starts[name + "weight"], starts[name + "bias"])
            ]
            rows, columns = (_wide(size) for size in own[0].shape[1:])
            weight = _padded(own[0], (lanes, rows, columns))
            bias = _padded(own[1][:, None], (lanes, 1, rows))
            self.layers.append([torch.from_numpy(t).to(device) for t in (weight, bias)])
        num_classes = starts["bias"].shape[1]
        classes = np.arange(_wide(num_classes)) >= num_classes
        self.absent = torch.from_numpy(classes).to(device)
        self.foe: Foe | None = None

    def save(self, out: dict[str, Float32]) -> None:
        """Write the heads without their padding."""
        for name, tensors in zip(self._names, self.layers, strict=True):
            for kind, tensor in zip(("weight", "bias"), tensors, strict=True):
                own = tensor.cpu().numpy()[: self._stop - self._first]
                own = own[:, 0] if kind == "bias" else own
                shape = self._shapes[name + kind]
                part = (slice(None), *(slice(size) for size in shape))
                out[name + kind][self._first : self._stop] = own[part]

    def gradient(
        self, x: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor
    ) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
        """Gradient of the weighted cross-entropy of one piece of a batch.

        Args:
            x: [L, B, D] padded features.
            labels: int64 [L, B].
            weight: [L, B], 1 / batch length for an example and 0 for padding.

        Returns:
            The gradient for each layer, and each example's cross-entropy float32 [L, B].
        """
        import torch

        inputs = [x]
        for matrix, bias in self.layers[: self.depth - 1]:
            inputs.append(torch.relu(torch.bmm(inputs[-1], matrix.mT) + bias))
        matrix, bias = self.layers[self.depth - 1]
        scores = torch.bmm(inputs[-1], matrix.mT) + bias
        delta, loss = residuals(scores.masked_fill(self.absent, -torch.inf), labels, weight)
        gradients: list[list[torch.Tensor]] = []
        against: torch.Tensor | None = None
        if self.foe is not None:
            own, against = self.foe.gradient(self.layers[-1], inputs[-1], weight)
            gradients.append(own)
        for i in range(self.depth - 1, -1, -1):
            gradients.insert(0, [torch.bmm(delta.mT, inputs[i]), delta.sum(1, keepdim=True)])
            if i:
                back = torch.bmm(delta, self.layers[i][0])
                if against is not None and i == self.depth - 1:
                    back = back - against
                # threshold_backward, unlike a product with a mask, does what torch's ReLU does.
                delta = torch.where(inputs[i] <= 0, 0.0, back)
        return gradients, loss


def train_batched(
    population: Population, starts: Head, plan: RoundPlan, *, threads: int, device: str
) -> ClientUpdates:
    """Train the clients of a plan side by side; ``starts`` are name -> [1 or k, ...].

    Raises:
        InputError: a head of unknown form, or labels outside its classes.
        EnvironmentFault: a device that is not there.
    """
    import torch

    clients, numbers = plan.clients, None
    if DOMAIN + "weight" in starts:
        numbers = domain_numbers(population.domains)
    lanes = LANES[checked_device(device).partition(":")[0]]
    num = len(clients)
    out = {
        name: np.empty((num, *tensor.shape[1:]), dtype=np.float32)
        for name, tensor in starts.items()
    }
    loss = np.full(num, np.nan)

    def work(first: int, stop: int) -> None:
        torch.set_num_threads(1)
        group = _Lanes(starts, first, stop, device)
        if numbers is not None:
            num = starts[DOMAIN + "bias"].shape[1]
            group.foe = Foe.of(group.layers[-1], numbers[clients[first:stop]], plan.training, num)
        loss[first:stop] = _train_group(population, plan, group, first, stop, device)
        group.save(out)

    with one_torch_thread():
        run_blocks(work, num, threads=threads if device == "cpu" else 1, block_size=lanes)
    return ClientUpdates(plan.round, clients, out, population.train.counts[clients], loss)


def _train_group(
    population: Population, plan: RoundPlan, group: _Lanes, first: int, stop: int, device: str
) -> npt.NDArray[np.float64]:
    """Train the lanes of one group in place; returns the first epoch's mean loss, float64 [b]."""
    import torch

    from fedtl.clients.batches import batch_order

    lanes, own = len(group.layers[0][0]), plan.training
    num_classes = int((~group.absent).sum())
    rows = [population.train.of(client) for client in plan.clients[first:stop].tolist()]
    for client, chosen in zip(plan.clients[first:stop].tolist(), rows, strict=True):
        labels_of(population, client, chosen, num_classes)
    begin = [[t.clone() for t in layer] for layer in group.layers]
    extra = None
    if plan.corrections:
        extra = _Lanes(plan.corrections, first, stop, device).layers
    speed = [[torch.zeros_like(t) for t in layer] for layer in group.layers]
    summed = np.zeros(stop - first)
    for epoch in range(own.epochs):
        orders = [
            chosen[batch_order(int(plan.batch_keys[first + i]), len(chosen), epoch)]
            for i, chosen in enumerate(rows)
        ]
        for low in range(0, max((len(chosen) for chosen in rows), default=0), own.batch_size):
            batches = [order[low : low + own.batch_size] for order in orders]
            total: list[list[torch.Tensor]] | None = None
            for start in range(0, max(len(batch) for batch in batches), PIECE):
                x, labels, weight = _piece(population, batches, start, group, own.batch_size)
                gradients, loss = group.gradient(x.to(device), labels.to(device), weight.to(device))
                if epoch == 0:
                    kept = torch.where(weight > 0, loss.cpu().double(), 0.0)
                    summed += kept.sum(1).numpy()[: stop - first]
                if total is None:
                    total = gradients
                else:
                    for mine, more in zip(total, gradients, strict=True):
                        for a, b in zip(mine, more, strict=True):
                            a.add_(b)
            assert total is not None
            active = None
            if not all(len(batch) for batch in batches):
                idle = [False] * (lanes - len(batches))
                busy = [bool(len(batch)) for batch in batches] + idle
                active = torch.tensor(busy, device=device)[:, None, None]
            _step(group.layers, begin, extra, speed, total, active, own)
    counts = np.array([len(chosen) for chosen in rows], dtype=np.float64)
    counts[counts == 0] = np.nan
    return summed / counts if own.epochs else np.full(stop - first, np.nan)


def _piece(
    population: Population, batches: list[Int64], start: int, group: _Lanes, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One padded piece of each lane's batch: features [L, B, D], labels [L, B], weights [L, B]."""
    import torch

    lanes, _, width = group.layers[0][0].shape
    length = _wide(min(batch_size, PIECE))
    x = np.zeros((lanes, length, width), dtype=np.float32)
    labels = np.zeros((lanes, length), dtype=np.int64)
    weight = np.zeros((lanes, length), dtype=np.float32)
    for lane, batch in enumerate(batches):
        part = batch[start : start + PIECE]
        x[lane, : len(part), : population.features.shape[1]] = population.features[part]
        labels[lane, : len(part)] = population.labels[part]
        weight[lane, : len(part)] = np.float32(1.0 / max(1, len(batch)))
    return torch.from_numpy(x), torch.from_numpy(labels), torch.from_numpy(weight)


def _step(
    layers: list[list[torch.Tensor]],
    begin: list[list[torch.Tensor]],
    extra: list[list[torch.Tensor]] | None,
    speed: list[list[torch.Tensor]],
    gradients: list[list[torch.Tensor]],
    active: torch.Tensor | None,
    own: LocalTraining,
) -> None:
    """One step of torch.optim.SGD in the lanes that have a batch (None: all have one)."""
    import torch

    for i, layer in enumerate(layers):
        if own.layers != "all" and (own.layers == "last") != (i == len(layers) - 1):
            continue
        for j, weight in enumerate(layer):
            step = gradients[i][j]
            if extra is not None:
                step = step + extra[i][j]
            if own.weight_decay:
                step = step + own.weight_decay * weight
            if own.proximal:
                step = step + own.proximal * (weight - begin[i][j])
            if own.momentum:
                step = own.momentum * speed[i][j] + step
            moved = weight - own.learning_rate * step
            if active is not None:  # the others stay untouched, whatever stands in their gradient
                step = torch.where(active, step, speed[i][j])
                moved = torch.where(active, moved, weight)
            speed[i][j], layer[j] = step, moved


def forward(head: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Scores [n, C] of one head of any form for features [n, D]; autograd passes through."""
    return classify(head, entering(head, x))


def entering(head: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What enters a head's last layer, [n, H], from features [n, D].

    Only here may a head begin with a random Fourier map, ``fourier.weight`` [R, D] and
    ``fourier.bias`` [R]: it is solved for, never trained.
    """
    import torch

    if "fourier.weight" in head:
        omega, shift = head["fourier.weight"], head["fourier.bias"]
        x = (2 / len(omega)) ** 0.5 * torch.cos(torch.addmm(shift, x, omega.T))
    plain = {n: own for n, own in head.items() if not n.startswith("fourier.") and n not in SCALES}
    for name in layer_names(plain)[:-1]:
        x = torch.relu(torch.addmm(head[name + "bias"], x, head[name + "weight"].T))
    return x


SCALES = ("cosine.scale", "prototype.scale")
"""The tensor that says of a head that it is of this kind."""


def classify(head: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Scores [n, C] of a head's last layer for what enters it, [n, H].

    Linear: <x, w> + b. Cosine: s <x, w> / (|x| |w|) + b (Gidaris and Komodakis 2018, 1804.09458,
    equation 3). Prototype: -s |x - w|^2 / H + b (Snell et al. 2017, 1703.05175, equation 2), less
    -s |x|^2 / H, which is the same for every class and changes no softmax.

    Deviations: both papers have no bias; here it starts at zero and takes up class frequencies,
    which priors shift. Distances are divided by H, so that a scale means the same at any width.
    """
    import torch
    from torch.nn.functional import normalize

    weight, bias = head["weight"], head["bias"]
    if "cosine.scale" in head:
        return torch.addmm(bias, head["cosine.scale"] * normalize(x), normalize(weight).T)
    if "prototype.scale" in head:
        near = 2 * torch.mm(x, weight.T) - weight.square().sum(1)
        return bias + head["prototype.scale"] / x.shape[1] * near
    return torch.addmm(bias, x, weight.T)

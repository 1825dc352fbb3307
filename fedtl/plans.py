"""What clients are asked to do in a round; decided before any engine runs, and all that travels.

Axes as in ``types``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedtl.types import (
    MERGED,
    ClientFailure,
    ClientUpdates,
    Float32,
    Float64,
    Head,
    Int64,
    LocalTraining,
    UInt64,
    head_bytes,
)

Task = Literal["train", "gradient", "statistics"]
"""What clients do in a round: train the head, give the full gradient of their mean loss at it, or
sum statistics of their features."""

Report = Literal["start_loss", "start_gradient"]
"""What a training client says besides: its mean loss over all its rows before training, and the
gradient of that loss."""


@dataclass(frozen=True)
class Statistics:
    """Which sums over its training rows a client gives; z is a row's features [W] (see ``width``).

    Attributes:
        gram: also sum of z z^T.
        class_grams: also that sum for each class apart.
        bias: z ends with a 1.
        random_features: R; 0 sums the features x themselves, else z = sqrt(2/R) cos(x Omega + b).
        scale: standard deviation of Omega's entries.
        key: seeds Omega and b, the same for all clients.
    """

    gram: bool = True
    class_grams: bool = False
    bias: bool = True
    random_features: int = 0
    scale: float = 1.0
    key: int = 0

    def width(self, num_features: int) -> int:
        """W, the length of z."""
        return (self.random_features or num_features) + self.bias


Packing = Literal["top_k", "int8", "sign"]


@dataclass(frozen=True)
class Compression:
    """How a client's update is packed before it leaves, see ``clients.compression``.

    Attributes:
        kind: "top_k" (largest entries), "int8", or "sign" (one bit each).
        fraction: of the entries that top_k sends, in (0, 1].
        error_feedback: what was not sent is added to the client's next update.
    """

    kind: Packing
    fraction: float = 0.01
    error_feedback: bool = True


Personalisation = Literal[
    "finetune",
    "partial",
    "fedrep",
    "fedbabu",
    "ditto",
    "pfedme",
    "apfl",
    "knnper",
    "ridge",
    "prior",
    "bbse",
]


@dataclass(frozen=True)
class Personal:
    """What a client has of its own beside the shared head, see ``clients.personal``.

    Nothing of it leaves the client. A field that the method does not use is left at its default.

    Attributes:
        method: how the client's own head, or prediction, comes about.
        local: names of the head's tensors that stay with the client and are never sent.
        strength: lambda of ditto and pfedme.
        epochs: of the client's own training.
        inner_steps: pfedme's K.
        alpha: apfl's share of the client's own head.
        adaptive: whether apfl's alpha follows its gradient.
        neighbours, scale: knnper's; ``scale`` is also ridge's temperature, and tau of "prior".
        choices: among which the client chooses (knnper's lambdas, ridge's rhos), or the log-prior
            of every class that "prior" replaces, or the rows of the confusion matrix of "bbse".
    """

    method: Personalisation
    local: tuple[str, ...] = ()
    strength: float = 0.0
    epochs: int = 0
    inner_steps: int = 0
    alpha: float = 0.5
    adaptive: bool = False
    neighbours: int = 0
    scale: float = 1.0
    choices: tuple[float, ...] = ()

    @property
    def completes(self) -> bool:
        """Whether the shared head is no model without it."""
        partial = self.method == "partial" and bool(self.local)
        return partial or self.method in ("fedrep", "fedbabu")


@dataclass(frozen=True)
class Protection:
    """What a client does to its answer before it leaves, in this order; 0 leaves a step out.

    Attributes:
        clip: longest update over all its tensors together (L2); a longer one is shortened.
        noise: standard deviation of what is then added to every entry.
        example_clip: longest gradient of a single example (DP-SGD).
        example_noise: standard deviation of what is added to a step's sum of such gradients.
        row_clip: longest feature row of the statistics; rows are divided by it.
        least_per_class: classes with fewer examples stay out of the statistics.
        ring_bits: 32 or 64: entries are sent as integers of a ring, see ``privacy.ring``.
        scale: of those integers: an entry v is sent as round(scale * weight * v).
        limit: largest integer that one client may send.
        masked: integers are sent under masks that cancel in the sum.
    """

    clip: float = 0.0
    noise: float = 0.0
    example_clip: float = 0.0
    example_noise: float = 0.0
    row_clip: float = 0.0
    least_per_class: int = 1
    ring_bits: int = 0
    scale: float = 0.0
    limit: int = 0
    masked: bool = False


RING = "ring.values"
"""The one tensor of an answer in a ring: all tensors that else were sent, by name, one after the
other, uint32 or uint64 [P]."""

Shapes = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]
"""Tensors by name, with shape and type."""


@dataclass(frozen=True)
class RoundPlan:
    """One round, decided before any engine runs.

    Attributes:
        round: 1 for the first.
        clients: sorted client ids, int64 [k].
        batch_keys: the stream that orders each client's batches, uint64 [k].
        training: hyper-parameters of the round.
        needed: answers with which the round may close, or None for all.
        task: what the clients do.
        corrections: name -> float32 [k, ...], what each client adds to the gradient of every one
            of its steps (drift-corrected strategies); empty for none.
        reports: what training clients say besides their head.
        statistics: what is summed, for the task "statistics".
        compression: how updates are packed, None for as they are.
        personal: what clients do for themselves in the round, None for nothing.
        protection: what is done to answers before they leave, None for nothing.
        noise_keys: the stream of each client's noise, uint64 [k]; None where nobody adds any.
            Real clients draw theirs elsewhere.
        weights: of each client in a secure sum, float64 [k] in (0, 1]; None for 1.
    """

    round: int
    clients: Int64
    batch_keys: UInt64
    training: LocalTraining
    needed: int | None = None
    task: Task = "train"
    corrections: Mapping[str, Float32] = field(default_factory=dict)
    reports: tuple[Report, ...] = ()
    statistics: Statistics | None = None
    compression: Compression | None = None
    personal: Personal | None = None
    protection: Protection | None = None
    noise_keys: UInt64 | None = None
    weights: Float64 | None = None

    def part(self, places: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> RoundPlan:
        """The plan for some of its clients: their places (or a mask) among ``clients``."""
        return replace(
            self,
            clients=self.clients[places],
            batch_keys=self.batch_keys[places],
            corrections={name: tensor[places] for name, tensor in self.corrections.items()},
            noise_keys=None if self.noise_keys is None else self.noise_keys[places],
            weights=None if self.weights is None else self.weights[places],
        )

    def waves(self, at_a_time: int) -> Iterator[RoundPlan]:
        """The plan in parts of so many clients, in their order."""
        for first in range(0, len(self.clients), at_a_time):
            yield self.part(np.arange(first, min(first + at_a_time, len(self.clients))))

    def without(self, clients: Int64) -> RoundPlan:
        """The plan for all its clients but the given ones."""
        return self.part(~np.isin(self.clients, clients))

    def reply(self, head: Head) -> Shapes:
        """The tensors that each client answers with, for a head of this form."""
        plain = self.plain_reply(head)
        bits = self.protection.ring_bits if self.protection is not None else 0
        if not bits:
            return plain
        if self.compression is not None:  # what was packed is unpacked into the ring again
            plain = replace(self, compression=None).plain_reply(head)
        size = sum(prod(shape) for shape, _ in plain.values())
        return {RING: ((size,), np.dtype(np.uint64 if bits == 64 else np.uint32))}

    def plain_reply(self, head: Head) -> Shapes:
        """The same before it is put into a ring."""
        if self.task == "statistics":
            assert self.statistics is not None
            return _sums(self.statistics, *head["weight"].shape)
        local = self.personal.local if self.personal is not None else ()
        head = {
            name: tensor
            for name, tensor in head.items()
            if name not in local and not name.endswith(MERGED)
        }
        own: Shapes = {name: (tensor.shape, np.dtype(np.float32)) for name, tensor in head.items()}
        if self.task == "gradient":
            return {name: (shape, np.dtype(np.float64)) for name, (shape, _) in own.items()}
        if self.compression is not None:
            return _packed(self.compression, head)
        if "start_gradient" in self.reports:
            own = {**own, **{f"start_gradient.{name}": own[name] for name in head}}
        return own

    def up_bytes(self, head: Head) -> int:
        """Logical payload of one client's answer, in bytes."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.reply(head).values())

    def down_bytes(self, head: Head) -> int:
        """Logical payload of what one client is sent, in bytes; statistics need no head."""
        sent = head_bytes(head) if self.task != "statistics" else 0
        return sent + sum(tensor[:1].nbytes for tensor in self.corrections.values())


def _sums(asked: Statistics, num_classes: int, num_features: int) -> Shapes:
    """The tensors of a client's statistics; a Gram matrix travels as its upper triangle by rows."""
    width, real = asked.width(num_features), np.dtype(np.float64)
    packed = width * (width + 1) // 2
    shapes: Shapes = {
        "counts": ((num_classes,), np.dtype(np.int64)),
        "sums": ((num_classes, width), real),
    }
    if asked.gram:
        shapes["gram"] = ((packed,), real)
    if asked.class_grams:
        shapes["class_grams"] = ((num_classes, packed), real)
    return shapes


def _packed(asked: Compression, head: Head) -> Shapes:
    """A compressed update: all tensors as one vector, a scale for each tensor."""
    size = sum(tensor.size for tensor in head.values())
    scales = ((len(head),), np.dtype(np.float32))
    if asked.kind == "top_k":
        kept = (max(1, ceil(asked.fraction * size - 1e-9)),)  # 0.07 * 100 is 7.000000000000001
        return {
            "top_k.places": (kept, np.dtype(np.int32)),
            "top_k.values": (kept, np.dtype(np.float32)),
        }
    if asked.kind == "int8":
        return {"int8.values": ((size,), np.dtype(np.int8)), "int8.scales": scales}
    return {"sign.bits": ((-(-size // 8),), np.dtype(np.uint8)), "sign.scales": scales}


def misfit(reply: ClientUpdates, expected: Shapes) -> str | None:
    """Why a whole reply has not the tensors and columns that were asked for, or None."""
    count = len(reply.clients)
    if set(reply.tensors) != set(expected):
        return f"tensors {sorted(reply.tensors)} instead of {sorted(expected)}"
    for name, (shape, dtype) in expected.items():
        tensor = reply.tensors[name]
        if tensor.dtype != dtype:
            return f"{name} is {tensor.dtype} instead of {dtype}"
        if tensor.shape != (count, *shape):
            return f"{name} has shape {tensor.shape[1:]} instead of {shape}"
    for what, values in (("num_examples", reply.num_examples), ("loss", reply.loss)):
        if values.shape != (count,):
            return f"{what} has shape {values.shape} instead of {(count,)}"
    return None


def no_updates(plan: RoundPlan, head: Head, failures: tuple[ClientFailure, ...]) -> ClientUpdates:
    """A reply of nobody: only why clients have none."""
    none = {name: np.empty((0, *shape), dtype) for name, (shape, dtype) in plan.reply(head).items()}
    empty = np.empty(0, np.int64)
    return ClientUpdates(plan.round, empty, none, empty, np.empty(0), failures)

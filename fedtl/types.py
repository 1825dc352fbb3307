"""The data that travels between the floors: populations, plans, updates and metrics.

Axes: K clients, k clients of a cohort, N examples, B batch, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]
UInt64 = npt.NDArray[np.uint64]

Head = Mapping[str, Float32]
"""A head's tensors by name. Linear: ``weight`` [C, D] and ``bias`` [C]. MLP: also
``hidden.<i>.weight`` [H, D] and ``hidden.<i>.bias`` [H] in front of them."""


def head_bytes(head: Head) -> int:
    """Logical payload of one head on the wire, in bytes."""
    return sum(tensor.nbytes for tensor in head.values())


@dataclass(frozen=True)
class Rows:
    """Which rows of the feature matrix belong to which client (compressed sparse rows).

    ``index[offsets[k]:offsets[k + 1]]`` are client k's rows; ``index`` is int64 [n], ``offsets``
    int64 [K + 1].
    """

    index: Int64
    offsets: Int64

    @property
    def counts(self) -> Int64:
        """Rows per client, int64 [K]."""
        return np.diff(self.offsets)

    def of(self, client: int) -> Int64:
        """One client's rows, int64 [n_k] (a view)."""
        return self.index[self.offsets[client] : self.offsets[client + 1]]


@dataclass(frozen=True)
class ClientData:
    """One client's private examples as cached trunk features."""

    features: npt.NDArray[np.floating]
    labels: Int32
    domain: str


@dataclass(frozen=True)
class Roster:
    """What the server knows about the clients, whoever holds their data.

    Attributes:
        names: K client names.
        domains: K domain names, one per client ("" where there are none).
        classes: C class names.
        train, test: examples that each client trains and is judged on, int64 [K].
        width: D, of their features.
    """

    names: tuple[str, ...]
    domains: tuple[str, ...]
    classes: tuple[str, ...]
    train: Int64
    test: Int64
    width: int

    @property
    def num_clients(self) -> int:
        """K."""
        return len(self.names)

    def columns(self, clients: Int64) -> dict[str, list[str]]:
        """The ``name`` and ``domain`` columns of a table with a row per given client."""
        ids = clients.tolist()
        return {"name": [self.names[i] for i in ids], "domain": [self.domains[i] for i in ids]}


@dataclass(frozen=True)
class Population:
    """All clients of a scenario over one feature matrix, without a copy per client.

    Attributes:
        features: [N, D] float32 or float16, usually memory-mapped.
        labels: int32 [N], in [0, C).
        classes: C class names.
        train, test: which rows each of the K clients trains and is judged on.
        names: K client names.
        domains: K domain names, one per client ("" where the data have none).
    """

    features: npt.NDArray[np.floating]
    labels: Int32
    classes: tuple[str, ...]
    train: Rows
    test: Rows
    names: tuple[str, ...]
    domains: tuple[str, ...]

    @property
    def num_clients(self) -> int:
        """K."""
        return len(self.names)

    def roster(self) -> Roster:
        """What a server may know of this population."""
        return Roster(
            self.names,
            self.domains,
            self.classes,
            self.train.counts,
            self.test.counts,
            int(self.features.shape[1]),
        )

    def client(self, client: int, split: str = "train") -> ClientData:
        """One client's ``"train"`` or ``"test"`` examples (a copy)."""
        rows = (self.train if split == "train" else self.test).of(client)
        return ClientData(self.features[rows], self.labels[rows], self.domains[client])


Layers = Literal["all", "hidden", "last"]
"""Which layers of a head are trained; a linear head has only the last."""


@dataclass(frozen=True)
class LocalTraining:
    """What a client does with the head in one round; the same for every client of the round.

    ``proximal`` is FedProx's mu: the gradient gains mu * (w - w_round_start). The weight-decay
    term is ``weight_decay * w`` on weights and biases alike, as torch.optim.SGD has it. ``layers``
    that are not trained stay as they are, bit for bit.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal: float = 0.0
    layers: Layers = "all"


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
        neighbours, scale: knnper's; ``scale`` is also ridge's temperature.
        choices: among which the client chooses (knnper's lambdas, ridge's rhos), or the log-prior
            of every class that "prior" replaces.
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
        return self.method in ("fedrep", "fedbabu") or (self.method == "partial" and bool(self.local))


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

    def part(self, places: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> RoundPlan:
        """The plan for some of its clients: their places (or a mask) among ``clients``."""
        return replace(
            self,
            clients=self.clients[places],
            batch_keys=self.batch_keys[places],
            corrections={name: tensor[places] for name, tensor in self.corrections.items()},
        )

    def without(self, clients: Int64) -> RoundPlan:
        """The plan for all its clients but the given ones."""
        return self.part(~np.isin(self.clients, clients))

    def reply(self, head: Head) -> Shapes:
        """The tensors that each client answers with, for a head of this form."""
        local = self.personal.local if self.personal is not None else ()
        head = {name: tensor for name, tensor in head.items() if name not in local}
        own: Shapes = {name: (tensor.shape, np.dtype(np.float32)) for name, tensor in head.items()}
        if self.task == "gradient":
            return {name: (shape, np.dtype(np.float64)) for name, (shape, _) in own.items()}
        if self.task == "statistics":
            assert self.statistics is not None
            return _sums(self.statistics, *head["weight"].shape)
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
        kept = (max(1, ceil(asked.fraction * size)),)
        return {
            "top_k.places": (kept, np.dtype(np.int32)),
            "top_k.values": (kept, np.dtype(np.float32)),
        }
    if asked.kind == "int8":
        return {"int8.values": ((size,), np.dtype(np.int8)), "int8.scales": scales}
    return {"sign.bits": ((-(-size // 8),), np.dtype(np.uint8)), "sign.scales": scales}


@dataclass(frozen=True)
class ClientFailure:
    """A client whose update is not in the round, and why."""

    client: int
    reason: str


@dataclass(frozen=True)
class ClientUpdates:
    """What came back from the clients, sorted by client id, as one array per tensor.

    Attributes:
        round: the round they answer.
        clients: int64 [k].
        tensors: name -> [k, ...]; after training the head, float32; else what ``RoundPlan.reply``
            says.
        num_examples: int64 [k], the examples each client trained on.
        loss: float64 [k], mean training loss: over the first local epoch's batches, or over all
            rows at the round's head where the plan says so.
        failures: clients that were planned and are missing here.
        training: what they were asked to do; known once they are accepted.
    """

    round: int
    clients: Int64
    tensors: Mapping[str, npt.NDArray[Any]]
    num_examples: Int64
    loss: Float64
    failures: tuple[ClientFailure, ...] = ()
    training: LocalTraining | None = None

    @property
    def steps(self) -> Int64:
        """tau_k: SGD steps that each client took, int64 [k]."""
        assert self.training is not None, "known once updates are accepted"
        size = self.training.batch_size
        return self.training.epochs * -(-self.num_examples // size)


def no_updates(plan: RoundPlan, head: Head, failures: tuple[ClientFailure, ...]) -> ClientUpdates:
    """A reply of nobody: only why clients have none."""
    none = {name: np.empty((0, *shape), dtype) for name, (shape, dtype) in plan.reply(head).items()}
    empty = np.empty(0, np.int64)
    return ClientUpdates(plan.round, empty, none, empty, np.empty(0), failures)


@dataclass(frozen=True)
class ClientMetrics:
    """Sums from which every metric of a head on one split follows, one row per client.

    Attributes:
        clients: int64 [k].
        loss_sum: float64 [k], summed cross-entropy in nats.
        correct: int64 [k, C], right predictions by true class.
        count: int64 [k, C], examples by true class.
    """

    clients: Int64
    loss_sum: Float64
    correct: Int64
    count: Int64


def join_metrics(parts: Sequence[ClientMetrics]) -> ClientMetrics:
    """Metrics of several groups of clients as one; at least one group."""
    return ClientMetrics(
        np.concatenate([part.clients for part in parts]),
        np.concatenate([part.loss_sum for part in parts]),
        np.concatenate([part.correct for part in parts]),
        np.concatenate([part.count for part in parts]),
    )

"""The data that travels between the floors: populations, plans, updates and metrics.

Axes: K clients, k clients of a cohort, N examples, B batch, D features, C classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
``hidden.<i>.weight`` [H, D] and ``hidden.<i>.bias`` [H] in front of them. Cosine and prototype:
also ``cosine.scale`` or ``prototype.scale`` [1]; ``clients.batched.classify`` has the scores of
each. What is trained before them has ``TAIL`` before its name."""

LAST = ("weight", "bias", "cosine.scale", "prototype.scale")
"""Names that tensors of a head's last layer have; every head has the first two."""

DOMAIN = "domain."
"""Before the tensors of a classifier of domains, which may travel with an MLP head in training."""


TAIL = "tail."
"""Before the tensors of the network between the cut and the head, where they are trained too."""

MERGED = ".merged"
"""How names of tensors end that clients are given, and neither train nor send back."""


def float32(values: Float64) -> Float32:
    """Rounded once; what overflows is infinite, and refused by whoever validates it."""
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


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


@dataclass(frozen=True, eq=False)
class Tail:
    """The network between the cut and the head, as plain values that any process can build from.

    Attributes:
        recipe: JSON values from which ``transfer.tails`` makes it.
        shape: of one example's activations at the cut; features are [N, prod(shape)].
        width: D of what it gives the head.
        tensors: all its tensors by name as they were before training; those that a head has too,
            with TAIL before their name, are trained.
        digest: hex BLAKE2b over all that; tails of the same digest are equal.
    """

    recipe: Mapping[str, Any]
    shape: tuple[int, ...]
    width: int
    tensors: Mapping[str, npt.NDArray[Any]]
    digest: str = field(default="", init=False)

    def __post_init__(self) -> None:
        facts = json.dumps([self.recipe, self.shape, self.width], sort_keys=True)
        digest = hashlib.blake2b(facts.encode(), digest_size=32)
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(np.ascontiguousarray(tensor).tobytes())
        object.__setattr__(self, "digest", digest.hexdigest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tail) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


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
        tail: the network between features and head; None where the head stands on them.
    """

    features: npt.NDArray[np.floating]
    labels: Int32
    classes: tuple[str, ...]
    train: Rows
    test: Rows
    names: tuple[str, ...]
    domains: tuple[str, ...]
    tail: Tail | None = None

    @property
    def width(self) -> int:
        """D of what the head stands on."""
        return int(self.features.shape[1]) if self.tail is None else self.tail.width

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
            self.width,
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
    that are not trained stay as they are, bit for bit. ``prior_strength`` is balanced softmax's
    tau: the loss is that of the scores + tau log(class frequencies of the client); 0 is without.
    ``adversarial`` is the weight of the reversed domain loss, see ``clients.adversarial``.

    Of the network behind the cut: ``tail_rate`` times the learning rate is its own, the gradient
    of its tensors gains ``l2_pretrained`` * (w - w_pretrained), and tensors whose names begin with
    one of ``still`` are not trained, nor those before the last ``unfrozen`` blocks (0: all are).
    ``label_smoothing``, ``mixup`` (alpha), ``dropout`` (before the head's last layer), ``noise``
    (on activations, in their own deviations) and ``early_stopping`` (epochs without a better loss
    on ``validation_fraction`` of the client's training examples; 0 is never) are what their names
    say, see ``clients.autograd``.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal: float = 0.0
    layers: Layers = "all"
    prior_strength: float = 0.0
    adversarial: float = 0.0
    tail_rate: float = 1.0
    l2_pretrained: float = 0.0
    still: tuple[str, ...] = ()
    unfrozen: int = 0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    dropout: float = 0.0
    noise: float = 0.0
    validation_fraction: float = 0.0
    early_stopping: int = 0

    def trains_on(self, counts: Int64) -> Int64:
        """Of so many training examples, how many a client trains on; it judges itself by the rest.

        Whoever has two or more has at least one for each.
        """
        if not self.validation_fraction:
            return counts
        held = np.floor(self.validation_fraction * counts + 0.5).astype(np.int64)
        least, most = np.minimum(1, counts // 2), np.maximum(0, counts - 1)
        return np.asarray(counts - np.clip(held, least, most))


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

"""What travels: facts as JSON and tensors as safetensors, in one blob; read with suspicion.

``pack`` and ``unpack`` know nothing of clients; the typed pairs below them turn plans, updates and
metrics into facts and tensors and back. No pickle, no code, no path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NoReturn, get_args

import numpy as np
import numpy.typing as npt

from fedtl.engines.protected import flaw_of
from fedtl.errors import InputError
from fedtl.plans import (
    Compression,
    Packing,
    Personal,
    Personalisation,
    Protection,
    Report,
    RoundPlan,
    Statistics,
    Task,
)
from fedtl.scenario.strategies import MOST_RANDOM_FEATURES
from fedtl.types import (
    ClientFailure,
    ClientMetrics,
    ClientUpdates,
    Float32,
    Head,
    Int64,
    Layers,
    LocalTraining,
)

PROTOCOL = 5
"""Raised whenever an older server or client could misread what is sent."""

SECURE_PHASES = ("secagg_keys", "secagg_shares", "secagg_reveal")
"""Of a secure sum: before the training, but for the last."""

MESSAGE_TYPES: Mapping[str, str] = {
    "join": "query.join",
    "weights": "query.weights",
    "prepare": "query.prepare",
    "train": "train",
    "evaluate": "evaluate",
    "alone": "train.alone",
    "personal": "evaluate.personal",
    **{phase: f"query.{phase}" for phase in SECURE_PHASES},
}
"""What a node can be asked, and Flower's message type for it."""

Tensors = Mapping[str, npt.NDArray[Any]]

FACTS = "fedtl"
DTYPES: Mapping[str, str] = {
    "F32": "<f4", "F64": "<f8", "I8": "|i1", "I32": "<i4", "I64": "<i8", "U32": "<u4", "U64": "<u8",
    "U8": "|u1",
}  # fmt: skip
HEAD = "head."
"""Before the names of a head's tensors."""
CORRECTION = "correction."
"""Before the names of what is added to the head's gradients."""
SGD = LocalTraining(1, 1, 0.1)
OPTIONS: Mapping[str, Any] = {
    "statistics": Statistics(),
    "compression": Compression("top_k"),
    "personal": Personal("finetune"),
    "protection": Protection(),
}
"""What a plan may have besides: one of each, for its fields and their types."""
COLUMNS = {"noise_keys": np.uint64, "weights": np.float64}
"""Columns that a plan may have besides."""
METRICS = tuple(ClientMetrics.__dataclass_fields__)
LARGEST_ANSWER = 2**31
"""Bytes of what the clients of one request may be asked for together."""
MAX_TENSORS, MAX_AXES, MAX_HEADER = 2**13, 8, 2**22


def pack(facts: Mapping[str, Any], tensors: Tensors) -> bytes:
    """Facts (JSON values, finite numbers) and tensors (see DTYPES) as one blob."""
    from safetensors.numpy import save

    known = set(DTYPES.values())
    for name, tensor in tensors.items():
        assert tensor.dtype.newbyteorder("<").str in known, f"{name}: {tensor.dtype}"
    text = json.dumps(facts, allow_nan=False, separators=(",", ":"))
    whole = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    return bytes(save(whole, metadata={FACTS: text}))


def unpack(content: bytes, max_bytes: int) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Facts and tensors of a blob; the tensors are read-only views of it.

    Raises:
        InputError: whatever is wrong with it; nothing larger than the blob was allocated.
    """
    if len(content) > max_bytes:
        refuse("it is too large", f"{len(content)} bytes", f"at most {max_bytes}")
    header_bytes = int.from_bytes(content[:8], "little") if len(content) >= 8 else -1
    if not 2 <= header_bytes <= min(MAX_HEADER, len(content) - 8):
        refuse("its header is longer than itself, or missing", f"{len(content)} bytes")
    header = _json(content[8 : 8 + header_bytes], "its header")
    facts = _facts(header.pop("__metadata__", None))
    if len(header) > MAX_TENSORS:
        refuse("it has too many tensors", len(header), f"at most {MAX_TENSORS}")
    body, tensors, used = memoryview(content)[8 + header_bytes :], {}, 0
    for name, entry in header.items():
        tensor, first, stop = _tensor(name, entry, body)
        if first != used:
            refuse(f"tensor {name!r} does not begin where the one before it ends")
        tensors[name], used = tensor, stop
    if used != len(body):
        refuse("its tensors do not fill it", f"{len(body)} bytes", f"{used}")
    return facts, tensors


def _tensor(name: str, entry: Any, body: memoryview) -> tuple[npt.NDArray[Any], int, int]:
    """One tensor and the range of bytes it takes."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse(f"tensor {name!r} is not described as tensors are")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        refuse(f"tensor {name!r} has a wrong type", entry["dtype"], ", ".join(DTYPES))
    if not _sizes(shape) or len(shape) > MAX_AXES or not _sizes(offsets) or len(offsets) != 2:
        refuse(f"tensor {name!r} has no proper shape or place")
    dtype = np.dtype(DTYPES[entry["dtype"]])
    count, (first, stop) = math.prod(shape), offsets
    if not first <= stop <= len(body) or stop - first != count * dtype.itemsize:
        refuse(f"tensor {name!r} has another size than its shape", f"{stop - first} bytes", shape)
    if count == 0:
        return np.empty(_empty(shape), dtype), first, stop
    tensor = np.frombuffer(body, dtype, count, first).reshape(shape)
    return (tensor if tensor.flags.aligned else tensor.copy()), first, stop


def _sizes(values: Any) -> bool:
    """Whether it is a list of whole numbers that an array can have."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)


def _empty(shape: list[int]) -> list[int]:
    """The shape of an empty array, if NumPy can have it."""
    if math.prod(size for size in shape if size) >= 2**48:
        refuse("an empty tensor has an absurd shape", shape)
    return shape


def _facts(metadata: Any) -> dict[str, Any]:
    if not isinstance(metadata, dict) or set(metadata) != {FACTS}:
        refuse("it holds no facts")
    if not isinstance(text := metadata[FACTS], str):
        refuse("its facts are no text")
    return _json(text, "what it says")


def _json(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object; NaN, infinities and anything else that is no JSON are refused."""
    try:
        found = json.loads(text, parse_constant=_constant, parse_float=_finite)
    except (ValueError, RecursionError):
        refuse(f"{what} cannot be read")
    if not isinstance(found, dict):
        refuse(f"{what} is no table")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def refuse(what: str, got: object = None, allowed: object = None) -> NoReturn:
    """Raises InputError for a message that is not what it should be."""
    raise InputError(f"a malformed message: {what}", got=got, allowed=allowed)


def train_request(plan: RoundPlan, head: Head) -> tuple[dict[str, Any], Tensors]:
    """Facts and tensors that ask clients to do a round's task; read by ``read_plan``."""
    facts = {
        "round": plan.round,
        "task": plan.task,
        "training": asdict(plan.training),
        "reports": list(plan.reports),
        **{name: asdict(own) for name in OPTIONS if (own := getattr(plan, name)) is not None},
    }
    corrections = {CORRECTION + name: tensor for name, tensor in plan.corrections.items()}
    known = ("clients", "batch_keys", *COLUMNS)
    own = {name: c for name in known if (c := getattr(plan, name)) is not None}
    return facts, {**own, **corrections, **_sent(head)}


def read_plan(facts: Mapping[str, Any], tensors: Tensors) -> tuple[RoundPlan, Head]:
    """The plan and the head of a request for a round's task."""
    clients = _vector(tensors, "clients", np.int64)
    keys = _vector(tensors, "batch_keys", np.uint64, len(clients))
    task: Any = facts.get("task")
    reports = facts.get("reports")
    if task not in get_args(Task):
        refuse("it asks for an unknown task")
    if not isinstance(reports, list) or not set(map(str, reports)) <= set(get_args(Report)):
        refuse("it asks for an unknown report")
    head = read_head(tensors)
    plan = RoundPlan(
        whole(facts, "round"),
        clients,
        keys,
        record(facts.get("training"), "training", SGD),
        task=task,
        corrections=_corrections(tensors, head, len(clients)),
        reports=tuple(reports),
        **{
            name: record(facts[name], name, like) for name, like in OPTIONS.items() if name in facts
        },
    )
    columns: dict[str, Any] = {
        name: _vector(tensors, name, dtype, len(clients))
        for name, dtype in COLUMNS.items()
        if name in tensors
    }
    plan = replace(plan, **columns)
    if task == "statistics" and plan.statistics is None:
        refuse("it does not say which statistics")
    named = (
        (plan.compression and plan.compression.kind, Packing),
        (plan.personal and plan.personal.method, Personalisation),
        (plan.training.layers, Layers),
    )
    for given, known in named:
        if given is not None and given not in get_args(known):
            refuse("it asks for something unknown", given, ", ".join(get_args(known)))
    _bounded(plan, head)
    return plan, head


def _bounded(plan: RoundPlan, head: Head) -> None:
    """Refuse what could not be answered, or only with more memory than any answer may take."""
    asked = plan.statistics
    if asked is not None and not 0 <= asked.random_features <= MOST_RANDOM_FEATURES:
        refuse("it asks for too many random features", asked.random_features)
    if plan.personal is not None and not 0 <= plan.personal.neighbours < 2**31:
        refuse("it asks for an impossible number of neighbours", plan.personal.neighbours)
    if plan.weights is not None and not ((plan.weights > 0) & (plan.weights <= 1)).all():
        refuse("its weights in the sum are not above 0 and at most 1")
    if flaw := flaw_of(plan):
        refuse(flaw, plan.protection)
    if "weight" not in head or head["weight"].ndim != 2:
        refuse("it has no head")
    if plan.up_bytes(head) * len(plan.clients) > LARGEST_ANSWER:
        refuse("its answer would be too large", plan.up_bytes(head), f"{LARGEST_ANSWER} bytes")


def _corrections(tensors: Tensors, head: Head, num_clients: int) -> dict[str, Float32]:
    """What is added to the gradients, none or for every tensor of the head."""
    found = {n.removeprefix(CORRECTION): t for n, t in tensors.items() if n.startswith(CORRECTION)}
    for name, tensor in found.items():
        shape = (num_clients, *head[name].shape) if name in head else None
        if tensor.dtype != np.float32 or tensor.shape != shape or len(found) != len(head):
            refuse("its corrections do not fit the head")
    return found


def updates_reply(updates: ClientUpdates) -> tuple[dict[str, Any], Tensors]:
    """Facts and tensors of trained clients; read by ``read_updates``."""
    columns = {"clients": updates.clients, "examples": updates.num_examples, "loss": updates.loss}
    failed = [[failure.client, failure.reason] for failure in updates.failures]
    facts = {"round": updates.round} | ({"failed": failed} if failed else {})
    return facts, {**columns, **_sent(updates.tensors)}


def read_updates(
    round: int, clients: Int64, tensors: Tensors, facts: Mapping[str, Any] | None = None
) -> ClientUpdates:
    """A node's updates, of exactly the clients it was asked for, but those that failed.

    Whether names, shapes and values fit the head is for ``strategies.validation``, which looks at
    every engine's updates alike.
    """
    answered = _vector(tensors, "clients", np.int64)
    failures = _failures((facts or {}).get("failed", []))
    failed = [failure.client for failure in failures]
    left = clients[~np.isin(clients, failed)]
    if len(left) + len(failed) != len(clients) or not np.array_equal(answered, left):
        refuse("it answers for other clients than it was asked for")
    examples = _vector(tensors, "examples", np.int64, len(left))
    loss = _vector(tensors, "loss", np.float64, len(left))
    extra = set(tensors) - {"clients", "examples", "loss"}
    if strange := sorted(name for name in extra if not name.startswith(HEAD)):
        refuse(f"it has a tensor {strange[0]!r} that nobody asked for")
    return ClientUpdates(round, answered, read_head(tensors), examples, loss, failures)


def _failures(listed: Any) -> tuple[ClientFailure, ...]:
    """Clients of a node that have no update, and why."""
    pairs = isinstance(listed, list) and all(isinstance(entry, list) for entry in listed)
    if not pairs or any([type(value) for value in entry] != [int, str] for entry in listed):
        refuse("it has no proper list of failures")
    return tuple(ClientFailure(client, reason[:500]) for client, reason in listed)


def evaluate_request(head: Head, clients: Int64) -> tuple[dict[str, Any], Tensors]:
    """Facts and tensors that ask for a judgement; read by ``read_clients`` and ``read_head``."""
    return {}, {"clients": clients, **_sent(head)}


def read_clients(tensors: Tensors) -> Int64:
    """Whom a request is about, int64 [k]."""
    return _vector(tensors, "clients", np.int64)


def metrics_reply(metrics: ClientMetrics) -> tuple[dict[str, Any], Tensors]:
    """Facts and tensors of judged clients; read by ``read_metrics``."""
    return {}, dict(vars(metrics))


def read_metrics(clients: Int64, num_classes: int, tests: Int64, tensors: Tensors) -> ClientMetrics:
    """A node's metrics of exactly the clients it was asked for.

    Args:
        tests: int64 [k], the test examples each of them has: what it must have judged.
    """
    answered = _vector(tensors, "clients", np.int64)
    loss = _vector(tensors, "loss_sum", np.float64, len(clients))
    correct, count = tensors.get("correct"), tensors.get("count")
    if not np.array_equal(answered, clients) or set(tensors) != set(METRICS):
        refuse("it answers something else than it was asked for")
    shape = (len(clients), num_classes)
    for values in (correct, count):
        if values is None or values.dtype != np.int64 or values.shape != shape:
            refuse(f"its counts are no int64 of shape {shape}")
    assert correct is not None
    assert count is not None
    if (correct < 0).any() or (correct > count).any() or (count.sum(axis=1) != tests).any():
        refuse("its counts are not those of its test examples")
    return ClientMetrics(answered, loss, correct, count)


def reply_bytes(num_clients: int, num_bytes: int) -> int:
    """What an honest reply about so many clients has at most, ``num_bytes`` for each."""
    return num_clients * (num_bytes + 64) + 2**16


def read_head(tensors: Tensors) -> dict[str, Float32]:
    """A head, or stacked heads, among a message's tensors; their types are checked where used."""
    return {
        name.removeprefix(HEAD): tensor for name, tensor in tensors.items() if name.startswith(HEAD)
    }


def whole(facts: Mapping[str, Any], name: str) -> int:
    """A whole number among the facts, not negative."""
    value = facts.get(name)
    if type(value) is not int or not 0 <= value < 2**48:
        refuse(f"{name} is no whole number")
    return value


def _sent(head: Mapping[str, Float32]) -> dict[str, Float32]:
    return {HEAD + name: tensor for name, tensor in head.items()}


def _vector(
    tensors: Tensors, name: str, dtype: npt.DTypeLike, length: int | None = None
) -> npt.NDArray[Any]:
    """A column of a message, one value per client."""
    values = tensors.get(name)
    if values is None or values.dtype != dtype or values.ndim != 1:
        refuse(f"it has no proper column {name!r}")
    if length is not None and len(values) != length:
        refuse(f"column {name!r} has another length", len(values), length)
    return values


def record(content: Any, name: str, like: Any) -> Any:
    """One of fedtl's records, each field of its own type; what is too large is the kernel's to say.

    Args:
        like: a record of the same kind.
    """
    if not isinstance(content, dict) or _kinds(content) != _kinds(vars(like)):
        refuse(f"it has no proper {name}")
    return type(like)(**{f: tuple(v) if isinstance(v, list) else v for f, v in content.items()})


def _kinds(fields: Mapping[str, Any]) -> dict[str, type]:
    return {f: list if type(v) is tuple else type(v) for f, v in fields.items()}

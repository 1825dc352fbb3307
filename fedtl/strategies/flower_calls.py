"""How a strategy of Flower's is found, called and understood: its class, its grid, its messages."""

from __future__ import annotations

import gc
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid, strategy
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity

from fedtl.errors import FedtlError, InputError, nearest, unknown_name
from fedtl.types import ClientUpdates, Head, Int64, LocalTraining

NEEDS_MORE: dict[str, str] = {
    **dict.fromkeys(
        [name for name in strategy.__all__ if name.startswith("DifferentialPrivacy")],
        "it wraps another strategy, and its noise comes from a stream that no run can repeat",
    ),
    **dict.fromkeys(
        [name for name in strategy.__all__ if name.startswith("FedXgb")],
        "it joins boosted trees, and what is trained here is a head on features",
    ),
}
"""Flower's strategies that cannot run here, and why."""

USABLE = [name for name in strategy.__all__ if name not in {*NEEDS_MORE, "Result", "Strategy"}]

TRAINING = {
    "lr": "learning_rate",
    "learning-rate": "learning_rate",
    "local-epochs": "epochs",
    "batch-size": "batch_size",
    "proximal-mu": "proximal",
}
"""Keys of a train config that have an effect, and the hyper-parameter of ``LocalTraining`` each
sets. All others travel nowhere and are ignored."""

MOST_LOOKS = 10
"""A strategy that looks this often which nodes there are waits for some that never come."""


def find_class(path: str) -> type[Strategy]:
    """The class behind a name of Flower's, ``module:Class`` or ``package.module.Class``.

    A module is looked for as ``import`` does, then in the current folder. Importing runs its code:
    it is the scenario's owner who names it.

    Raises:
        InputError: no such class, or one that cannot run here.
    """
    where = "strategy.class"
    if ":" not in path and "." not in path:
        if path not in {*USABLE, *NEEDS_MORE}:
            raise unknown_name("strategy of Flower's", path, USABLE, where)
        found: Any = getattr(strategy, path)
    else:
        module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
        content = _imported(module, where)
        found = getattr(content, name, None)
        if found is None:
            named = [n for n, value in vars(content).items() if isinstance(value, type)]
            raise unknown_name(f"class in module {module}", name, named, where)
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise InputError(
            "no strategy for Flower's message API",
            where=where,
            got=repr(path),
            allowed="subclasses of flwr.serverapp.strategy.Strategy",
            do="A strategy written for flwr.server.strategy has to be ported to it first",
        )
    for name, reason in NEEDS_MORE.items():
        if issubclass(found, getattr(strategy, name)):
            raise InputError(f"cannot run here: {reason}", where=where, got=repr(path))
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise InputError(f"is abstract: it lacks {missing}", where=where, got=repr(path))
    return found


def _imported(module: str, where: str) -> Any:
    here = os.getcwd()
    sys.path.append(here)
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"module {module} cannot be imported: {type(error).__name__}: {error}",
            where=where,
            do=f"It is looked for on Python's path and in {here}",
        ) from error
    finally:
        sys.path.remove(here)


def make_instance(kind: type[Strategy], parameters: Mapping[str, Any]) -> Strategy:
    """An instance from keyword arguments. Raises InputError where they do not fit."""
    known = inspect.signature(kind).parameters.values()
    where, name = "strategy.parameters", kind.__name__
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known)
    named = {p.name: p for p in known if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for given in parameters:
        if given not in named and not open_ended:
            hint = nearest(given, named)
            raise InputError(
                f"{name} knows no parameter of this name",
                where=where,
                got=repr(given),
                allowed=", ".join(named) or "none",
                do=f"Did you mean {hint!r}?" if hint else None,
            )
    missing = [n for n, p in named.items() if p.default is p.empty and n not in parameters]
    if missing:
        raise InputError(
            f"{name} needs {' and '.join(missing)}",
            where=where,
            do=f"e.g. parameters = {{{missing[0]} = ...}}",
        )
    return kind(**parameters)


@contextmanager
def calling(what: str, key: int, where: object) -> Iterator[None]:
    """Run code of a strategy: seeded, quiet, and with its errors as ours.

    Args:
        what: class and method, for the error.
        key: seeds Python's and NumPy's global generators, which go on afterwards as before.
        where: for the error.

    Raises:
        InputError: for every exception of the strategy's.
    """
    import random

    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    identity = {name: vars(TaskIdentity)[name] for name in ("_task_id", "_run_id", "_node_id")}
    logger = logging.getLogger("flwr")
    silent, logger.disabled = logger.disabled, True
    gc.freeze()  # some of Flower's collect garbage for every reply, 20 ms each time
    random.seed(key)
    np.random.set_state({**np.random.MT19937(key).state})  # noqa: NPY002
    nameless = None in identity.values()
    if nameless:  # a message cannot be made without
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused by name
            yield
    except FedtlError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise InputError(f"{what} failed: {text}", where=where) from error
    finally:
        gc.unfreeze()
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        logger.disabled = silent
        for name, number in identity.items() if nameless else ():
            setattr(TaskIdentity, name, number)


class Cohort(Grid):
    """The grid a strategy is shown: exactly the round's clients, and no way to talk to them."""

    def __init__(self, nodes: list[int]) -> None:
        self._nodes, self._looks = nodes, 0

    def get_node_ids(self) -> Iterable[int]:
        """The round's clients."""
        self._looks += 1
        if self._looks > MOST_LOOKS:
            raise RuntimeError(f"it waits for more clients than the {len(self._nodes)} of a round")
        return list(self._nodes)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As a grid of Flower's does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    @property
    def run(self) -> Any:
        """Refused."""
        raise self._refusal("grid.run")

    def set_run(self, run: Any) -> None:
        """Refused."""
        raise self._refusal("grid.set_run")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refused."""
        raise self._refusal("grid.push_messages")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refused."""
        raise self._refusal("grid.pull_messages")

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Refused."""
        raise self._refusal("grid.send_and_receive")

    @staticmethod
    def _refusal(what: str) -> RuntimeError:
        return RuntimeError(
            f"it calls {what}, but clients are asked only by the messages that it returns"
        )


def record_of(tensors: Mapping[str, np.ndarray[Any, Any]]) -> ArrayRecord:
    """Tensors as Flower's record."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in tensors.items()})


def read_messages(
    messages: Iterable[Message], sent: ArrayRecord, nodes: Iterable[int], who: str, round: int
) -> dict[int, dict[str, Any]]:
    """What a strategy would send: node -> its train config's entries that have an effect.

    Raises:
        InputError: messages of another kind, to nodes that are not there or twice to one, or with
            other arrays than the global ones.
    """
    asked: dict[int, dict[str, Any]] = {}
    known = set(nodes)
    for message in messages:
        node, category = message.metadata.dst_node_id, message.metadata.message_type
        problem = None
        if category.partition(".")[0] != MessageType.TRAIN:
            problem = f"a message of type {category!r}, only {MessageType.TRAIN!r} is done here"
        elif node not in known:
            problem = f"a message to node {node}, which is not in the round"
        elif node in asked:
            problem = f"two messages to node {node}, a client trains once in a round"
        elif not all(_same(record, sent) for record in message.content.array_records.values()):
            problem = "other arrays than the global ones, every client starts from the same head"
        elif len(message.content.array_records) != 1:
            problem = f"{len(message.content.array_records)} array records, clients know one head"
        if problem is not None:
            raise InputError(f"{who}.configure_train sends {problem}", where=f"round {round}")
        asked[node] = {
            key: value
            for record in message.content.config_records.values()
            for key, value in record.items()
            if key in TRAINING
        }
    return asked


def _same(record: ArrayRecord, sent: ArrayRecord) -> bool:
    return record is sent or (
        list(record) == list(sent) and all(record[k].data == sent[k].data for k in sent)
    )


def changed_training(
    training: LocalTraining, config: Mapping[str, Any], who: str, round: int
) -> LocalTraining:
    """Hyper-parameters after a train config's say. Raises InputError for impossible values."""
    for key, value in config.items():
        whole = TRAINING[key] in ("epochs", "batch_size")
        least = 1 if whole else 0
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not fits or not least <= value < 2**31 or (value == 0 and key != "proximal-mu"):
            raise InputError(
                f"{who}.configure_train gives clients an impossible {key}",
                where=f"round {round}",
                got=repr(value),
                allowed="a whole number of at least 1" if whole else "a number above 0",
            )
        change: dict[str, Any] = {TRAINING[key]: value if whole else float(value)}
        training = replace(training, **change)
    return training


def replies(
    updates: ClientUpdates, names: Iterable[str], nodes: Int64, arrays: str, weight: str, loss: str
) -> list[Message]:
    """Clients' answers as Flower's clients give them, in the order of ``updates``.

    Args:
        names: the head's tensors in their order, which Flower goes by.
        nodes: the clients' node ids, int64 [k].
        arrays: the array record's key.
        weight, loss: the metrics' keys; the weight is the client's number of examples.
    """
    answers = []
    for i, node in enumerate(nodes.tolist()):
        asked = Message(RecordDict(), node, MessageType.TRAIN)
        examples = int(updates.num_examples[i])
        metrics: dict[str, int | float | list[int] | list[float]] = {
            "num-examples": examples,
            weight: examples,
            loss: float(updates.loss[i]),
        }
        head = record_of({name: updates.tensors[name][i] for name in names})
        content = RecordDict({arrays: head, "metrics": MetricRecord(metrics)})
        answers.append(Message(content, reply_to=asked))
    return answers


def head_of(arrays: Any, before: Head, who: str, round: int) -> Head:
    """A strategy's answer as float32 tensors, rounded once.

    Raises:
        InputError: other names or shapes than the head's, or values that are not finite.
    """
    if not isinstance(arrays, ArrayRecord):
        raise TypeError(f"it gives {type(arrays).__name__}, allowed: ArrayRecord or None")
    after = {name: array.numpy() for name, array in arrays.items()}
    given = {name: value.shape for name, value in after.items()}
    wanted = {name: value.shape for name, value in before.items()}
    where = f"round {round}"
    if given != wanted:
        raise InputError(
            f"{who}.aggregate_train gives another head", where=where, got=given, allowed=wanted
        )
    head = {name: np.asarray(after[name], np.float32) for name in before}
    for name, value in head.items():
        if not np.isfinite(value).all():
            raise InputError(
                f"{who}.aggregate_train gives values that are not finite in {name}",
                where=where,
                do="Training diverged, or the strategy divides by zero",
            )
    return head


def config_record(entries: Mapping[str, Any]) -> ConfigRecord:
    """A train config."""
    return ConfigRecord(dict(entries))

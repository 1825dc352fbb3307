"""Flower's side of a node: a message in, the node's answer out.

``app`` is what Flower runs in simulation. Real clients never run an app that a server sends them:
their resident process hands messages to a node of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtl.clients.personal_store import PersonalStore
from fedtl.engines.exchange import Facts
from fedtl.engines.hosting import open_population
from fedtl.engines.node import Node
from fedtl.engines.wire import MESSAGE_TYPES
from fedtl.errors import InputError, SecurityRefusal
from fedtl.machine import versions
from fedtl.plans import RoundPlan
from fedtl.types import Int64, Population

RECORD, SIMULATION = "fedtl", "simulation"
KINDS = {message_type: kind for kind, message_type in MESSAGE_TYPES.items()}


def read_message(message: Message) -> tuple[bytes, bytes]:
    """Content and signature of a message. Raises InputError where it is none of ours."""
    record = message.content.get(RECORD) if message.has_content() else None
    content = record.get("content") if isinstance(record, ConfigRecord) else None
    signature = record.get("signature", b"") if isinstance(record, ConfigRecord) else b""
    if not isinstance(content, bytes) or not isinstance(signature, bytes):
        raise InputError("a malformed message: it holds nothing of fedtl's")
    return content, signature


def write_record(content: bytes, signature: bytes = b"") -> RecordDict:
    """What a message of ours holds."""
    return RecordDict({RECORD: ConfigRecord({"content": content, "signature": signature})})


class SimulatedHost:
    """Clients ``partition``, ``partition + num_nodes``, ... of a population on this machine's disk.

    Args:
        folder: what ``hosting.save_population`` wrote.
        partition, num_nodes: this node's number and how many there are.
        store: where simulated clients keep what is theirs.
    """

    def __init__(
        self, folder: Path, partition: int, num_nodes: int, store: PersonalStore | None = None
    ) -> None:
        self._folder, self._partition, self._num_nodes = folder, partition, num_nodes
        self._store = store

    def join(self, facts: Facts) -> Facts:
        """Which share of the clients is here, and on what."""
        own = np.arange(self._partition, self.population().num_clients, self._num_nodes)
        return {
            "partition": self._partition,
            "num_nodes": self._num_nodes,
            "clients": len(own),
            "examples": int(self.population().train.counts[own].sum()),
            "versions": versions(),
        }

    def weights(self, facts: Facts, tensors: Any) -> Facts:
        """Simulated clients have their features already."""
        raise InputError("simulated clients take no weights")

    def prepare(self, facts: Facts) -> Facts:
        """Simulated clients have their features already."""
        raise InputError("simulated clients need no preparation")

    def population(self) -> Population:
        """Everybody's; opened once in a process."""
        return open_population(self._folder)

    def consent(self, plan: RoundPlan) -> None:
        """Simulated clients do whatever there is."""

    def protected(self, plan: RoundPlan) -> None:
        """Simulated clients were promised nothing."""

    def store(self) -> PersonalStore | None:
        """The run's."""
        return self._store

    def ids(self, clients: Int64) -> Int64:
        """The ids themselves, if all of them are hosted here."""
        total = self.population().num_clients
        strange = (
            (clients < 0) | (clients >= total) | (clients % self._num_nodes != self._partition)
        )
        if strange.any():
            raise InputError(f"client {clients[strange][0]} is not hosted here")
        return clients


def simulated_node(message: Message, context: Context) -> Node:
    """The node of a simulated SuperNode; made anew for each message, its data stay open."""
    from fedtl.engines.ray_cluster import in_worker  # real clients have nothing to do with Ray

    setting = message.content.get(SIMULATION)
    partition = context.node_config.get("partition-id")
    num_nodes = context.node_config.get("num-partitions")
    # A server must not be able to name a path that a real client then opens.
    if not in_worker() or not isinstance(partition, int) or not isinstance(num_nodes, int):
        raise SecurityRefusal(
            "this app runs in simulation only", do="Real clients use 'fedtl client start'"
        )
    if not isinstance(setting, ConfigRecord):
        raise InputError("a malformed message: it does not say where the simulated clients are")
    block_size = int(str(setting["block_size"])) or None
    kept = str(setting["store"])
    store = PersonalStore(Path(kept)) if kept else None
    host = SimulatedHost(Path(str(setting["folder"])), partition, num_nodes, store)
    return Node(host, 1, str(setting["device"]), block_size, discreet=False, simulated=True)


def answer_simulated(message: Message, context: Context) -> Message:
    """Any of the server's requests."""
    content, signature = read_message(message)
    node = simulated_node(message, context)
    reply = node.answer(KINDS[message.metadata.message_type], content, signature)
    return Message(write_record(reply), reply_to=message)


def make_app(answer: Any = answer_simulated) -> ClientApp:
    """A ClientApp that answers every kind of request with ``answer(message, context)``."""
    made = ClientApp()
    for message_type in KINDS:
        category, _, action = message_type.partition(".")
        register = getattr(made, category)
        (register(action) if action else register())(answer)
    return made


app = make_app()

"""The seam between the one round loop and where clients live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fedtl.plans import RoundPlan
from fedtl.types import ClientMetrics, ClientUpdates, Head, Int64


class Engine(Protocol):
    """Runs clients somewhere: in this process, on a cluster, on other people's machines.

    An engine whose clients work apart from this process, and should do so at the same time, says in
    ``held_bytes`` how much of what they answer may be held at once.

    Every engine calls the kernel in ``fedtl.clients``, so all give the same bits.
    """

    def start(self, head: Head) -> None:
        """Make ready for rounds with such a head: compile, connect, start workers.

        What this takes is told apart from the rounds.
        """
        ...

    def run_clients(self, plan: RoundPlan, head: Head) -> Sequence[ClientUpdates]:
        """Local training of the plan's clients, as replies of one or more clients in any order.

        A client that could not answer is a failure in a reply, or simply missing.
        """
        ...

    def evaluate(self, head: Head, clients: Int64) -> ClientMetrics:
        """The head judged on each given client's own test examples, sorted by client id."""
        ...

    def close(self) -> None:
        """Let go of workers, connections and memory."""
        ...

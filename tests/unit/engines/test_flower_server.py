"""The exchange over a grid: deadlines, late answers, lost nodes, keys. No Ray, no network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedtl.engines.flower_client import KINDS, answer_simulated, read_message, write_record
from fedtl.engines.flower_server import FlowerExchange
from fedtl.engines.wire import pack, unpack
from fedtl.errors import InputError, SecurityRefusal


@dataclass
class Grid:
    """Answers every message with what it says; ``held`` nodes answer when they are let go."""

    keys: dict[int, bytes] = field(default_factory=lambda: {1: b"one", 2: b"two"})
    held: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    broken: dict[int, str] = field(default_factory=dict)
    twice: bool = False
    messages: dict[str, Message] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.keys)

    def get_nodes(self) -> Iterable[SimpleNamespace]:
        return [SimpleNamespace(node_id=n, public_key=key) for n, key in self.keys.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        (message,) = messages
        if message.metadata.dst_node_id in self.refused:
            return []
        name = f"message-{next(self.numbers)}"
        message.metadata.__dict__["_message_id"] = name
        self.messages[name] = message
        return [name]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for name in set(message_ids) & set(self.messages):
            message = self.messages[name]
            node = message.metadata.dst_node_id
            if node in self.held:
                continue
            if not self.twice:
                del self.messages[name]
            if node in self.broken:
                error = Error(code=0, reason=self.broken[node])
                replies.append(Message(error, reply_to=message))
                continue
            facts, _ = unpack(read_message(message)[0], 10**6)
            said = {**facts, "said": f"{node} heard {facts['word']}"}
            replies.append(Message(write_record(pack(said, {})), reply_to=message))
        return replies


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 5, 1, 1


def asked(exchange: FlowerExchange, deadline: float | None = None, round: int = 1):
    facts = {"word": "hello", "round": round}
    return dict(exchange.ask("train", {1: (facts, {}), 2: (facts, {})}, deadline))


def test_everybody_answers_and_traffic_is_counted() -> None:
    exchange = FlowerExchange(Grid())
    answers = asked(exchange)
    assert {n: a.facts["said"] for n, a in answers.items()} == {
        1: "1 heard hello", 2: "2 heard hello",
    }  # fmt: skip
    traffic = exchange.traffic()
    assert set(traffic) == {(1, "train"), (2, "train")}
    assert all(t.messages == 1 and 0 < t.sent < t.received < 500 for t in traffic.values())


def test_the_silent_are_left_at_the_deadline_and_told_when_they_come_late() -> None:
    late: list[tuple[int, str, int]] = []
    grid = Grid(held={2})
    exchange = FlowerExchange(grid, late=lambda *what: late.append(what))
    assert set(asked(exchange, 0.05, round=1)) == {1}
    assert late == []
    grid.held.clear()
    answers = asked(exchange, 5.0, round=2)
    assert set(answers) == {1, 2}
    assert late == [(2, "train", 1)]


def test_who_has_heard_enough_leaves_the_rest_to_be_late() -> None:
    late: list[tuple[int, str, int]] = []
    grid = Grid(held={2})
    exchange = FlowerExchange(grid, late=lambda *what: late.append(what))
    answers = exchange.ask("train", {1: ({"word": "a"}, {}), 2: ({"word": "a"}, {})})
    assert next(answers)[0] == 1
    answers.close()
    grid.held.clear()
    asked(exchange)
    assert late == [(2, "train", 0)]


def test_an_answer_that_comes_twice_counts_once() -> None:
    exchange = FlowerExchange(Grid(twice=True))
    first, second = asked(exchange), asked(exchange)
    assert set(first) == set(second) == {1, 2}


def test_over_another_grid_the_old_questions_are_forgotten() -> None:
    late: list[tuple[int, str, int]] = []
    exchange = FlowerExchange(Grid(held={1, 2}), late=lambda *what: late.append(what))
    assert asked(exchange, 0.03) == {}
    exchange.connect(Grid())
    assert set(asked(exchange)) == {1, 2}
    assert late == []


def test_trouble_ends_the_waiting_for_everybody() -> None:
    exchange = FlowerExchange(Grid(held={2}), trouble=lambda: "Ray died")
    answers = asked(exchange)
    assert answers[1].error is None
    assert (answers[2].error, answers[2].lost) == ("Ray died", True)


@pytest.mark.parametrize(
    ("grid", "why"),
    [
        (Grid(refused={2}), "Flower did not take the message"),
        (
            Grid(broken={2: "<class 'ray.exceptions.ActorDiedError'>:<'The actor died\n...'>"}),
            "its process failed with ActorDiedError",
        ),
        (Grid(broken={2: "Out of\nluck"}), "Flower says: Out of luck"),
        (Grid(broken={2: "Error: Node Unavailable - no heartbeat"}), "its node went away"),
    ],
)
def test_lost_nodes_are_told_in_one_line(grid: Grid, why: str) -> None:
    answer = asked(FlowerExchange(grid))[2]
    assert (answer.error, answer.lost) == (why, True)


def test_nodes_without_an_approved_key_are_nobody() -> None:
    exchange = FlowerExchange(Grid({1: b"one", 3: b"stranger"}), names={b"one": "north"})
    assert exchange.nodes() == {1: "north"}
    assert FlowerExchange(Grid()).nodes() == {1: "", 2: ""}


def test_the_request_names_whom_it_is_for() -> None:
    grid = Grid(held={1})
    exchange = FlowerExchange(grid, names={b"one": "north"}, sign=lambda content: b"signed")
    exchange.nodes()
    list(exchange.ask("join", {1: ({"word": ""}, {})}, 0.01))
    (message,) = grid.messages.values()
    content, signature = read_message(message)
    assert unpack(content, 1000)[0]["to"] == "north"
    assert signature == b"signed"
    assert message.metadata.message_type == "query.join"


def test_an_app_outside_of_simulation_opens_no_path_that_a_server_names() -> None:
    content = write_record(b"x")
    content["simulation"] = ConfigRecord({"folder": "/etc", "device": "cpu", "block_size": 0})
    context = SimpleNamespace(node_config={"partition-id": 0, "num-partitions": 1})
    for message_type in KINDS:
        message = Message(content, 1, message_type)
        with pytest.raises(SecurityRefusal, match="simulation only"):
            answer_simulated(message, context)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"fedtl": ConfigRecord()}),
        RecordDict({"fedtl": ConfigRecord({"content": "text"})}),
        RecordDict({"fedtl": ConfigRecord({"content": b"", "signature": "text"})}),
    ],
)
def test_messages_that_are_not_ours_are_refused(content: RecordDict) -> None:
    with pytest.raises(InputError, match="malformed"):
        read_message(Message(content, 1, "train"))

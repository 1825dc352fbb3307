"""Who takes part: whoever comes in time, as who they are, whatever the order."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest

from fedtl import machine
from fedtl.checkpoints import check_identity
from fedtl.engines.node import NotPrepared
from fedtl.errors import EnvironmentFault, InputError, Interrupted, PolicyStop

IDENTITY = {"name": "identity", "weights": "default", "image_size": None}


@dataclass
class Actor:
    """A host that says what it is told to say.

    Attributes:
        polls: times that it is asked to prepare before it is ready.
        reads: times that it is asked to join before it has read its data.
        changes: facts of its replies that are replaced, by kind.
        fails: kind -> error.
    """

    name: str
    classes: str = "cat dog"
    polls: int = 0
    reads: int = 0
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    fails: dict[str, Exception] = field(default_factory=dict)
    joined: bool = False
    prepared: int = 0
    asked: int = 0
    orders: list[Any] = field(default_factory=list)

    def join(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        self._maybe_fail("join")
        if self.reads:
            self.reads -= 1
            return {"name": self.name, "reading": True}
        self.joined = True
        return {
            "name": self.name,
            "classes": self.classes.split(),
            "numbered": False,
            "examples": 50,
            "versions": machine.versions(),
            "has_backbone": True,
            "threads": 2,
            "device": "cpu",
            "cpu": "a fine one",
            "free_disk_bytes": 10**9,
            **self.changes.get("join", {}),
        }

    def prepare(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.joined:
            raise NotPrepared("not asked to join")
        self._maybe_fail("prepare")
        self.orders.append(tuple(facts["classes"]))
        if self.polls:
            self.polls -= 1
            self.asked += 1
            return {"ready": False, "done": self.asked, "total": 50}
        self.prepared += 1
        return {
            "ready": True,
            "train": 40,
            "test": 10,
            "width": 8,
            "domain": "",
            "way": "identity",
            "fingerprint": f"data of {self.name}",
            "left_out": 0,
            "leaks": 0,
            "seconds": 0.5,
            "backbone": BACKBONE,
            **self.changes.get("prepare", {}),
        }

    def weights(self, facts: Any, tensors: Any) -> Any:
        raise AssertionError

    def population(self) -> Any:
        raise AssertionError

    def consent(self, plan) -> None:
        pass

    def protected(self, plan) -> None:
        pass

    def store(self) -> None:
        return None

    def ids(self, clients: Any) -> Any:
        raise AssertionError

    def _maybe_fail(self, kind: str) -> None:
        if kind in self.fails:
            raise self.fails[kind]


BACKBONE = {
    "model": "identity", "cut": "none", "weights": "identity",
    "preprocessing": {
        "resize": 1, "crop": 1, "interpolation": "nearest", "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
    },
}  # fmt: skip


class Clock:
    """Time that passes when somebody sleeps, and what happens meanwhile."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.plans: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def at(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.plans, (1000.0 + seconds, next(self._count), act))

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        while self.plans and self.plans[0][0] <= self.now:
            heapq.heappop(self.plans)[2]()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Stage:
    """Actors behind nodes, and a server that gathers them."""

    def __init__(self, site: Any, clock: Clock) -> None:
        self.site, self.clock = site, clock
        self.watcher = site.watcher

    def put(self, actor: Actor, node: int, name: str | None = None) -> Any:
        return self.site.put(node, name or actor.name, actor)

    def remove(self, node: int) -> None:
        del self.site.nodes[node], self.site.names[node]

    def gathering(self, approved: str = "a b c", **changes: Any) -> Any:
        changes = {"join_seconds": 60.0, "quorum": 2, **changes}
        return self.site.gathering(
            approved=approved.split, clock=self.clock, sleep=self.clock.sleep, **changes
        )

    def gather(self, approved: str = "a b c", **changes: Any) -> Any:
        return self.gathering(approved, **changes).gather()

    @property
    def passed(self) -> float:
        return self.clock.now - 1000.0


@pytest.fixture
def stage(make_site: Callable[..., Any], clock: Clock) -> Stage:
    data = {"source": "arrays", "path": "/none.npz", "domains": False}
    site = make_site(data=data, clients={"partition": "natural"}, backbone=IDENTITY)
    stage = Stage(site, clock)
    stage.put(Actor("b"), 7)
    return stage


def test_one_after_the_other(stage: Stage) -> None:
    stage.clock.at(3, lambda: stage.put(Actor("c", "cat"), 2))
    stage.clock.at(9, lambda: stage.put(Actor("a", "cow dog"), 11))
    gathered = stage.gather()
    assert 9 <= stage.passed < 10  # not a moment longer than the last one took
    assert gathered.roster.names == ("a", "b", "c")
    assert gathered.roster.classes == ("cat", "cow", "dog")
    assert gathered.roster.train.tolist() == [40, 40, 40]
    assert gathered.roster.width == 8
    assert {n: c.tolist() for n, c in gathered.seats.items()} == {11: [0], 7: [1], 2: [2]}
    assert stage.watcher.of("joined") == [("b",), ("c",), ("a",)]
    waits = stage.watcher.of("waiting")
    assert waits[0][0] == ("a", "c")
    assert waits[-1][0] == ("a",)
    assert waits[0][1] > waits[-1][1] > 50
    assert stage.watcher.of("classes") == [(("cat", "cow", "dog"),)]


def test_the_order_of_coming_does_not_matter(make_site: Callable[..., Any]) -> None:
    found = []
    for order in itertools.permutations("abc"):
        data = {"source": "arrays", "path": "/none.npz", "domains": False}
        site = make_site(data=data, clients={"partition": "natural"}, backbone=IDENTITY)
        stage = Stage(site, Clock())
        for i, name in enumerate(order):
            actor = Actor(name, {"a": "cow", "b": "dog cat", "c": "dog"}[name])
            if i == 0:
                stage.put(actor, 5)
            else:
                stage.clock.at(i, partial(stage.put, actor, 10 * i))
        gathered = stage.gather()
        found.append((gathered.roster.names, gathered.roster.classes, gathered.identity))
        for node, clients in gathered.seats.items():
            assert gathered.roster.names[clients[0]] == site.names[node]
    assert all(other == found[0] for other in found)


def test_at_the_deadline_the_quorum_suffices(stage: Stage) -> None:
    stage.put(Actor("a"), 3)
    gathered = stage.gather(join_seconds=30.0)
    assert 30 <= stage.passed < 31
    assert gathered.roster.names == ("a", "b")
    assert gathered.left_out == {}


def test_below_the_quorum_it_stops(stage: Stage) -> None:
    with pytest.raises(PolicyStop, match=r"1 client could take part, and 2 are needed; here: b"):
        stage.gather(join_seconds=30.0)
    assert 30 <= stage.passed < 31


def test_nobody_is_approved(stage: Stage) -> None:
    with pytest.raises(PolicyStop, match="here: nobody"):
        stage.gather("", join_seconds=5.0)
    assert stage.watcher.of("refused") == [("b", "its key is not approved")]  # told once


def test_approved_while_the_server_waits(stage: Stage) -> None:
    approved = ["b"]
    stage.put(Actor("d"), 4)
    stage.clock.at(5, lambda: approved.append("d"))
    gathering = stage.gathering()
    gathering.approved = lambda: approved
    gathered = gathering.gather()
    assert gathered.roster.names == ("b", "d")
    assert 5 <= stage.passed < 6


def test_who_leaves_while_others_are_waited_for_is_not_counted(stage: Stage) -> None:
    stage.put(Actor("a"), 3)
    stage.clock.at(5, lambda: stage.remove(3))
    stage.clock.at(8, lambda: stage.put(Actor("c"), 4))
    gathered = stage.gather(join_seconds=20.0)
    assert gathered.roster.names == ("b", "c")
    assert stage.watcher.of("left") == [("a", "its connection ended")]


def test_who_leaves_and_comes_back_is_there(stage: Stage) -> None:
    stage.put(Actor("a"), 3)
    stage.clock.at(5, lambda: stage.remove(3))
    stage.clock.at(7, lambda: stage.put(Actor("a"), 30))
    stage.clock.at(9, lambda: stage.put(Actor("c"), 4))
    gathered = stage.gather()
    assert gathered.seats[30].tolist() == [0]
    assert stage.passed < 10


def test_a_second_machine_with_the_same_key_is_refused(stage: Stage) -> None:
    first, second = Actor("a"), Actor("a")
    stage.put(first, 3)
    stage.clock.at(2, lambda: stage.put(second, 1))
    stage.clock.at(4, lambda: stage.put(Actor("c"), 4))
    gathered = stage.gather()
    assert gathered.seats[3].tolist() == [0]
    assert 1 not in gathered.seats
    assert not second.joined
    [(name, why)] = stage.watcher.of("refused")
    assert name == "a"
    assert "another machine takes part with the same key" in why


def test_a_silent_node_hides_neither_others_nor_its_twin(stage: Stage) -> None:
    stage.put(Actor("a"), 1).silent = True
    stage.put(Actor("a"), 3)
    stage.put(Actor("c"), 4)
    gathered = stage.gather()
    assert set(gathered.seats) == {3, 4, 7}
    assert stage.passed < 3


def test_who_still_reads_its_data_is_waited_for(stage: Stage) -> None:
    stage.put(Actor("a", reads=30), 3)
    stage.put(Actor("c", reads=10**6), 4)
    gathering = stage.gathering(join_seconds=40.0)
    gathered = gathering.gather()
    assert stage.watcher.of("joined") == [("b",), ("a",)]
    assert gathered.roster.names == ("a", "b")
    assert 40 <= stage.passed < 41
    stage.put(Actor("a", reads=25), 3)
    assert gathering.seat({3}) == {}  # after a restart, too
    assert list(gathering.seat({3})) == [3]


def test_another_name_than_the_keys_is_refused(stage: Stage) -> None:
    stage.put(Actor("b"), 3, "a")
    stage.put(Actor("c"), 4)
    gathered = stage.gather(join_seconds=20.0)
    assert gathered.roster.names == ("b", "c")
    assert stage.watcher.of("refused") == [
        ("a", "it calls itself 'b', and its key is approved as 'a'")
    ]


@pytest.mark.parametrize("version", ["0.2.0", "1.0", None])
def test_another_version_is_refused_with_the_way_out(stage: Stage, version: Any) -> None:
    own = machine.versions()["fedtl"]
    stage.put(Actor("a", changes={"join": {"versions": {"fedtl": version}}}), 3)
    stage.put(Actor("c"), 4)
    assert stage.gather(join_seconds=20.0).roster.names == ("b", "c")
    [(_, why)] = stage.watcher.of("refused")
    assert f"the client has fedtl {version} and the server fedtl {own}" in why
    assert "pip install" in why


ODD = [
    {"classes": []}, {"classes": "cat"}, {"classes": ["cat", "cat"]}, {"classes": ["cat", 3]},
    {"classes": ["x" * 201, "b"]}, {"classes": ["\x1b[2J", "b"]}, {"classes": [""]},
    {"examples": 0}, {"examples": -9}, {"examples": 10**14}, {"examples": True},
    {"examples": "many"}, {"examples": None}, {"examples": 1.5}, {"has_backbone": False},
    {"threads": 0}, {"threads": None}, {"device": "tpu"}, {"device": []}, {"cpu": 3},
    {"free_disk_bytes": -1}, {"versions": None}, {"versions": "0.1"}, {"name": None},
    {"name": ["a"]},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_odd_answers_to_join_are_refused(stage: Stage, odd: dict[str, Any]) -> None:
    stage.put(Actor("a", changes={"join": odd}), 3)
    stage.put(Actor("c"), 4)
    assert stage.gather(join_seconds=20.0).roster.names == ("b", "c")
    assert [name for name, _ in stage.watcher.of("refused")] == ["a"]
    assert "\x1b" not in str(stage.watcher.events)


UNREADY = [
    {"train": 0}, {"train": 51}, {"train": 45, "test": 6}, {"test": -1}, {"width": 0},
    {"width": 10**9}, {"fingerprint": 3}, {"way": "x" * 999}, {"domain": None},
    {"domain": "\x1b[2J"}, {"left_out": -1}, {"leaks": None}, {"seconds": "soon"},
    {"seconds": -1}, {"seconds": True}, {"backbone": {}}, {"ready": False, "done": -1},
    {"ready": False, "done": 51}, {"ready": "yes"},
]  # fmt: skip


@pytest.mark.parametrize("odd", UNREADY, ids=str)
def test_odd_answers_to_prepare_leave_out(stage: Stage, odd: dict[str, Any]) -> None:
    stage.put(Actor("a", changes={"prepare": odd}), 3)
    stage.put(Actor("c"), 4)
    gathered = stage.gather()
    assert gathered.roster.names == ("b", "c")
    assert list(gathered.left_out) == ["a"]
    assert "\x1b" not in str(stage.watcher.events)


def test_who_cannot_be_prepared_is_left_out_with_its_reason(stage: Stage) -> None:
    broken = Actor("a", "cow", fails={"prepare": InputError("its data cannot be used", got="/x")})
    other = Actor("c", "dog élan")
    stage.put(broken, 3)
    stage.put(other, 4)
    gathered = stage.gather()
    assert gathered.left_out == {"a": "its data cannot be used"}
    assert stage.watcher.of("left") == [("a", "its data cannot be used")]
    # as if it had never been there
    assert gathered.roster.classes == ("cat", "dog", "élan")
    assert other.orders == [("cat", "cow", "dog", "élan"), ("cat", "dog", "élan")]


def test_without_the_quorum_that_is_the_end(stage: Stage) -> None:
    stage.put(Actor("a", fails={"prepare": EnvironmentFault("the disk is full")}), 3)
    with pytest.raises(PolicyStop, match="2 are needed; here: b; a: the disk is full"):
        stage.gather(join_seconds=10.0)


def test_who_falls_silent_is_left_out_after_its_patience(stage: Stage) -> None:
    silent = stage.put(Actor("a"), 3)
    silent.before = lambda kind: setattr(silent, "silent", kind == "prepare")
    stage.put(Actor("c"), 4)
    gathered = stage.gather(join_seconds=20.0)
    assert gathered.left_out == {"a": "it made no progress for 20 s"}
    assert 20 <= stage.passed < 25


def test_who_goes_for_good_is_left_out(stage: Stage) -> None:
    actor = Actor("a", polls=10**6)
    stage.put(actor, 3)
    stage.put(Actor("c"), 4)
    stage.clock.at(2, lambda: stage.remove(3))
    gathered = stage.gather(join_seconds=20.0)
    assert gathered.left_out == {"a": "it was gone for 20 s"}


def test_progress_is_waited_for_and_its_pretence_is_not(stage: Stage) -> None:
    stage.put(Actor("a", polls=49), 3)  # one example in half a second
    stage.put(stuck := Actor("c"), 4)
    stuck.prepare = lambda facts: {"ready": False, "done": 3, "total": 50}  # type: ignore[method-assign]
    gathered = stage.gather(join_seconds=10.0)
    assert gathered.roster.names == ("a", "b")
    assert stage.passed > 20


def test_a_restart_while_preparing_is_no_hindrance(stage: Stage) -> None:
    stage.put(Actor("a", polls=10**6), 3)
    stage.put(Actor("c"), 4)

    def restart() -> None:
        stage.remove(3)
        stage.clock.at(stage.passed + 2, lambda: stage.put(Actor("a"), 33))

    stage.clock.at(3, restart)
    gathered = stage.gather()
    assert gathered.seats[33].tolist() == [0]


def test_a_client_that_lost_its_memory_is_asked_to_join_again(stage: Stage) -> None:
    actor = Actor("a", polls=4)
    stage.put(actor, 3)
    stage.put(Actor("c"), 4)
    stage.clock.at(0.6, lambda: setattr(actor, "joined", False))
    assert stage.gather().roster.names == ("a", "b", "c")
    assert actor.joined


def test_forgetting_for_ever_ends(stage: Stage) -> None:
    actor = Actor("a")
    actor.prepare = lambda facts: (_ for _ in ()).throw(NotPrepared("no"))  # type: ignore[method-assign]
    stage.put(actor, 3)
    stage.put(Actor("c"), 4)
    assert list(stage.gather(join_seconds=10.0).left_out) == ["a"]
    assert stage.passed < 15


def test_classes_that_look_like_slips_stop_everything(stage: Stage) -> None:
    stage.put(Actor("a", "girafe dog"), 3)
    stage.put(Actor("c", "giraffe dog"), 4)
    with pytest.raises(InputError, match="did you mean"):
        stage.gather()


def test_features_of_several_widths(stage: Stage) -> None:
    stage.put(Actor("a", changes={"prepare": {"width": 9}}), 3)
    with pytest.raises(InputError, match="differ in width") as caught:
        stage.gather(join_seconds=5.0)
    assert "a: 9, b: 8" in caught.value.line()


def test_domains(stage: Stage, make_site: Callable[..., Any]) -> None:
    stage.put(Actor("a", changes={"prepare": {"domain": "ct"}}), 3)
    assert stage.gather("a b").roster.domains == ("ct", "")
    site = make_site(backbone=IDENTITY, data={"source": "arrays", "domains": False})
    site.put(1, "a", Actor("a", changes={"prepare": {"domain": "ct"}}))
    site.put(2, "b", Actor("b"))
    assert Stage(site, Clock()).gather("a b").roster.domains == ("ct", "b")


def test_the_user_can_stop_it(stage: Stage) -> None:
    def check() -> None:
        if stage.passed > 3:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        stage.gather(check=check)
    stage.put(Actor("a", polls=10**6), 3)
    stage.put(Actor("c"), 4)
    stage.clock.now = 1000.0
    with pytest.raises(Interrupted):
        stage.gather(check=check)


def test_resuming_needs_the_same_clients(stage: Stage) -> None:
    stage.put(Actor("a"), 3)
    stage.put(Actor("d"), 4)
    stage.clock.at(4, lambda: stage.put(Actor("c"), 5))
    gathered = stage.gather("a b c d", expected=["a", "b", "c"])
    assert gathered.roster.names == ("a", "b", "c")
    assert stage.watcher.of("refused") == [("d", "this run was begun without it")]
    stage.remove(5)
    with pytest.raises(PolicyStop, match="begun with clients that are missing: c"):
        stage.gather("a b c d", expected=["a", "b", "c"], join_seconds=5.0)
    stage.put(Actor("c", fails={"prepare": InputError("no")}), 5)
    with pytest.raises(PolicyStop, match="missing: c; c: no"):
        stage.gather("a b c d", expected=["a", "b", "c"], join_seconds=5.0)


def test_changed_data_are_told_when_resuming(stage: Stage) -> None:
    stage.put(Actor("a"), 3)
    before = stage.gather("a b").identity
    assert stage.gather("a b", expected=["a", "b"]).identity == before
    stage.put(Actor("a", changes={"prepare": {"fingerprint": "other", "way": "torch"}}), 3)
    after = stage.gather("a b", expected=["a", "b"]).identity
    with pytest.raises(InputError, match="data of a: was data of a, is other; extraction at a"):
        check_identity(before, after, "run")


def test_who_comes_back_is_seated_again(stage: Stage) -> None:
    stage.put(Actor("a"), 3)
    gathering = stage.gathering("a b")
    gathering.gather()
    stage.remove(3)
    stage.put(Actor("a", polls=3), 30)
    seats = gathering.seat({30})
    assert {node: clients.tolist() for node, clients in seats.items()} == {30: [0]}
    # the same node again, its process restarted
    stage.put(Actor("a"), 30)
    assert gathering.seat({30})[30].dtype == np.int64


def test_who_comes_back_changed_stays_out(stage: Stage) -> None:
    stage.put(Actor("a"), 3)
    gathering = stage.gathering("a b")
    gathering.gather()
    stage.put(Actor("a", changes={"prepare": {"fingerprint": "other", "train": 39}}), 3)
    assert gathering.seat({3}) == {}
    [(name, why)] = stage.watcher.of("refused")
    assert (name, why) == ("a", "since the run began its data and training examples changed")
    # it is left alone for a while, then looked at again
    stage.put(actor := Actor("a"), 3)
    assert gathering.seat({3}) == {}
    assert not actor.joined
    stage.clock.now += 31
    assert list(gathering.seat({3})) == [3]


def test_rounds_do_not_wait_long_for_who_comes_back(stage: Stage) -> None:
    stage.put(Actor("a"), 3)
    gathering = stage.gathering("a b c")
    gathering.join_seconds = 5.0
    gathering.gather()
    began = stage.passed
    stage.put(slow := Actor("a", polls=45), 3)
    assert gathering.seat({3}) == {}  # its features go on being made
    assert stage.passed - began < 11
    while not (seats := gathering.seat({3})):
        assert stage.passed - began < 60
    assert list(seats) == [3]
    assert slow.prepared == 1
    stage.put(Actor("a"), 3).silent = True
    stage.put(Actor("x"), 50)
    began = stage.passed
    assert gathering.seat({3, 50}) == {}
    assert gathering.seat({3, 50}) == {}  # this one costs nothing
    assert stage.passed - began < 11
    assert ("x", "it did not take part when the run began") in stage.watcher.of("refused")


def test_a_twin_of_a_seated_client_is_not_seated(stage: Stage) -> None:
    stage.put(Actor("a"), 3)
    gathering = stage.gathering("a b")
    gathering.gather()
    stage.put(twin := Actor("a"), 30)
    assert gathering.seat({30}) == {}
    assert not twin.joined

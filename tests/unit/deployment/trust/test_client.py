"""How a client keeps its SuperNode, with a clock, a server and children of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedtl.deployment import client as module
from fedtl.deployment.client import Client, _Keeper, _working_folder
from fedtl.deployment.federation import own_facts
from fedtl.deployment.knock import Hello
from fedtl.errors import EnvironmentFault, SecurityRefusal

KEY = ec.generate_private_key(ec.SECP384R1())


@dataclass
class World:
    """The clock, what the server says, and the children that were started."""

    now: float = 0.0
    hello: Hello | Exception = field(default_factory=lambda: says())
    lives: float = 1e9
    starts: list[float] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    released: list[int] = field(default_factory=list)

    def child(self, **_: Any) -> Any:
        born = self.now
        self.starts.append(born)
        alive = lambda: None if self.now < born + self.lives else 1  # noqa: E731
        return SimpleNamespace(poll=alive, stop=lambda: None)

    def knock(self, *_: Any) -> Hello:
        if isinstance(self.hello, Exception):
            raise self.hello
        return self.hello

    def run(self, keeper: _Keeper, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            keeper.step()
            self.now += 0.2


def says(**changes: Any) -> Hello:
    facts = {"reason": "", "online": False, "node": 7, "facts": own_facts(), "clock_seconds": 0.0}
    return Hello(**{**facts, **changes})


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(module, "knock", made.knock)
    monkeypatch.setattr(module, "start_supernode", made.child)
    monkeypatch.setattr(
        "fedtl.engines.flower_runtime.release_node", lambda *a: made.released.append(a[-1])
    )
    return made


@pytest.fixture
def keep(world: World, join_to: Callable[..., Any], tmp_path: Path) -> Callable[..., _Keeper]:
    def make(node: int = 0) -> _Keeper:
        setting = Client("a", join_to(1), KEY, tmp_path / "a.key", tmp_path, world.told.append)
        return _Keeper(setting, tmp_path, 1, node)

    return make


def test_16_a_flapping_supernode_is_started_less_and_less_often(world: World, keep) -> None:
    world.lives = 1.0
    world.run(keep(), 600)
    gaps = [b - a for a, b in zip(world.starts, world.starts[1:], strict=False)]
    assert len(world.starts) < 45  # every 15 s to 30 s in the end
    assert min(gaps[-5:]) > 14
    assert len(world.told) <= 1


def test_after_a_steady_time_it_is_back_at_once(world: World, keep) -> None:
    world.lives = 100.0
    world.run(keep(), 1000)
    assert all(b - a < 102 for a, b in zip(world.starts, world.starts[1:], strict=False)), (
        world.starts
    )


def test_a_server_that_is_away_is_looked_for_and_told_of_once(world: World, keep) -> None:
    keeper = keep()
    world.hello = EnvironmentFault("nobody listens there")
    world.run(keeper, 3600)
    assert world.starts == []
    assert len(world.told) == 1
    world.hello = says()
    began = world.now
    world.run(keeper, 10)
    assert world.starts[0] - began < 5


def test_a_key_that_is_refused_ends_it(world: World, keep) -> None:
    world.hello = says(reason="key")
    with pytest.raises(SecurityRefusal, match=r"fedtl server approve a\.pub"):
        world.run(keep(), 10)
    assert world.starts == []


def test_35_a_node_of_somebody_else_is_not_pushed_out(world: World, keep) -> None:
    world.hello = says(online=True)
    with pytest.raises(SecurityRefusal, match="another machine"):
        world.run(keep(), 600)
    assert 70 < world.now < 120  # the time in which the server forgets a node that was killed
    assert (world.starts, world.released) == ([], [])


def test_a_node_of_our_own_is_taken_leave_of(world: World, keep) -> None:
    world.hello = says(online=True)
    world.run(keep(node=7), 1)
    assert world.released == [7]
    assert len(world.starts) == 1


def test_a_killed_clients_node_is_remembered_in_its_folder(world: World, keep) -> None:
    setting = keep()._client
    (setting.folder / ".a.flower").mkdir()
    (setting.folder / ".a.flower" / "node").write_text("123")
    (setting.folder / ".a.flower" / "secret").write_text("old")
    with _working_folder(setting) as (home, node):
        assert node == 123
        assert home.stat().st_mode & 0o777 == 0o700
        assert (home / "secret").read_bytes() != b"old"
        assert sorted(path.name for path in home.iterdir()) == ["ca.pem", "secret"]
    assert not home.exists()
    home.mkdir()
    (home / "node").write_text("x" * 1000)
    with _working_folder(setting) as (_, node):
        assert node == 0

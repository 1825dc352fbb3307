"""Small real federations in one process: folders of images, clients with data of their own."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedtl.deployment.gathering import Gathering, GatheringObserver
from fedtl.deployment.host import PrivateHost
from fedtl.engines.exchange import LocalExchange
from fedtl.engines.node import Node
from fedtl.scenario.schema import Scenario
from fedtl.transfer.backbones import open_backbone
from fedtl.transfer.tails import trunk_section

KEY = bytes(range(32))


def draw_images(root: Path, counts: Mapping[str, int], seed: int = 0) -> Path:
    """Noisy PNGs: ``counts`` images at each ``<domain>/<class>`` or ``<class>``."""
    rng = np.random.default_rng(seed)
    for place, count in counts.items():
        (root / place).mkdir(parents=True)
        for i in range(count):
            side = rng.integers(20, 60, 2)
            pixels = rng.integers(0, 256, (*side, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / place / f"secret {i}.png")
    return root


def unpack_images(archive: Path, root: Path, classes: int, each: int) -> Path:
    """The first images of the first classes of every domain."""
    with zipfile.ZipFile(archive) as file:
        names = sorted(n for n in file.namelist() if n.lower().endswith((".jpg", ".png")))
        chosen = sorted({name.split("/")[-2] for name in names})[:classes]
        taken: Counter[str] = Counter()
        for name in names:
            domain, label, image = name.split("/")[-3:]
            # ragged: every cell has another size
            if label in chosen and taken[domain + label] < each + chosen.index(label):
                taken[domain + label] += 1
                path = root / domain / label / image
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(file.read(name))
    return root


def scenario_of(**tables: Any) -> Scenario:
    """A scenario with one client per domain."""
    base: dict[str, Any] = {
        "name": "real",
        "seed": 5,
        "data": {"source": "folder", "path": "/server/has/none", "domains": True},
        "clients": {"partition": "domain"},
        "backbone": {"name": "efficientnet_lite0", "image_size": 32},
        "evaluation": {"references": []},
        "engine": {"threads": 1, "device": "cpu"},
    }
    for name, table in tables.items():
        base[name] = {**base.get(name, {}), **table} if isinstance(table, dict) else table
    return Scenario.model_validate(base)


class Watcher(GatheringObserver):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def joined(self, name: str, facts: Mapping[str, Any]) -> None:
        self.events.append(("joined", name))

    def left(self, name: str, reason: str) -> None:
        self.events.append(("left", name, reason))

    def refused(self, name: str, reason: str) -> None:
        self.events.append(("refused", name, reason))

    def waiting(self, names: Any, seconds_left: float) -> None:
        self.events.append(("waiting", tuple(names), seconds_left))

    def classes(self, table: Any) -> None:
        self.events.append(("classes", table.classes))

    def sending_weights(self, name: str, done: int, total: int) -> None:
        self.events.append(("weights", name, done, total))

    def prepared(self, name: str, facts: Mapping[str, Any]) -> None:
        self.events.append(("prepared", name))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        """The events of one kind, without it."""
        return [event[1:] for event in self.events if event[0] == kind]


@dataclass
class Recorder:
    """A node that remembers what left it and, when it is cut off, stays silent.

    Attributes:
        before: called before every answer with the kind of the request.
    """

    node: Any
    replies: list[bytes] = field(default_factory=list)
    silent: bool = False
    before: Callable[[str], None] = lambda kind: None

    def answer(self, kind: str, content: bytes, signature: bytes = b"") -> bytes:
        self.before(kind)
        if self.silent:
            return b""
        self.replies.append(self.node.answer(kind, content, signature))
        return self.replies[-1]


@dataclass
class Site:
    """Clients with private data behind nodes in this process.

    Attributes:
        told: what the clients' own terminals showed, by name.
    """

    scenario: Scenario
    hosts: dict[str, PrivateHost] = field(default_factory=dict)
    nodes: dict[int, Recorder] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    told: dict[str, list[str]] = field(default_factory=dict)
    watcher: Watcher = field(default_factory=Watcher)

    @cached_property
    def exchange(self) -> LocalExchange:
        """Reaches the nodes of now and of later."""
        assert self.nodes, "add a client first"
        return LocalExchange(self.nodes, self.names)

    def add(self, name: str, data: Path, node: int | None = None, **options: Any) -> PrivateHost:
        """A client; its node's id is not in the order of the names."""
        node = node if node is not None else 100 - len(self.nodes)
        lines = self.told.setdefault(name, [])
        host = PrivateHost(name, data, threads=1, device="cpu", tell=lines.append, **options)
        self.hosts[name] = host
        self.put(node, name, host)
        return host

    def put(self, node: int, name: str, host: Any) -> Recorder:
        """Any host behind a node with an approved key."""
        self.nodes[node], self.names[node] = Recorder(Node(host)), name
        return self.nodes[node]

    def gathering(self, **changes: Any) -> Gathering:
        """The server's side of the start."""
        settings: dict[str, Any] = {
            "exchange": self.exchange,
            "scenario": self.scenario,
            "backbone": open_backbone(
                trunk_section(self.scenario.backbone, self.scenario.transfer), self.scenario.seed
            ),
            "approved": lambda: sorted(set(self.names.values())),
            "data_key": KEY,
            "quorum": 1,
            "join_seconds": 20.0,
            "observer": self.watcher,
        }
        return Gathering(**{**settings, **changes})

    def close(self) -> None:
        """End every client."""
        for host in self.hosts.values():
            host.close()


@pytest.fixture
def make_site() -> Iterator[Callable[..., Site]]:
    """Makes sites from a scenario's tables; their clients end with the test."""
    sites: list[Site] = []

    def make(**tables: Any) -> Site:
        sites.append(Site(scenario_of(**tables)))
        return sites[-1]

    yield make
    for site in sites:
        site.close()


@pytest.fixture
def draw() -> Callable[..., Path]:
    """See ``draw_images``."""
    return draw_images


@pytest.fixture(scope="session")
def unpack() -> Callable[..., Path]:
    """See ``unpack_images``."""
    return unpack_images


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Turns to another cache, as on another machine; nothing of torch's is there."""

    def turn(name: str) -> Path:
        monkeypatch.setenv("FEDTL_CACHE", str(tmp_path / name))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / name / "torch"))
        return tmp_path / name

    return turn

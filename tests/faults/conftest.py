"""Real federations for the fault tests: sites with cables that can be cut, and a server."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedtl.deployment.federation import create_federation
from fedtl.deployment.keys import make_keys
from fedtl.engines.flower_app import build_app
from fedtl.engines.flower_processes import free_port

SETTLING_SECONDS = 0.4
"""In which the server has dealt with a request whose answer is going to be lost."""

SETTLED_SECONDS = 0.02
"""In which an event loop has done all that is ready to be done."""

WIDTH = 1000
"""Features: wide enough that an update can be told from other requests by its size."""


def until(condition: Callable[[], Any], seconds: float = 60, what: str = "it") -> Any:
    """The condition's value once it is true; fails after some seconds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)
    return found


class Cable:
    """The only way from one client to the server, a TCP proxy on loopback.

    ``cut`` makes it lose all bytes without a word, as a network does that is gone: connections of
    before never carry anything again. ``lose`` lets requests through and drops what is answered,
    then closes the connection.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.server, self._host, self.port = port, host, free_port()
        self.whole, self.lost = True, 0
        self._losing = self._at_least = 0
        self._loop, self._closed = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        self.whole = False

    def mend(self) -> None:
        self.whole = True

    def lose(self, answers: int, at_least: int = 0) -> None:
        """Lose the answers to the next requests of so many bytes or more."""
        self._at_least, self._losing = at_least, answers

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join(5)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        tasks: set[asyncio.Task[None]] = set()

        def connected(inner: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
            tasks.add(asyncio.create_task(self._carry(inner, out)))

        server = await asyncio.start_server(connected, self._host, self.port)
        await self._closed.wait()
        for listening in server.sockets:  # a closed server leaves what it has just accepted open
            self._loop.remove_reader(listening.fileno())
        await asyncio.sleep(SETTLED_SECONDS)
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(SETTLED_SECONDS)  # what was aborted is closed in a later turn

    async def _carry(self, inner: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        dead, asked, spoken, dropping = False, 0, 0, False
        there: asyncio.StreamWriter | None = None
        pump: asyncio.Task[None] | None = None

        async def down(source: asyncio.StreamReader) -> None:
            nonlocal dead, asked, spoken
            while data := await source.read(2**16):
                dead = dead or not self.whole
                if not dead and not dropping:
                    asked, spoken = 0, spoken + 1
                    out.write(data)
                    await out.drain()

        try:
            source, there = await asyncio.open_connection("127.0.0.1", self.server)
            pump = self._loop.create_task(down(source))
            while data := await inner.read(2**16):
                dead = dead or not self.whole
                if dead:
                    continue
                asked += len(data)
                there.write(data)
                await there.drain()
                if self._losing and spoken and asked >= self._at_least:  # not the handshake
                    dropping = True
                    await asyncio.sleep(SETTLING_SECONDS)
                    self._losing, self.lost = self._losing - 1, self.lost + 1
                    break
            if dead:  # not even that the other end has closed gets through
                await asyncio.sleep(3600)
        except OSError:
            pass
        finally:
            if pump is not None:
                pump.cancel()
                await asyncio.gather(pump, return_exceptions=True)
            for writer in (out, there):
                if writer is not None:
                    writer.transport.abort()


@dataclass
class Site:
    """A client: its folder, its cable and its process."""

    name: str
    place: Path
    cable: Cable
    process: subprocess.Popen[bytes] | None = None

    def start(self, name: str | None = None, *more: str, program: str = "", **env: str) -> None:
        """``fedtl client start`` with more arguments; another program may stand in for fedtl's."""
        assert self.process is None or self.process.poll() is not None
        name = name or self.name
        arguments = ("--join", "join.toml", "--name", name, "--data", "data.npz", *more)
        begin = ("-c", program) if program else ("-m", "fedtl.cli")
        with open(self.place / "out", "ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, *begin, "client", "start", *arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=self.place,
                env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **env},
            )  # fmt: skip

    @property
    def out(self) -> str:
        return (self.place / "out").read_text()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def ends(self, number: int | None = None, seconds: float = 30) -> int:
        if number is not None:
            self.signal(number)
        assert self.process is not None
        return self.process.wait(seconds)

    def stop(self) -> None:
        """The whole machine stands still."""
        self._both(signal.SIGSTOP)

    def go_on(self) -> None:
        """And goes on."""
        self._both(signal.SIGCONT)

    def _both(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            for pid in (self.process.pid, self.supernode()):
                if pid is not None:
                    os.kill(pid, number)

    def trained(self) -> list[int]:
        """Rounds whose update it has written down as leaving."""
        found = []
        with suppress(FileNotFoundError):
            for line in (self.place / f"{self.name}.audit.jsonl").read_bytes().splitlines():
                with suppress(ValueError):  # its last line may be on its way
                    entry = json.loads(line)
                    if entry.get("kind") == "train":
                        found.append(entry["round"])
        return found

    def supernode(self) -> int | None:
        """The process id of its SuperNode."""
        assert self.process is not None
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == self.process.pid and state != "Z":
                    return int(process.name)
        return None


@dataclass
class Server:
    """One ``fedtl server`` command, running."""

    process: subprocess.Popen[bytes]
    log: Path
    run: Path

    @property
    def text(self) -> str:
        return self.log.read_text()

    def round(self) -> int:
        """The last round that is committed."""
        found = sorted((self.run / "checkpoints").glob("round-*.json"))
        return int(found[-1].stem[6:]) if found else -1

    def abandoned(self) -> int:
        """Rounds in a row that missed the quorum, up to now."""
        found = sorted((self.run / "checkpoints").glob("round-*.json"))
        return int(json.loads(found[-1].read_bytes())["facts"]["abandoned"]) if found else 0

    def says(self, words: str, seconds: float = 60) -> None:
        def there() -> bool:
            return words in self.text or self.process.poll() is not None

        until(there, seconds, f"{words!r}:\n{self.text}")
        assert words in self.text

    def reaches(self, round: int, seconds: float = 60) -> None:
        def there() -> bool:
            return self.round() >= round or self.process.poll() is not None

        until(there, seconds, f"round {round}:\n{self.text}")
        assert self.round() >= round, self.text

    def ends(self, number: int | None = None, seconds: float = 90) -> int:
        if number is not None:
            self.process.send_signal(number)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text}") from None
        assert "Traceback" not in self.text
        return code

    def rows(self) -> pd.DataFrame:
        """Who trained in which round, or why not."""
        rows = pd.read_parquet(self.run / "clients.parquet").query("split == 'train'")
        return rows[["round", "name", "status"]].reset_index(drop=True)

    def missed(self, name: str) -> dict[int, str]:
        """Rounds a client is not in, and why."""
        rows = self.rows()
        rows = rows[(rows["name"] == name) & (rows["status"] != "ok")]
        return {int(row["round"]): row["status"] for _, row in rows.iterrows()}

    def absent(self) -> list[dict[str, Any]]:
        """The same as a scenario has it."""
        rows = self.rows()
        out = rows[rows["status"].str.startswith("unused") & ~rows["status"].str.contains("quorum")]
        return [
            {"round": int(round), "clients": sorted(group["name"])}
            for round, group in out.groupby("round")
        ]

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.run / "events.jsonl").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["event"] == kind]

    def committed(self) -> tuple[str, dict[str, Any]]:
        """Hash of the last commit's head, and its facts."""
        from fedtl.conduct import head_hash
        from fedtl.results.commits import read_commit

        commit, notes = read_commit(self.run / "checkpoints")
        assert commit is not None
        assert notes == []
        head = {k.removeprefix("head."): v for k, v in commit.tensors.items() if k[:5] == "head."}
        return head_hash(head), dict(commit.facts)


@dataclass
class Fleet:
    """A federation on loopback: one server's folder, and sites with data and keys of their own."""

    place: Path
    sites: dict[str, Site]
    servers: list[Server] = field(default_factory=list)

    @classmethod
    def make(cls, place: Path, names: str) -> Fleet:
        port = free_port()
        fleet = cls(place, {})
        federation = create_federation(place / "federation", f"127.0.0.1:{port}", [], build_app())
        parts = []
        for i, name in enumerate(names):
            site = Site(name, place / name, Cable(port))
            site.place.mkdir()
            federation.approve(make_keys(site.place, name)[1])
            fleet.join(site.place, f"127.0.0.1:{site.cable.port}")
            x, y = draw(i)
            np.savez(site.place / "data.npz", x=x, y=y)
            parts.append((x, y, np.array([name] * len(y))))
            fleet.sites[name] = site
        x, y, client = (np.concatenate(column) for column in zip(*parts, strict=True))
        np.savez(place / "all.npz", x=x, y=y, client=client)
        return fleet

    def join(self, place: Path, address: str) -> None:
        """Put the join file into a folder, with another address of the server."""
        join = (self.place / "federation" / "join.toml").read_text()
        changed = re.sub(r"address = .*", f'address = "{address}"', join)
        (place / "join.toml").write_text(changed)

    def call(self, *arguments: str, code: int = 0, program: str = "", **env: str) -> str:
        """A command to its end; what it prints. Another program may stand in for fedtl's."""
        start = ("-c", program) if program else ("-m", "fedtl.cli")
        done = subprocess.run(
            [sys.executable, *start, *arguments], capture_output=True, text=True,
            timeout=120, cwd=self.place,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **env},
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        assert "Traceback" not in said
        return said

    def server(self, *arguments: str, run: str, program: str = "", **env: str) -> Server:
        """``fedtl server ...`` in the background; another program may stand in for fedtl's."""
        log = self.place / f"{run}-{len(self.servers)}.log"
        begin = ("-c", program) if program else ("-m", "fedtl.cli")
        with open(log, "wb") as out:
            process = subprocess.Popen(
                [sys.executable, *begin, "server", *arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=self.place,
                env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200", **env},
            )  # fmt: skip
        self.servers.append(Server(process, log, self.place / run))
        return self.servers[-1]

    def begin(self, scenario: str, run: str, *arguments: str, **env: str) -> Server:
        (self.place / f"{run}.toml").write_text(scenario)
        return self.server("run", f"{run}.toml", "--out", run, *arguments, run=run, **env)

    def resume(self, run: str, **env: str) -> Server:
        return self.server("resume", run, run=run, **env)

    def start(self, names: str = "") -> None:
        """Those of the sites that are not running."""
        for name in names or "".join(self.sites):
            site = self.sites[name]
            if site.process is None or site.process.poll() is not None:
                site.start()

    def left(self) -> list[str]:
        """Processes of the server's side, other than those that are waited for."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if str(self.place / "federation").encode() in (process / "cmdline").read_bytes():
                    found.append(process.name)
        return found

    def clean(self) -> None:
        """Nothing of the server's is left: no process, no temporary file."""
        until(lambda: not self.left(), 15, "the SuperLink's end")
        assert not (self.place / "federation" / "flower").exists()
        for server in self.servers:
            assert [p.name for p in server.run.rglob("*") if p.suffix in (".tmp", ".lock")] == []

    def calm(self) -> None:
        """No server runs, no client is stopped or cut off."""
        for server in self.servers:
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait()
        for site in self.sites.values():
            site.go_on()
            site.cable.mend()

    def close(self) -> None:
        self.calm()
        for one in self.sites.values():
            if one.process is not None and one.process.poll() is None:
                one.process.kill()
                one.process.wait()
        for site in self.sites.values():
            site.cable.close()


def draw(seed: int, count: int = 60) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Features and class names of one site."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, count + 20 * seed)
    x = rng.normal(size=(len(y), WIDTH)).astype(np.float32)
    x[np.arange(len(y)), y] += 2
    return x, np.array(["cat", "dog", "owl"])[y]


@pytest.fixture(scope="module")
def make_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Fleet]]:
    """Makes a federation with sites of these one-letter names; all of it is gone afterwards."""
    made: list[Fleet] = []

    def make(names: str) -> Fleet:
        made.append(Fleet.make(tmp_path_factory.mktemp("fleet"), names))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()
    for fleet in made:
        for site in fleet.sites.values():
            until(lambda site=site: not processes_in(site.place), 20, "the clients' end")


def processes_in(place: Path) -> list[str]:
    """Processes that work in a folder or have it among their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            here = os.readlink(process / "cwd") == str(place)
            if here and int(process.name) != os.getpid():
                found.append(process.name)
    return found


@pytest.fixture
def make_cable() -> Iterator[Callable[..., Cable]]:
    """Lays cables; they are gone after the test."""
    made: list[Cable] = []

    def make(port: int, host: str) -> Cable:
        made.append(Cable(port, host))
        return made[-1]

    yield make
    for cable in made:
        cable.close()


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    return until


@pytest.fixture
def simulate(tmp_path: Path) -> Callable[..., Any]:
    """The same scenario in one process, with the participation of a real run."""
    from fedtl.interrupts import Interrupts
    from fedtl.parity import Quiet
    from fedtl.scenario.load import load_scenario, validate
    from fedtl.simulation import run_scenario

    def run(server: Server, rounds: int, **participation: Any) -> dict[str, Any]:
        scenario = server.run.parent / f"{server.run.name}.toml"
        content = load_scenario(str(scenario)).model_dump()
        content["rounds"] = rounds
        content["participation"] |= {"absent": server.absent(), **participation}
        one = validate(content, "simulated", {})
        path = tmp_path / f"simulated-{server.run.name}-{rounds}"
        return dict(run_scenario(one, path, Quiet(lambda note: None), Interrupts()))

    return run

"""Machines for the tests: network namespaces with an address each, or the loopback where those are
not allowed."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Machine:
    """One computer of a test: its own folder, home, feature store and, with namespaces, address."""

    name: str
    folder: Path
    address: str
    namespace: str | None
    link: str | None
    children: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, *arguments: str) -> list[str]:
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return [*inside, sys.executable, *arguments]

    def environment(self) -> dict[str, str]:
        own = {
            "HOME": str(self.folder / "home"),
            "FEDTL_CACHE": str(self.folder / "cache"),
            "NO_COLOR": "1",
            "COLUMNS": "120",
            "PYTHONUNBUFFERED": "1",
        }
        return {**os.environ, **own}

    def run(self, *arguments: str, code: int = 0, seconds: float = 120) -> str:
        """A command to its end; its standard output."""
        done = subprocess.run(
            self.command(*arguments), cwd=self.folder, env=self.environment(), timeout=seconds,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, log: str, *arguments: str, env: dict[str, str] | None = None) -> Background:
        """A command in the background; what it prints goes to a file."""
        path = self.folder / f"{log}.log"
        with path.open("w") as file:
            child = subprocess.Popen(
                self.command(*arguments), cwd=self.folder, text=True, stdin=subprocess.DEVNULL,
                env={**self.environment(), **(env or {})}, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.children.append(child)
        return Background(child, path)

    def plug(self, up: bool) -> None:
        """The cable at the switch's end."""
        assert self.link is not None
        state = "up" if up else "down"
        subprocess.run(["ip", "link", "set", self.link, state], check=True)


@dataclass
class Background:
    """A command that is running."""

    process: subprocess.Popen[str]
    log: Path

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str, seconds: float = 120) -> str:
        """Until it has printed some words."""
        end = time.monotonic() + seconds
        while words not in self.text():
            assert self.process.poll() is None, (
                f"ended with {self.process.returncode}:\n{self.text()}"
            )
            assert time.monotonic() < end, f"no {words!r} in {seconds} s:\n{self.text()}"
            time.sleep(0.05)
        return self.text()

    def ends(self, seconds: float = 120) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text()}") from None


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Callable[[Sequence[str]], dict[str, Machine]]]:
    """A maker of machines by name; everything started on them ends with the test."""
    made: dict[str, Machine] = {}
    cleanup: list[list[str]] = []

    def make(names: Sequence[str]) -> dict[str, Machine]:
        separate = _allowed()
        if separate:
            tag = secrets.token_hex(2)
            number = secrets.randbelow(200) + 20
            bridge = f"ftl{tag}"
            cleanup.append(["ip", "link", "del", bridge])
            _ip("link", "add", bridge, "type", "bridge")
            _ip("link", "set", bridge, "up")
        for i, name in enumerate(names):
            folder = tmp_path / name
            (folder / "home").mkdir(parents=True)
            if not separate:
                made[name] = Machine(name, folder, "127.0.0.1", None, None)
                continue
            space, link, address = f"ftl{tag}-{i}", f"ftl{tag}v{i}", f"10.{number}.0.{i + 1}"
            cleanup.append(["ip", "netns", "del", space])
            _ip("netns", "add", space)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", link, "master", bridge)
            _ip("link", "set", link, "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            made[name] = Machine(name, folder, address, space, link)
        return made

    yield make
    for machine in made.values():
        for child in machine.children:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if child.poll() is None:
                    os.killpg(child.pid, number)
                    try:
                        child.wait(15)
                    except subprocess.TimeoutExpired:
                        continue
    for command in reversed(cleanup):
        subprocess.run(command, capture_output=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _allowed() -> bool:
    """Whether this system lets us make network namespaces."""
    name = f"ftl-{secrets.token_hex(3)}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True)
    except OSError:
        return False
    if made.returncode:
        return False
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return True

"""A client at work: Flower's SuperNode as a watched child, and our own process that answers.

The SuperNode is started again whenever it ends, later and later up to a limit. Why it ended is not
read off its words: the server is asked at its door (``knock``), which says in ours what is wrong,
and whether trying again can help.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from fedtl.deployment.federation import own_facts
from fedtl.deployment.join import JoinFile
from fedtl.deployment.keys import public_of, write_new, write_secret
from fedtl.deployment.knock import (
    TIMEOUT_SECONDS,
    Hello,
    check_approved,
    check_clock,
    check_versions,
    knock,
)
from fedtl.engines.exchange import Answering
from fedtl.engines.flower_processes import Child, free_port, quieten, start_supernode
from fedtl.errors import EnvironmentFault, SecurityRefusal, writing
from fedtl.interrupts import Interrupts
from fedtl.results.files import write_atomic

FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
KNOCK_SECONDS = 4.0
"""The longest wait between two knocks at a server that does not answer; a knock costs little."""

STEADY_SECONDS = 10.0
"""A SuperNode that lived this long was well; the next wait is short again."""

SOMEBODY_ELSE_SECONDS = 75.0
"""For this long the server may believe that a node is online whose machine was just killed."""

LOOK_SECONDS = 10.0
"""Between two looks whether the server is still there, so that the user hears when it is not."""

FINISH_SECONDS = 10.0
"""Given to the message at hand when the client is asked to stop."""

STEP_SECONDS = 0.2

NODE = "node"
"""File in the working folder: Flower's id of our node."""


@dataclass
class Backoff:
    """How long to wait before the next attempt: doubled each time, capped, and never the same at
    two clients, which would otherwise all come back in the same instant."""

    longest: float = LONGEST_WAIT_SECONDS
    _seconds: float = FIRST_WAIT_SECONDS
    _random: secrets.SystemRandom = field(default_factory=secrets.SystemRandom)

    def next(self) -> float:
        """Seconds to wait now."""
        wait = self._seconds * self._random.uniform(0.5, 1)
        self._seconds = min(2 * self._seconds, self.longest)
        return wait

    def reset(self) -> None:
        """Start again with short waits."""
        self._seconds = FIRST_WAIT_SECONDS


@dataclass
class Client:
    """What a client's processes need.

    Attributes:
        key_path: of the private key, given to the SuperNode.
        folder: where its log and, while it runs, its working folder are.
        tell: is told, in one line, what changes.
    """

    name: str
    join: JoinFile
    key: ec.EllipticCurvePrivateKey
    key_path: Path
    folder: Path
    tell: Callable[[str], None]
    _told: str = ""

    def say(self, line: str) -> None:
        """Tell the user, but not the same thing twice in a row."""
        if line != self._told:
            self.tell(line)
            self._told = line


def serve_node(client: Client, node: Answering, interrupts: Interrupts) -> None:
    """Answer the server's messages until interrupted.

    Raises:
        Interrupted: SIGINT or SIGTERM; the message at hand was finished if that was quick.
        SecurityRefusal: the server is not to be trusted, or does not let this key in.
        InputError: the versions do not work together.
    """
    quieten()
    from fedtl.engines.flower_runtime import Resident

    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # we say ourselves what is going on
    with _working_folder(client) as (home, node_before):
        secret = (home / "secret").read_bytes()
        port, stop = free_port(), threading.Event()

        def refused(app: str) -> None:
            client.tell(f"refused a message of another app ({app[:16]}...); it was not run")

        resident = Resident(port, secret, client.join.app_sha256, node, refused)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                resident.serve(stop)
            except BaseException as error:
                failures.append(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        keeper = _Keeper(client, home, port, node_before)
        try:
            while True:
                interrupts.check("nothing more leaves this machine")
                if failures:
                    raise failures[0]
                keeper.step()
                time.sleep(STEP_SECONDS)
        finally:
            stop.set()
            worker.join(FINISH_SECONDS)
            time.sleep(STEP_SECONDS)  # the SuperNode takes the last answer, and hands it over
            keeper.close()


class _Keeper:
    """Keeps one SuperNode running."""

    def __init__(self, client: Client, home: Path, port: int, node: int) -> None:
        self._client, self._home, self._port = client, home, port
        self._child: Child | None = None
        self._started = self._next = self._look = 0.0
        self._node = node  # ours at the server, once it was online
        self._noted = b""
        self._others_since: float | None = None
        self._starts, self._knocks = Backoff(), Backoff(KNOCK_SECONDS)

    def step(self) -> None:
        """Look once; start what must be started."""
        now = time.monotonic()
        if self._child is not None and self._child.poll() is not None:
            self._ended(now)
        if self._child is None and now >= self._next:
            self._attempt(now)
        elif self._child is not None and now >= self._look:
            self._watch(now)

    def close(self) -> None:
        """End the SuperNode; it takes its leave of the server."""
        if self._child is not None:
            self._child.stop()

    def _ended(self, now: float) -> None:
        assert self._child is not None
        self._child.stop()
        self._child = None
        if now - self._started > STEADY_SECONDS:
            self._starts.reset()

    def _attempt(self, now: float) -> None:
        """Start a SuperNode if the server would let it in."""
        hello = self._hello()
        if hello is None:
            self._next = now + self._knocks.next()
            return
        self._knocks.reset()
        self._next = now + self._starts.next()
        client = self._client
        if hello.online and hello.node == self._node:
            from fedtl.engines.flower_runtime import release_node

            release_node(client.join.address, client.join.authority, client.key, hello.node)
        elif hello.online:
            self._somebody_else(now)
            return
        self._others_since = None
        self._child = start_supernode(
            address=client.join.address,
            port=self._port,
            authority=self._home / "ca.pem",
            key=client.key_path,
            secret=self._home / "secret",
            home=self._home,
            log=client.folder / f"{client.name}.supernode.log",
        )
        self._started = self._look = time.monotonic()

    def _watch(self, now: float) -> None:
        """Tell the user whether the server is there."""
        hello = self._hello(STEP_SECONDS * 15)
        online = hello is not None and hello.online
        if hello is not None and online and self._child is not None:
            self._node, note = hello.node, str(hello.node).encode()
            if self._noted != note:
                write_atomic(self._home / NODE, note)
                self._noted = note
            self._client.say("connected; waiting for the server")
        self._look = now + (LOOK_SECONDS if online or hello is None else 3 * STEP_SECONDS)

    def _hello(self, timeout: float = TIMEOUT_SECONDS) -> Hello | None:
        """What the server says, None while it does not; what waiting cannot mend is raised."""
        client = self._client
        try:
            hello = knock(client.join, client.key, timeout)
        except EnvironmentFault as error:
            client.say(f"waiting for the server: {error.line()}")
            return None
        check_versions(client.join, hello.facts, own_facts())
        check_clock(hello)
        check_approved(hello, client.name, public_of(client.key).fingerprint)
        return hello

    def _somebody_else(self, now: float) -> None:
        """The key is online, and not through us: another machine, or we were just killed."""
        self._others_since = self._others_since or now
        if now - self._others_since > SOMEBODY_ELSE_SECONDS:
            raise SecurityRefusal(
                "this key is in use on another machine",
                got=public_of(self._client.key).fingerprint,
                do="One key is one client: make another with 'fedtl client keys --name ...'",
            )
        self._client.say(
            "the server sees a node with this key already: another machine has it, or this client "
            f"was just killed; trying for {SOMEBODY_ELSE_SECONDS:.0f} s"
        )


@contextmanager
def _working_folder(client: Client) -> Iterator[tuple[Path, int]]:
    """A folder that only we can read, with what the SuperNode needs; gone afterwards.

    Also gives the id of the node that a killed client left online: whoever has its folder, and the
    lock on its audit log, may take leave for it.
    """
    home, node = client.folder / f".{client.name}.flower", 0
    with suppress(OSError, ValueError):
        node = int((home / NODE).read_bytes()[:32])
    with writing("the client's working folder", client.folder):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(mode=0o700)
    try:
        write_secret(home / "secret", secrets.token_bytes(32))
        write_new(home / "ca.pem", client.join.authority, 0o600)
        yield home, node
    finally:
        shutil.rmtree(home, ignore_errors=True)

"""The server's machinery while a run lasts: Flower's SuperLink as a child, and its grid here."""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedtl.deployment.federation import Federation, own_facts
from fedtl.deployment.join import is_loopback
from fedtl.deployment.keys import write_secret
from fedtl.engines.flower_processes import Child, refuse_taken_port, start_superlink
from fedtl.errors import EnvironmentFault, SecurityRefusal, writing

if TYPE_CHECKING:
    from fedtl.engines.flower_submission import Submission

START_SECONDS = 90.0
"""In which a SuperLink must answer; it takes about 4 s, more on a busy machine."""


@dataclass
class OpenGrid:
    """A running SuperLink with our run on it.

    Attributes:
        grid: Flower's ``Grid``.
        names: public key (PEM) -> approved name, of all clients that are let in; clients that are
            approved while the server waits are added by ``admit``.
        sign: signs a request's content with the federation's key.
    """

    federation: Federation
    grid: Submission
    child: Child
    sign: Callable[[bytes], bytes]
    names: dict[bytes, str] = field(default_factory=dict)

    def admit(self) -> list[str]:
        """Let in whoever was approved since the last call; their names."""
        new = []
        for name, key in self.federation.approved().items():
            if key.pem not in self.names:
                self.grid.register(key.pem, name)
                self.names[key.pem] = name
                new.append(name)
        return new

    def approved(self) -> set[str]:
        """Names of all approved clients, after letting new ones in."""
        self.admit()
        return set(self.names.values())

    def name(self, node: int) -> str:
        """The name of the client behind a node."""
        pem = self.grid.keys().get(node, b"")
        return self.names.get(pem, "somebody")

    def trouble(self) -> str | None:
        """Why nobody can answer any more, or None."""
        if self.child.poll() is None:
            return None
        return f"Flower's SuperLink ended: {_last_words(self.child)}"


@contextmanager
def open_grid(federation: Federation) -> Iterator[OpenGrid]:
    """Start a SuperLink, submit our app and let the approved clients in; end all that afterwards.

    Raises:
        InputError: the folder is not a federation's.
        SecurityRefusal: the server's certificate has expired.
        EnvironmentFault: the port is taken, or the SuperLink does not start.
    """
    join = federation.join()
    if (left := federation.certificate_days()) < 0:
        raise SecurityRefusal(
            f"the server's certificate expired {-left:.0f} days ago",
            where=federation.root,
            do="Type 'fedtl server init --renew'",
        )
    host = _listen_on(join.host)
    refuse_taken_port(host, join.port)
    signing = federation.signing_key()
    home = federation.path("flower")
    with writing("the federation's folder", federation.root):
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(mode=0o700)
    secret, token = secrets.token_bytes(32), secrets.token_hex(32)
    write_secret(home / "secret", secret)
    child = start_superlink(
        host=host,
        port=join.port,
        certificate=federation.path("server.pem"),
        key=federation.path("server.key"),
        authority=federation.path("ca.pem"),
        secret=home / "secret",
        settings={"token": token, "facts": own_facts()},
        home=home,
        log=federation.path("superlink.log"),
    )
    try:
        from fedtl.engines.flower_submission import Submission

        logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what matters is raised
        loopback = "[::1]" if ":" in host else "127.0.0.1"
        authority = federation.path("ca.pem").read_bytes()
        grid = Submission(f"{loopback}:{join.port}", authority, token, lambda: child.poll() is None)
        _wait(grid, child, federation)
        with grid.open(federation.app(), secret):
            opened = OpenGrid(federation, grid, child, signing.sign)
            opened.admit()
            grid.open_gate()
            yield opened
    finally:
        child.stop()
        shutil.rmtree(home, ignore_errors=True)


def _listen_on(host: str) -> str:
    """The interface to listen on: loopback only where the address is, else all of that family."""
    if is_loopback(host):
        return "::1" if ":" in host else "127.0.0.1"
    return "::" if ":" in host else "0.0.0.0"


def _wait(grid: Submission, child: Child, federation: Federation) -> None:
    """Until the SuperLink answers."""
    until = time.monotonic() + START_SECONDS
    while not grid.reachable():
        if child.poll() is not None or time.monotonic() > until:
            raise EnvironmentFault(
                "Flower's SuperLink did not start",
                where=federation.path("superlink.log"),
                got=_last_words(child),
            )
        time.sleep(0.05)


def _last_words(child: Child) -> str:
    """The last line that a child printed and that says something."""
    lines = [line for line in child.last_lines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"

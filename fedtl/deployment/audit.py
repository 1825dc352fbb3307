"""What left this machine: one JSON line for each answer, chained by hashes, only ever appended to.

Each line holds the hash of the one before, so that no line can be changed, dropped or put in
without every later hash being wrong. (Lines cut off at the very end leave no trace in the file:
who wants to be sure of those keeps the last hash, which ``fedtl client audit`` prints.) A line that
a crash left torn stays where it is; the next one says what it was.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtl.engines.node import MASKED, Sent
from fedtl.errors import EnvironmentFault, InputError, SecurityRefusal, writing

START = "0" * 64
"""Stands for the line before the first."""

LINE_BYTES = 2**20
"""A longer line is none of ours."""


@dataclass
class Tally:
    """What an audit log says in sum.

    Attributes:
        lines: whole entries.
        torn: lines that crashes left.
        messages, num_bytes, numbers: by kind of message, masked answers apart; numbers are
            elements of tensors.
        first, last: times of the first and the last entry.
        head: hash of the last entry, ``START`` where there is none.
    """

    lines: int = 0
    torn: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)
    numbers: Counter[str] = field(default_factory=Counter)
    first: str = ""
    last: str = ""
    head: str = START

    def _add(self, entry: Mapping[str, Any]) -> None:
        self.lines += 1
        self.head, self.last = entry["hash"], str(entry["time"])
        self.first = self.first or self.last
        kind = str(entry["kind"])
        if "sha256" in entry:
            kind += ", under masks" if dict(entry["facts"]).get(MASKED) else ""
            self.messages[kind] += 1
            self.num_bytes[kind] += int(entry["bytes"])
            self.numbers[kind] += int(entry["numbers"])


class AuditLog:
    """Appends entries; each is on the disk before the call returns.

    Opening checks the whole chain and goes on with it.

    Raises:
        SecurityRefusal: the file was changed by something else.
        EnvironmentFault: another process writes it.
    """

    def __init__(self, path: Path, **facts: Any) -> None:
        self.path = path
        with writing("the audit log", path.parent):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise EnvironmentFault(
                "another client of this name runs on this machine", where=path
            ) from None
        try:
            tally, torn = _read(path)
            self._head, self._count = tally.head, tally.lines
            size = os.fstat(self._descriptor).st_size
            if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
                self._write(b"\n")
            if torn:
                self.note("torn", **_about(torn))
            self.note("opened", **facts)
        except BaseException:
            self.close()
            raise
        self.torn = torn

    def sent(self, sent: Sent) -> None:
        """An answer that is about to leave. Raises EnvironmentFault: then it must not."""
        numbers = sum(map(math.prod, sent.shapes.values()))
        self.note(
            sent.kind,
            round=sent.round,
            facts=dict(sent.facts),
            tensors={name: list(shape) for name, shape in sent.shapes.items()},
            numbers=numbers,
            bytes=sent.num_bytes,
            sha256=sent.sha256,
        )

    def note(self, kind: str, **facts: Any) -> None:
        """One entry."""
        entry = {
            "n": self._count + 1,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "kind": kind,
            **facts,
            "previous": self._head,
        }
        entry["hash"] = _hash(entry)
        self._write(json.dumps(entry, default=str).encode() + b"\n")
        self._head, self._count = entry["hash"], self._count + 1

    def close(self) -> None:
        """Let others open it."""
        os.close(self._descriptor)

    def _write(self, content: bytes) -> None:
        with writing("the audit log", self.path.parent):
            size = os.fstat(self._descriptor).st_size
            if os.write(self._descriptor, content) != len(content):
                os.ftruncate(self._descriptor, size)  # half an entry; its answer does not leave
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._descriptor)


def verify(path: Path) -> Tally:
    """Check an audit log's chain and sum it up.

    Raises:
        InputError: it cannot be read.
        SecurityRefusal: a line was changed, dropped or put in; names the first.
    """
    tally, torn = _read(path)
    tally.torn += bool(torn)
    return tally


def _read(path: Path) -> tuple[Tally, bytes]:
    """The sum over a file's whole lines, and what a crash left behind them."""
    tally, torn, number = Tally(), b"", 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(LINE_BYTES):
                number += 1
                entry = _parse(line)
                if not line.endswith(b"\n") and file.read(1):
                    raise _broken(path, number, "a line that is too long")
                if not line.endswith(b"\n") and entry is None:
                    return tally, line
                if torn and (entry is None or not _explains(entry, torn[:-1])):
                    raise _broken(path, number - 1, "a damaged line that no crash explains")
                if entry is None:
                    torn = line
                    continue
                if entry.get("previous") != tally.head or entry.get("n") != tally.lines + 1:
                    raise _broken(path, number, "it does not follow the line before")
                tally._add(entry)
                tally.torn, torn = tally.torn + bool(torn), b""
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from error
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, number, "it is not an entry") from error
    if torn:
        raise _broken(path, number, "a damaged line that no crash explains")
    return tally, b""


def _parse(line: bytes) -> dict[str, Any] | None:
    """An entry whose hash is right, None where the line is none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get("hash") != _hash(entry):
        return None
    return entry


def _explains(entry: Mapping[str, Any], torn: bytes) -> bool:
    return entry.get("kind") == "torn" and all(entry.get(k) == v for k, v in _about(torn).items())


def _about(torn: bytes) -> dict[str, Any]:
    return {"torn_bytes": len(torn), "torn_sha256": hashlib.sha256(torn).hexdigest()}


def _hash(entry: Mapping[str, Any]) -> str:
    """SHA-256 over an entry without its own hash, in one fixed form."""
    rest = {key: value for key, value in entry.items() if key != "hash"}
    form = json.dumps(rest, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(form.encode()).hexdigest()


def _broken(path: Path, number: int, why: str) -> SecurityRefusal:
    return SecurityRefusal(
        "this audit log was changed after it was written",
        where=f"{path}, line {number}",
        got=why,
        do="Keep the file as it is; move it away before the client can start again",
    )

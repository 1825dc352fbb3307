"""What was released under noise, on disk before it is used: nothing spent is ever forgotten.

One JSON line per release in the run's folder. A run that is killed and resumed does some rounds
again: with a seeded stream the noise, and so the release, is the very same and costs nothing more;
with fresh noise it is another release. ``noise_id`` tells them apart.

The file only ever grows. A last line that a crash cut short was not promised yet (the noise is
used after the line is safe): it is kept, marked before the next one, and told of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fedtl.errors import SecurityRefusal, writing

LEDGER = "ledger.jsonl"
"""Its name in the run's folder."""

CUT = b" #cut"
"""Put behind what a crash left of a line."""


@dataclass(frozen=True)
class Entry:
    """One release.

    Attributes:
        round: 1 for the first.
        kind: what was released: "updates", "statistics".
        noise_multiplier: deviation over the clip, as the promise has it.
        sampling: how its clients came into the round.
        rate: share of the clients that take part, on average.
        count: releases alike.
        clients: ids of who took part; only who spends or sees something by it need be known.
        noise_id: the same for noise that is the same, see ``noise.Noise.id``.
    """

    round: int
    kind: str
    noise_multiplier: float
    sampling: str
    rate: float
    count: int = 1
    clients: tuple[int, ...] = ()
    noise_id: str = ""

    def line(self) -> str:
        """As one line of JSON, without its end."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def parse(cls, line: str) -> Entry:
        """The entry of a line.

        Raises:
            ValueError: it is none.
        """
        content = json.loads(line)
        if not isinstance(content, dict) or set(content) != {field.name for field in fields(cls)}:
            raise ValueError("not an entry")
        kinds: dict[str, Any] = {
            "round": int, "kind": str, "noise_multiplier": int | float, "sampling": str,
            "rate": int | float, "count": int, "clients": list, "noise_id": str,
        }  # fmt: skip
        if not all(isinstance(content[name], kind) for name, kind in kinds.items()):
            raise ValueError("not an entry")
        if not all(isinstance(client, int) for client in content["clients"]):
            raise ValueError("not an entry")
        return cls(**{**content, "clients": tuple(content["clients"])})


class Ledger:
    """The releases of a run, in the order in which they were charged.

    Args:
        path: of the file; it is made with the first charge.

    Attributes:
        entries: all there are.
        damaged: what to tell of a last line that was cut short, or None.

    Raises:
        SecurityRefusal: a line that is no entry: what was spent cannot be known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: tuple[Entry, ...] = ()
        self.damaged: str | None = None
        content = path.read_bytes() if path.exists() else b""
        *lines, rest = content.split(b"\n")
        self._cut = bool(rest)
        self.entries = tuple(_entries(lines, path))
        if rest:
            self.damaged = (
                f"the last line of {path.name} was cut short ({len(rest)} bytes), most likely by a "
                "crash before its noise was used; it is kept, and counts as nothing"
            )

    def holds(self, round: int, noise_id: str) -> bool:
        """Whether this noise of this round was charged before."""
        return any(e.round == round and e.noise_id == noise_id for e in self.entries)

    def charge(self, entry: Entry) -> None:
        """Write an entry down, safely, before its noise is used; the same noise only once.

        Raises:
            EnvironmentFault: it cannot be written.
        """
        if self.holds(entry.round, entry.noise_id):
            return
        text = (CUT + b"\n" if self._cut else b"") + entry.line().encode() + b"\n"
        with writing("the privacy ledger", self.path):
            new = not self.path.exists()
            with self.path.open("ab") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if new:
                folder = os.open(self.path.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        self._cut = False
        self.entries = (*self.entries, entry)


def _entries(lines: list[bytes], path: Path) -> Iterator[Entry]:
    """Whole lines as entries, without those that were cut short."""
    for number, line in enumerate(lines, 1):
        if line.endswith(CUT):
            continue
        try:
            yield Entry.parse(line.decode())
        except ValueError as error:
            raise SecurityRefusal(
                "a line of the privacy ledger cannot be read, so nobody knows what was spent",
                where=f"{path}, line {number}",
                do="Bring the file back as it was; without it start a new run, but what the old "
                "one released stays released",
            ) from error

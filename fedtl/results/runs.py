"""The run folder: what a run leaves behind, under fixed names."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save

from fedtl.errors import EnvironmentFault, InputError, writing
from fedtl.results.commits import Commit, read_commit, write_commit
from fedtl.results.files import write_atomic
from fedtl.results.records import CLIENTS, ROUNDS, Complete, RecordStream

SUMMARY = "summary.json"
SCENARIO = "scenario.toml"
PARTY = "party.json"
"""Only of a run with real clients: who takes part, and the run's own id; nothing secret."""


def refuse_taken(path: Path) -> None:
    """Raise InputError where a run folder cannot be made because something is there."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    unfinished = (path / SCENARIO).is_file() and not (path / SUMMARY).is_file()
    resume = "fedtl server resume" if (path / PARTY).is_file() else "fedtl resume"
    raise InputError(
        "the run folder exists already",
        where=path,
        do=f"Type '{resume} {path}' to go on with it, or choose another --out"
        if unfinished
        else "Choose another --out",
    )


class RunFolder:
    """One run's folder: scenario, records, commits, events, and at the end summary and head.

    Made by ``create`` or ``reopen``; both hold a lock, so that two processes cannot write one run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rounds = RecordStream(path / "records" / "rounds.arrows", ROUNDS)
        self.clients = RecordStream(path / "records" / "clients.arrows", CLIENTS)
        self._lock: int | None = None
        self._made: list[Path] = []

    @classmethod
    def create(cls, path: Path, scenario_toml: str) -> RunFolder:
        """Make a new run folder. Raises InputError where one exists, EnvironmentFault where the
        place cannot be written."""
        refuse_taken(path)
        folder = cls(path)
        with writing("the run folder", path):
            folder._made = [p for p in (path, *path.parents) if not p.exists()]
            path.mkdir(parents=True, exist_ok=True)
        try:
            folder._acquire()
            write_atomic(path / SCENARIO, scenario_toml.encode())
            folder._make_rooms()
        except BaseException:
            folder.discard()
            raise
        return folder

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Open a run to go on with it. Raises InputError where it is none."""
        if not (path / SCENARIO).is_file():
            raise InputError(
                "not a run folder", where=path, allowed="a folder that 'fedtl run' made"
            )
        folder = cls(path)
        folder._acquire()
        folder._make_rooms()
        return folder

    def _make_rooms(self) -> None:
        with writing("the run folder", self.path):
            (self.path / "records").mkdir(exist_ok=True)
            (self.path / "checkpoints").mkdir(exist_ok=True)

    def _acquire(self) -> None:
        """Lock the folder itself: the system lets go of it when the process dies."""
        with writing("the run folder", self.path):
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # an OSError too, so it must be caught in here
                self.release()
                raise EnvironmentFault(
                    "another process works on this run", where=self.path
                ) from None

    def release(self) -> None:
        """Let others open the run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove a run in which nothing was committed, and the folders made for it, no others."""
        self.release()
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):  # a parent that somebody else uses by now stays
            for made in self._made:
                made.rmdir()

    def begin(self) -> tuple[Commit | None, list[str]]:
        """Cut the records back to the newest whole commit and return it, with notes."""
        commit, notes = read_commit(self.path / "checkpoints")
        self.rounds.start(int(commit.facts["rounds_bytes"]) if commit else 0)
        self.clients.start(int(commit.facts["clients_bytes"]) if commit else 0)
        return commit, notes

    def commit(self, commit: Commit) -> None:
        """Make a round last."""
        write_commit(self.path / "checkpoints", commit)

    def event(self, kind: str, **facts: Any) -> None:
        """One line in ``events.jsonl``: what happened when. No private data goes in here."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **facts})
        with writing("events.jsonl", self.path), open(self.path / "events.jsonl", "a") as file:
            file.write(line + "\n")

    def write_tables(
        self, complete: Complete = lambda batch: batch, classes: pa.Table | None = None
    ) -> None:
        """``rounds.parquet`` and ``clients.parquet`` from all records so far.

        Args:
            complete: fills in the columns of ``clients`` that were not known before.
            classes: what becomes ``classes.parquet``, at the end of a run.
        """
        self.rounds.write_parquet(self.path / "rounds.parquet")
        self.clients.write_parquet(self.path / "clients.parquet", complete)
        if classes is not None:
            content = pa.BufferOutputStream()
            pq.write_table(classes, content)
            write_atomic(self.path / "classes.parquet", content.getvalue().to_pybytes())

    def write_head(
        self, head: Mapping[str, np.ndarray[Any, Any]], facts: Mapping[str, str]
    ) -> None:
        """``head.safetensors`` with what it fits (backbone, classes) as metadata."""
        content = save(dict(head), metadata=dict(facts))
        write_atomic(self.path / "head.safetensors", content)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, the sign of a whole run, and drop the working records."""
        write_atomic(self.path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
        for stream in (self.rounds, self.clients):
            stream.path.unlink(missing_ok=True)
        with writing("the run folder", self.path):
            os.rmdir(self.path / "records")

    def finished(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None."""
        path = self.path / SUMMARY
        if not path.is_file():
            return None
        try:
            content: dict[str, Any] = json.loads(path.read_bytes())
            return content
        except ValueError as error:
            raise InputError(
                "the summary is damaged",
                where=path,
                do="Put it back from a copy, or run the scenario anew",
            ) from error

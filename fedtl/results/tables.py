"""Reading a run's folder back: whole, interrupted, or of an older version.

What a run did not write is null or None here, and said to be missing by whoever shows it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from fedtl.errors import InputError
from fedtl.results import audit_file
from fedtl.results.commits import read_commit
from fedtl.results.gap_file import is_whole
from fedtl.results.heads import partly_shared
from fedtl.results.records import BESIDE, CLASSES, CLIENTS, ROUNDS
from fedtl.results.runs import PARTY, SCENARIO, SUMMARY
from fedtl.scenario.schema import Scenario, Verdict

GAP = "gap.json"

GAP_FORMAT = 1
"""Of ``gap.json``; one of another format is as if it were not there."""

FEDERATED = "federated"
"""The head whose metrics have columns without a prefix."""

HEADS = (FEDERATED, *BESIDE)

KEYS = frozenset({"round", "client", "name", "split", "class"})
"""Columns that every version wrote: without them a table is damaged, not old."""

TABLES_OF_SUMMARY = (
    "data", "backbone", "seconds", "versions", "references", "verdict", "calibration",
    "privacy",
)  # fmt: skip

ANEW = "Put it back from a copy, or run the scenario anew"

LOW, HIGH = 0.1, 0.9
"""Of the clients' accuracies in each round: the band of a learning curve."""


@dataclass(frozen=True)
class RunTables:
    """What one run left behind.

    Attributes:
        path: the run folder.
        scenario: as in ``scenario.toml``; keys that this version knows may be missing.
        summary: ``summary.json``; None of a run that was interrupted.
        rounds: pandas frame with the columns of ``records.ROUNDS``.
        own: one row per judged client, its own test examples, in the last judged round.
        everyone: the same on everybody's test examples; no rows where that was not judged.
        classes: rows of ``classes.parquet``, or None.
        gap: ``gap.json``, or None.
        audit: ``audit.json``, or None.
        real: whether the clients were real ones.
    """

    path: Path
    scenario: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    rounds: pd.DataFrame
    own: pd.DataFrame
    everyone: pd.DataFrame
    classes: pd.DataFrame | None
    gap: Mapping[str, Any] | None
    audit: Mapping[str, Any] | None
    real: bool
    _clients: _Stored = field(repr=False)

    @property
    def name(self) -> str:
        """The scenario's name."""
        return str(self.scenario.get("name", self.path.name))

    @property
    def planned_rounds(self) -> int | None:
        """Rounds that the scenario asks for."""
        return self.scenario.get("rounds")

    @property
    def done_rounds(self) -> int:
        """Rounds that are in the tables."""
        return int(self.rounds["round"].max()) if len(self.rounds) else 0

    @property
    def interrupted(self) -> bool:
        """Whether the run did not come to its end."""
        return self.summary is None

    @property
    def partly_shared(self) -> bool:
        """Whether clients keep a part of the head: the federated one is then each client's own."""
        return partly_shared(self.summary or {})

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that were judged, the federated one first; none stands under two names."""
        names = [head for head in HEADS if not (head == "personal" and self.partly_shared)]
        return tuple(head for head in names if self.own[accuracy_of(head)].notna().any())

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Per judged round, over the clients: mean, and the 10 % and 90 % quantiles of accuracy."""
        table = self._clients.read(["round", "split", "accuracy"])
        table = table.filter(pc.equal(table["split"], "test")).drop(["split"])
        frame = table.to_pandas().dropna()
        grouped = frame.groupby("round")["accuracy"]
        found = grouped.quantile([LOW, HIGH]).unstack()
        return pd.DataFrame(
            {"mean": grouped.mean(), "low": found.get(LOW), "high": found.get(HIGH)}
        ).reset_index()

    @cached_property
    def training(self) -> pd.DataFrame:
        """Per client (index): training examples, rounds it was asked in, answers that were used."""
        table = self._clients.read(["client", "split", "status", "examples"])
        frame = table.filter(pc.equal(table["split"], "train")).to_pandas()
        grouped = frame.assign(used=frame["status"].eq("ok")).groupby("client")
        return pd.DataFrame(
            {
                "train": grouped["examples"].max(),
                "asked": grouped.size(),
                "used": grouped["used"].sum(),
            }
        )

    @cached_property
    def unused(self) -> dict[str, int]:
        """Why answers were not used, and how often."""
        table = self._clients.read(["split", "status"])
        frame = table.filter(pc.equal(table["split"], "train")).to_pandas()
        found = frame.loc[frame["status"].notna() & frame["status"].ne("ok"), "status"]
        return {str(reason): int(count) for reason, count in found.value_counts().items()}

    @cached_property
    def clients(self) -> pd.DataFrame:
        """All of ``clients.parquet``."""
        frame: pd.DataFrame = self._clients.read().to_pandas()
        return frame


def accuracy_of(head: str) -> str:
    """The column with a head's accuracy."""
    return "accuracy" if head == FEDERATED else f"{head}_accuracy"


def read_run(path: Path) -> RunTables:
    """Read a run's folder.

    Raises:
        InputError: it is none, it holds several seeds, or nothing was recorded in it yet.
    """
    if not (path / SCENARIO).is_file():
        if seeds := seed_folders(path):
            raise InputError(
                f"this folder holds {len(seeds)} runs, one for each seed",
                where=path,
                do=f"Name one of them, e.g. {seeds[0]}, or use 'fedtl compare' for all",
            )
        raise InputError("not a run folder", where=path, allowed="a folder that 'fedtl run' made")
    summary = _json(path / SUMMARY)
    finished = summary is not None
    rounds = _Stored(path, "rounds", ROUNDS, finished)
    clients = _Stored(path, "clients", CLIENTS, finished)
    if not (rounds.exists and clients.exists):
        raise InputError(
            "no round of this run was recorded",
            where=path,
            do=f"Type 'fedtl resume {path}' to go on with it",
        )
    own, everyone = _last(clients)
    classes = path / "classes.parquet"
    return RunTables(
        path,
        _scenario(path / SCENARIO),
        None if summary is None else _without_nulls(summary, path / SUMMARY),
        rounds.read().to_pandas(),
        own,
        everyone,
        _conform(_parquet(classes), CLASSES, classes).to_pandas() if classes.is_file() else None,
        _gap(path / GAP),
        _audit(path / audit_file.AUDIT),
        (path / PARTY).is_file(),
        clients,
    )


def seed_folders(path: Path) -> list[Path]:
    """The runs in a folder that ``fedtl run --seeds`` made, by seed; none in another."""
    found = [p.parent for p in path.glob(f"seed-*/{SCENARIO}")]
    return sorted(found, key=lambda p: (len(p.name), p.name))


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with exactly a schema's columns: what an older version did not write is null.

    Args:
        table: with any of the columns, and perhaps others.
        schema: its fields are the columns of the answer, in their order.
    """
    columns = [
        table[one.name].cast(one.type)
        if one.name in table.column_names
        else pa.nulls(table.num_rows, one.type)
        for one in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _conform(table: pa.Table, schema: pa.Schema, where: Path) -> pa.Table:
    """``conform``, or the error that a file is damaged."""
    lost = [name for name in schema.names if name in KEYS and name not in table.column_names]
    try:
        if not lost:
            return conform(table, schema)
    except pa.ArrowException:  # its words hold a value of the table
        pass
    what = f"it has no column {lost[0]!r}" if lost else "a column is of another type"
    raise InputError(f"is damaged: {what}", where=where, do=ANEW)


@dataclass(frozen=True)
class _Stored:
    """One table on disk: the Parquet file, or the stream of a run that is not finished."""

    run: Path
    name: str
    schema: pa.Schema
    finished: bool

    @property
    def parquet(self) -> Path:
        return self.run / f"{self.name}.parquet"

    @property
    def stream(self) -> Path:
        return self.run / "records" / f"{self.name}.arrows"

    @property
    def exists(self) -> bool:
        return self.parquet.is_file() or self.stream.is_file()

    def read(self, columns: Sequence[str] | None = None, filters: Any = None) -> pa.Table:
        """Rows with the columns of the schema, or some of them."""
        wanted = self.schema.names if columns is None else columns
        schema = pa.schema([self.schema.field(name) for name in wanted])
        if self.stream.is_file() and not self.finished:  # newer than tables of an earlier stop
            table = _committed(self.stream, self.run, f"{self.name}_bytes")
            rows = table if filters is None else table.filter(filters)
            return _conform(rows, schema, self.stream)
        there = set(_file_schema(self.parquet).names)
        rows = _parquet(self.parquet, [c for c in wanted if c in there], filters)
        return _conform(rows, schema, self.parquet)


def _last(clients: _Stored) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The last judged round's rows: own tests, everybody's."""
    rounds = clients.read(["round", "split"])
    judged = rounds.filter(pc.equal(rounds["split"], "test"))
    last = pc.max(judged["round"]).as_py()
    table = clients.read(filters=pc.field("round") == (-1 if last is None else last))
    own, everyone = (
        table.filter(pc.equal(table["split"], split)).to_pandas().sort_values("client")
        for split in ("test", "everyone")
    )
    # A strategy of personal heads is judged once more at the end: the later row counts.
    own = own.drop_duplicates("client", keep="last").reset_index(drop=True)
    return own, everyone.drop_duplicates("client", keep="last").reset_index(drop=True)


def _committed(stream: Path, run: Path, key: str) -> pa.Table:
    """The rows of a stream that the newest whole commit remembers; what a crash left is cut off."""
    commit, _ = read_commit(run / "checkpoints")
    size = stream.stat().st_size
    if commit is not None:
        size = min(size, int(commit.facts.get(key, size)))
    batches = []
    try:
        with pa.memory_map(str(stream)) as source:
            reader = pa.ipc.open_stream(pa.BufferReader(source.read_buffer(size)))
            schema = reader.schema
            batches.extend(iter(reader))
    except pa.ArrowInvalid as error:
        if not batches:
            raise InputError(f"the records are damaged ({error})", where=stream) from error
    except OSError as error:
        raise InputError(f"the records cannot be read ({error})", where=stream) from error
    return pa.Table.from_batches(batches, schema)


def _file_schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"the table cannot be read ({error})", where=path, do=ANEW) from error


def _parquet(path: Path, columns: Sequence[str] | None = None, filters: Any = None) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, filters=filters)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"the table cannot be read ({error})", where=path, do=ANEW) from error


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(content, dict):
        raise _damaged(path)
    return content


def _damaged(path: Path) -> InputError:
    again = {
        GAP: f"Delete it; 'fedtl report {path.parent} --gap' measures it again",
        audit_file.AUDIT: f"Delete it; 'fedtl audit {path.parent}' makes it again",
    }
    return InputError("is damaged", where=path, do=again.get(path.name, ANEW))


def _without_nulls(summary: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A summary whose unknown entries are not there, as an older version left them out."""
    known = {key: value for key, value in summary.items() if value is not None}
    whole = all(isinstance(known.get(key, {}), dict) for key in TABLES_OF_SUMMARY)
    if not whole or not isinstance(known.get("notes", []), list):
        raise _damaged(path)
    return known


def _scenario(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise _damaged(path) from error
    tables = Scenario(name="defaults").model_dump()
    if any(isinstance(tables.get(k), dict) and not isinstance(v, dict) for k, v in content.items()):
        raise _damaged(path)
    rule = {k: v for k, v in content.get("verdict", {}).items() if k in Verdict.model_fields}
    try:
        Verdict.model_validate(rule)
    except ValidationError as error:
        raise _damaged(path) from error
    return content


def _gap(path: Path) -> dict[str, Any] | None:
    content = _json(path)
    if content is None or content.get("format") != GAP_FORMAT:
        return None
    if not is_whole(content):
        raise _damaged(path)
    return content


def _audit(path: Path) -> dict[str, Any] | None:
    content = _json(path)
    if content is None or content.get("format") != audit_file.FORMAT:
        return None
    if not audit_file.is_whole(content):
        raise _damaged(path)
    return content


def number(value: Any) -> float | None:
    """A finite float, or None."""
    if isinstance(value, int | float | np.number) and np.isfinite(value):
        return float(value)
    return None

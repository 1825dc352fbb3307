"""Rows of results while a run goes on: an append-only Arrow stream, cut back to the last commit.

A round costs one append, whatever came before it. The commit remembers how many bytes count; what
a crash left behind them is cut off on resume. At the end the stream becomes one Parquet file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedtl.errors import InputError, writing
from fedtl.results.files import sync_folder

_ROUND = (("round", pa.int32()),)
ROUNDS = pa.schema(
    [
        *_ROUND,
        ("cohort", pa.int32()),
        ("accepted", pa.int32()),
        ("abandoned", pa.bool_()),
        ("learning_rate", pa.float64()),
        ("train_loss", pa.float64()),
        ("loss", pa.float64()),
        ("accuracy", pa.float64()),
        ("balanced_accuracy", pa.float64()),
        ("accuracy_client_mean", pa.float64()),
        ("worst_decile_accuracy", pa.float64()),
        ("spread", pa.float64()),
        ("bytes_up", pa.int64()),
        ("bytes_down", pa.int64()),
        ("seconds", pa.float64()),
        ("epsilon", pa.float64()),
    ]
)
"""One row a round; metrics of the federated head on all judged clients' test examples. ``epsilon``
is what all rounds so far have spent; in long runs it is known for some rounds only."""

BESIDE = (
    "local_only",
    "centralised",
    "ridge",
    "fine_tuned",
    "best_client",
    "from_scratch",
    "start",
    "unprotected",
    "personal",
)
"""Heads that stand beside the federated one in the last round's rows."""

CLIENTS = pa.schema(
    [
        *_ROUND,
        ("client", pa.int64()),
        ("name", pa.string()),
        ("domain", pa.string()),
        ("split", pa.string()),
        ("examples", pa.int64()),
        ("loss", pa.float64()),
        ("accuracy", pa.float64()),
        ("balanced_accuracy", pa.float64()),
        ("update_norm", pa.float64()),
        ("status", pa.string()),
        *((f"{head}_{metric}", pa.float64()) for head in BESIDE for metric in ("accuracy", "loss")),
        ("beats_local_only", pa.int64()),
        ("loses_to_local_only", pa.int64()),
        ("fine_tuned_beats_local_only", pa.int64()),
        ("fine_tuned_loses_to_local_only", pa.int64()),
        ("personal_beats_local_only", pa.int64()),
        ("personal_loses_to_local_only", pa.int64()),
        ("p_value", pa.float64()),
        ("p_holm", pa.float64()),
        ("verdict", pa.string()),
        ("advice", pa.string()),
        ("calibration_error", pa.float64()),
        ("auroc", pa.float64()),
        ("contribution_own", pa.float64()),
        ("contribution_others", pa.float64()),
    ]
)
"""One row per round, client and split. ``split``: train (the client's own training), test (its own
test examples), everyone (the test examples of all; last round only). The metrics are the federated
head's; beside them, in the last round, those of the references. ``beats_local_only`` counts the
examples that only the federated head has right, ``loses_to_local_only`` those that only the
client's own has; the p-values, ``verdict`` (gains, no evidence, harmed) and ``advice`` (join,
personalise, stay alone, not enough evidence) are about these, on the client's own tests. Undefined
is null."""

CLASSES = pa.schema(
    [
        ("client", pa.int64()),
        ("name", pa.string()),
        ("domain", pa.string()),
        ("class", pa.string()),
        ("train", pa.int64()),
        ("test", pa.int64()),
        ("correct", pa.int64()),
        ("local_only_correct", pa.int64()),
    ]
)
"""``classes.parquet``: one row per client and class that it has; ``correct`` of its test examples,
by the federated head. Of real clients the training counts are not known (null)."""


Complete = Callable[[pa.RecordBatch], pa.RecordBatch]


class RecordStream:
    """One growing table on disk."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema

    def start(self, committed_bytes: int = 0) -> None:
        """Begin, or cut back to what was committed. ``committed_bytes`` 0 begins anew.

        Raises:
            InputError: less is there than was committed.
        """
        if committed_bytes:
            size = self.path.stat().st_size if self.path.is_file() else 0
            if size < committed_bytes:
                raise InputError(
                    "the records of committed rounds are damaged",
                    where=self.path,
                    got=f"{size} bytes",
                    allowed=f"at least {committed_bytes}",
                    do="Run the scenario anew",
                )
            with writing(self.path.name, self.path.parent):
                os.truncate(self.path, committed_bytes)
            return
        with writing(self.path.name, self.path.parent):
            self.path.write_bytes(self.schema.serialize().to_pybytes())
            sync_folder(self.path.parent)

    def append(self, *blocks: Mapping[str, Sequence[Any] | Any]) -> int:
        """Add blocks of rows and return the file's length in bytes, which the next commit keeps."""
        with writing(self.path.name, self.path.parent), open(self.path, "ab") as file:
            for columns in blocks:
                batch = pa.RecordBatch.from_pydict(dict(columns), schema=self.schema)
                file.write(batch.serialize())
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def read(self) -> pa.Table:
        """All rows, memory-mapped."""
        with pa.memory_map(str(self.path)) as source, pa.ipc.open_stream(source) as reader:
            return reader.read_all()

    def write_parquet(self, target: Path, complete: Complete = lambda batch: batch) -> None:
        """Rewrite everything as one Parquet file, batch by batch, atomically.

        Args:
            complete: fills in columns of a batch that were not known when it was appended.
        """
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        with writing(target.name, target.parent):
            try:
                with (
                    pa.memory_map(str(self.path)) as source,
                    pa.ipc.open_stream(source) as reader,
                    pq.ParquetWriter(temporary, self.schema) as writer,
                ):
                    for table in _grouped(map(complete, reader), self.schema):
                        writer.write_table(table)
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(target.parent)


def _grouped(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, rows: int = 200_000
) -> Iterator[pa.Table]:
    """Batches joined to tables of about ``rows`` rows: small row groups make slow Parquet."""
    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch)
        if sum(b.num_rows for b in held) >= rows:
            yield pa.Table.from_batches(held)
            held = []
    yield pa.Table.from_batches(held, schema)

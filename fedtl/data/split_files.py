"""Split files: who holds which example, and which are for testing, kept to be used again.

A row per example: ``row`` (its number in the data), ``client`` (a name) and ``split`` (train or
test). A client's rows stand together, the clients in their order. A .csv file names the data that
it was made for in a line of its own before the header, a .parquet file in its metadata. Nothing of
the data is in it but a hash.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from fedtl.data.clients import Mask
from fedtl.data.examples import Examples, content_hash
from fedtl.data.partitions import Assignment
from fedtl.errors import InputError, printable
from fedtl.results.files import write_atomic

COLUMNS = pa.schema([("row", pa.int64()), ("client", pa.string()), ("split", pa.string())])
SPLITS = ("train", "test")
SUFFIXES = (".csv", ".parquet")
KEY = "fedtl split 1, data"
"""Of the metadata, and how the first line begins: what the file is, and in which version."""

MAX_BYTES = 2**31
"""Of a file, and of what it says it unpacks to: a hundred million rows have room."""

WHERE = "clients.split_file"
ANEW = "Write it anew with 'fedtl split SCENARIO --write FILE'"


def write_split(path: Path, examples: Examples, assignment: Assignment, is_test: Mask) -> None:
    """Keep who holds what.

    Args:
        path: ends in .csv or .parquet; what is there is replaced if it is a split file.
        examples: as their source gives them.
        assignment: also of clients that are too small to take part.
        is_test: bool [N].

    Raises:
        InputError: another ending, or a file that is something else is in the way.
        EnvironmentFault: it cannot be written.
    """
    suffix = checked_suffix(path, "--write")
    if path.exists() and made_for(path) is None:
        raise InputError(
            "there is a file already, and it is no split file",
            where="--write",
            got=str(path),
            do="Give another name",
        )
    order = np.argsort(assignment.client, kind="stable")
    names = pa.DictionaryArray.from_arrays(assignment.client[order], list(assignment.names))
    splits = pa.DictionaryArray.from_arrays(is_test[order].astype(np.int8), list(SPLITS))
    columns = [pa.array(order, pa.int64()), names.cast(pa.string()), splits.cast(pa.string())]
    table = pa.Table.from_arrays(columns, schema=COLUMNS)
    stream = pa.BufferOutputStream()
    if suffix == ".parquet":
        pq.write_table(table.replace_schema_metadata({KEY: examples.fingerprint}), stream)
    else:
        stream.write(f"# {KEY} {examples.fingerprint}\n".encode())
        csv.write_csv(table, stream)
    write_atomic(path, stream.getvalue().to_pybytes())


def with_split_file(examples: Examples, path: Path) -> Examples:
    """The examples with the clients, and the test rows, of a split file.

    What the file says is in ``Examples.dealt``, and so in the identity of a run.

    Raises:
        InputError: no split file, one of other data, or one that does not give every example to
            one client.
    """
    checked_suffix(path, WHERE)
    if not path.is_file():
        raise InputError("no such file", where=WHERE, got=str(path), do=ANEW)
    made = made_for(path)
    if made is None:
        raise InputError("no split file", where=WHERE, got=str(path), do=ANEW)
    if made != examples.fingerprint:
        raise InputError(
            "this split is of other data",
            where=WHERE,
            got=f"data {made[:12]}",
            allowed=f"data {examples.fingerprint[:12]}",
            do=ANEW,
        )
    with reading(path):
        table = read_table(path, len(examples))
    if table.num_rows != len(examples):
        raise refused(path, f"{table.num_rows} rows", f"{len(examples)}, one per example")
    rows = table["row"].to_numpy()
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(rows):
        raise refused(path, "row numbers that the data do not have", f"0 to {len(rows) - 1}")
    if (times := np.bincount(rows, minlength=len(rows))).max(initial=1) > 1:
        raise refused(path, f"{(times > 1).sum()} rows more than once", "each row once")
    clients, splits = (
        table[name].combine_chunks().dictionary_encode() for name in ("client", "split")
    )
    names = tuple(clients.dictionary.to_pylist())
    if not all(name.strip() and name.isprintable() for name in names):
        raise refused(path, "client names that are empty or cannot be shown", "names")
    if wrong := set(splits.dictionary.to_pylist()) - set(SPLITS):
        raise refused(path, f"split {printable(sorted(wrong)[0])!r}", "train, test")
    client = np.empty(len(rows), dtype=np.int32)
    client[rows] = clients.indices.to_numpy()
    is_test = np.empty(len(rows), dtype=np.bool_)
    is_test[rows] = np.array([name == "test" for name in splits.dictionary.to_pylist()])[
        splits.indices.to_numpy()
    ]
    dealt = content_hash("split", examples.dealt, client, names, is_test)
    return replace(examples, clients=client, client_names=names, is_test=is_test, dealt=dealt)


def checked_suffix(path: Path, where: str) -> str:
    """The ending of a split file's name."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            "not a name for a split file",
            where=where,
            got=str(path),
            allowed=", ".join(f"*{suffix}" for suffix in SUFFIXES),
        )
    return suffix


def made_for(path: Path) -> str | None:
    """The fingerprint of the data that a file was made for; None where it is no split file."""
    try:
        if path.suffix.lower() == ".parquet":
            found = (pq.read_metadata(path).metadata or {}).get(KEY.encode(), b"")
        else:
            with path.open("rb") as file:
                found = file.readline(200).removeprefix(f"# {KEY} ".encode()).strip()
    except (OSError, pa.ArrowException):
        return None
    return found.decode() if re.fullmatch(rb"[0-9a-f]{1,128}", found) else None


def read_table(path: Path, rows: int) -> pa.Table:
    """The columns, checked for their names and types; no more than ``rows`` are looked at."""
    if path.stat().st_size > MAX_BYTES:
        raise refused(path, f"{path.stat().st_size} bytes", f"{MAX_BYTES}")
    if path.suffix.lower() == ".parquet":
        file = pq.ParquetFile(path)
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        if sum(group.total_byte_size for group in groups) > MAX_BYTES:
            raise refused(path, "columns too large", f"{MAX_BYTES} bytes")
        if file.metadata.num_rows != rows:
            raise refused(path, f"{file.metadata.num_rows} rows", f"{rows}, one per example")
        table = file.read()
    else:
        table = csv.read_csv(
            path,
            read_options=csv.ReadOptions(skip_rows=1),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=COLUMNS, strings_can_be_null=False),
        )
    if sorted(table.column_names) != sorted(COLUMNS.names):
        got = ", ".join(map(printable, table.column_names[:5]))
        raise refused(path, f"columns {got}", ", ".join(COLUMNS.names))
    table = table.select(COLUMNS.names).cast(COLUMNS)
    if any(column.null_count for column in table.columns):
        raise refused(path, "empty cells", "a value in each")
    return table


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What Arrow says of a damaged file, as our error."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        why = str(error).partition("\n")[0][:200]
        raise InputError(
            f"damaged split file: {why}", where=WHERE, got=str(path), do=ANEW
        ) from error


def refused(path: Path, got: str, allowed: str) -> InputError:
    """The error for a split file that does not fit the data."""
    return InputError(
        f"{path.name} does not give every example to one client",
        where=WHERE,
        got=got,
        allowed=allowed,
        do=ANEW,
    )

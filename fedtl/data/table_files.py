"""The cells of a csv or Parquet file as text, column by column.

Both kinds of file meet here: what a number or a missing value is, is decided once, in ``tables``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtl import machine
from fedtl.data.csv_features import header_problems, read_header
from fedtl.data.examples import data_problems
from fedtl.errors import EnvironmentFault, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    import pyarrow as pa

SUFFIXES = (".csv", ".parquet")
MAX_BYTES = 16 * 2**30
MAX_COLUMNS = 65_536
CELL_BYTES = 80
"""What one cell of text takes while it is read, with what is made of it."""

Cells = Mapping[str, "pd.Series[str]"]
"""Column name -> text [N], without white space around it; "" where a value is missing."""


def column_names(path: Path) -> list[str]:
    """The columns in the file's order. Raises InputError."""
    if not path.is_file():
        raise InputError("no such .csv or .parquet file", where="data.path", got=str(path))
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            "not a table", where="data.path", got=path.name, allowed="a .csv or .parquet file"
        )
    if path.suffix.lower() == ".csv":
        names = read_header(path)
    else:
        with _parquet(path) as file:
            names = list(file.schema_arrow.names)
        if problems := header_problems(names, ""):
            raise data_problems(str(path), problems)
    if len(names) > MAX_COLUMNS:
        raise InputError(
            "too many columns", where=str(path), got=len(names), allowed=f"at most {MAX_COLUMNS}"
        )
    return names


def read_cells(path: Path, columns: Sequence[str]) -> Cells:
    """The named columns, in this order.

    Raises:
        InputError: a damaged file, no row, or a column of lists or the like.
        EnvironmentFault: the table does not fit into memory.
    """
    read = _csv_cells if path.suffix.lower() == ".csv" else _parquet_cells
    cells = read(path, list(columns))
    if not len(next(iter(cells.values()))):
        raise InputError("no row below the header", where=str(path))
    return cells


def _csv_cells(path: Path, columns: list[str]) -> Cells:
    import pandas as pd

    rows, size = 0, path.stat().st_size
    if size > MAX_BYTES:
        raise InputError("too large", where=str(path), got=f"{size} bytes", allowed=MAX_BYTES)
    with path.open("rb") as file:
        while block := file.read(2**20):
            rows += block.count(b"\n")
    _check_room(path, rows * len(columns))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of values that it drops
            frame = pd.read_csv(
                path, encoding="utf-8-sig", dtype=str, keep_default_na=False, index_col=False
            )
    except pd.errors.ParserWarning as error:
        raise InputError("rows have more values than the header names", where=str(path)) from error
    except pd.errors.ParserError as error:
        why = str(error).partition("C error: ")[2].strip() or "it cannot be read as a table"
        raise InputError(f"damaged table: {why}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=str(path), do="Save it as UTF-8") from error
    return {name: frame[name].fillna("").astype(str).str.strip() for name in columns}


def _parquet_cells(path: Path, columns: list[str]) -> Cells:
    with _parquet(path) as file:
        _check_room(path, file.metadata.num_rows * len(columns))
        table = file.read(columns=columns)
        return {name: _as_text(table[name], name, path) for name in columns}


def _as_text(column: pa.ChunkedArray, name: str, path: Path) -> pd.Series[str]:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    try:
        if pa.types.is_dictionary(kind):
            column = pc.cast(column, kind.value_type)
        if pa.types.is_boolean(kind):
            column = pc.cast(column, pa.int8())
        text = pc.fill_null(pc.cast(column, pa.string()), "")
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise InputError(
            f"column {name!r} is {kind}, neither numbers nor text", where=str(path)
        ) from error
    found: pd.Series[str] = text.to_pandas().astype(str).str.strip()
    return found


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """The opened file; whatever is wrong with it is the user's to mend."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise InputError("damaged .parquet file, or none", where=str(path)) from error


def _check_room(path: Path, cells: int) -> None:
    """What the table takes, before anything is allocated for it."""
    needed, available = CELL_BYTES * cells, machine.available_memory_bytes()
    if available is not None and needed > available:
        raise EnvironmentFault(
            "the table does not fit into memory",
            where=str(path),
            got=f"{needed} bytes needed",
            allowed=f"{available} bytes available",
            do="Use fewer rows, name columns in data.ignore, or use a machine with more memory",
        )

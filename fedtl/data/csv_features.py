"""A ``.csv`` file of features: numeric columns, a label, and optionally domain, client and split.

It may hold what nobody else should see: errors name columns and rows, never what stands there.
"""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedtl import machine
from fedtl.data.examples import data_problems
from fedtl.errors import EnvironmentFault, InputError, nearest

if TYPE_CHECKING:
    import pandas as pd

LABELS = ("y", "label")
WORDS = (*LABELS, "domain", "client", "split")
"""Columns that are no features."""

MAX_BYTES = 16 * 2**30
MAX_HEADER_BYTES = 4 * 2**20
MAX_WORD = 200
"""Characters of a label: a longer one is a text, not a name."""

CHUNK_VALUES = 2**22
SHOWN = 5
SPLITS = {"train": False, "test": True, "0": False, "1": True, "false": False, "true": True}

AnyArray = npt.NDArray[Any]

_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")


def read_csv(path: Path) -> dict[str, AnyArray]:
    """The columns as an ``.npz`` file would have them.

    Comma-separated UTF-8 with a header; ``y`` or ``label`` is needed, ``domain``, ``client`` and
    ``split`` are optional, every other column is a feature.

    Returns:
        ``x`` float32 [n, d] in the columns' order; ``y``, ``domain``, ``client`` int64 [n] where
        all are whole numbers, else str [n]; ``split`` bool [n], is test.

    Raises:
        InputError: everything wrong with the header, or else with the values.
        EnvironmentFault: the table does not fit into memory.
    """
    if not path.is_file():
        raise InputError("no such .csv file", where="data.path", got=str(path))
    header = read_header(path)
    if problems := _feature_problems(header):
        raise data_problems(str(path), problems)
    _check_size(path, len(header))
    try:
        return _read(path, header)
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=str(path), do="Save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


def read_header(path: Path) -> list[str]:
    """The names of the columns, checked."""
    try:
        with path.open("rb") as file:
            line = file.readline(MAX_HEADER_BYTES)
        text = line.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8 text", where=str(path), do="Save it as UTF-8") from error
    if len(line) == MAX_HEADER_BYTES:
        raise InputError(
            "the first line is too long for a header", where=str(path), allowed="4 MiB"
        )
    names = next(csv.reader([text]), [])
    if problems := header_problems(names, text):
        raise data_problems(str(path), problems)
    return names


def header_problems(names: Sequence[str], line: str) -> list[str]:
    """What is wrong with the first line of any table."""
    if not names:
        return ["the file is empty"]
    if len(names) == 1 and any(mark in line for mark in ";\t"):
        return ["columns are separated by semicolons or tabs; use commas"]
    if all(re.fullmatch(r"\s*[-+]?[0-9][0-9.eE+-]*\s*", name) for name in names):
        return ["the first line holds numbers; it must name the columns"]
    problems = []
    if not all(name.strip() for name in names):
        problems.append("a column has no name")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"columns twice: {', '.join(map(repr, twice[:SHOWN]))}")
    return problems


def _feature_problems(names: Sequence[str]) -> list[str]:
    """What a table of features lacks."""
    problems = []
    given = [name for name in LABELS if name in names]
    if not given:
        near = nearest("label", names) or nearest("y", names)
        hint = f"; rename {near!r}?" if near else ""
        problems.append(f"no column 'y' or 'label'{hint}")
    if len(given) == 2:
        problems.append("columns 'y' and 'label' are both there; leave one out")
    if not set(names) - set(WORDS):
        problems.append("no column of features")
    return problems


def _check_size(path: Path, columns: int) -> None:
    """What the table takes, before anything is allocated for it."""
    size = os.stat(path).st_size
    if size > MAX_BYTES:
        raise InputError(
            "too large", where=str(path), got=f"{size} bytes", allowed=f"{MAX_BYTES} bytes"
        )
    rows = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            rows += block.count(b"\n")
    needed = 8 * rows * columns  # float32, and once more while parts are joined
    available = machine.available_memory_bytes()
    if available is not None and needed > available:
        raise EnvironmentFault(
            "the table does not fit into memory",
            where=str(path),
            got=f"{needed} bytes needed",
            allowed=f"{available} bytes available",
            do="Use fewer rows, or a machine with more memory",
        )


def _read(path: Path, header: Sequence[str]) -> dict[str, AnyArray]:
    features = [name for name in header if name not in WORDS]
    words = [name for name in header if name in WORDS]
    parts: list[AnyArray] = []
    texts: dict[str, list[AnyArray]] = {name: [] for name in words}
    try:
        for chunk in _chunks(path, header, np.float64):
            with np.errstate(over="ignore"):
                part = chunk[features].to_numpy(np.float64).astype(np.float32)
            if not np.isfinite(part).all():
                raise ValueError
            parts.append(part)
            for name in words:
                texts[name].append(chunk[name].to_numpy(object))
    except UnicodeDecodeError:
        raise
    except ValueError as error:  # pandas does not say where: look again, cell by cell
        problems = _bad_cells(path, header, features)
        do = "Mend them, or leave such rows out"
        raise data_problems(str(path), problems or ["values that are no numbers"], do) from error
    if not sum(map(len, parts)):
        raise InputError("no row below the header", where=str(path))
    columns, problems = {"x": np.concatenate(parts)}, []
    for name in words:
        key = "y" if name in LABELS else name
        values = np.concatenate(texts[name])
        bad = bad_words(values, name)
        problems += bad
        if not bad:
            columns[key] = coded(values, name)
    if problems:
        raise data_problems(str(path), problems)
    return columns


def _chunks(path: Path, header: Sequence[str], dtype: type) -> Iterator[pd.DataFrame]:
    """The table in parts; features as ``dtype`` (an empty cell is NaN), words as text."""
    import pandas as pd

    features = [name for name in header if name not in WORDS]
    types: dict[Any, Any] = {name: str if name in WORDS else dtype for name in header}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # of values that it drops
            yield from pd.read_csv(
                path,
                encoding="utf-8-sig",
                dtype=types,
                keep_default_na=False,
                na_values={name: [""] for name in features},
                index_col=False,
                chunksize=max(1, CHUNK_VALUES // len(header)),
            )
    except pd.errors.ParserWarning as error:
        raise InputError("rows have more values than the header names", where=path) from error
    except pd.errors.ParserError as error:
        why = str(error).partition("C error: ")[2].strip() or "it cannot be read as a table"
        raise InputError(f"damaged table: {why}", where=path) from error


def _bad_cells(path: Path, header: Sequence[str], features: Sequence[str]) -> list[str]:
    """What is wrong with the features, by column."""
    import pandas as pd

    counts: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], list[int]] = {}
    first = 0
    for chunk in _chunks(path, header, str):
        for name in features:
            values = chunk[name].fillna("").astype(str)
            numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64)
            with np.errstate(over="ignore"):
                bad = ~np.isfinite(numbers.astype(np.float32))
            missing = (values.str.strip() == "").to_numpy(bool)
            for what, rows in (("no value", bad & missing), ("no finite number", bad & ~missing)):
                counts[name, what] += int(rows.sum())
                shown = (first + np.flatnonzero(rows)[:SHOWN]).tolist()
                places.setdefault((name, what), []).extend(shown)
        first += len(chunk)
    return [told(*key, count, places[key]) for key, count in counts.items() if count]


def bad_words(values: AnyArray, name: str, role: str | None = None) -> list[str]:
    """What is wrong with a column of labels, domains, clients or splits; ``role`` is which."""
    role = role or name
    texts = [str(value).strip() for value in values.tolist()]
    kinds = {
        "no value": [i for i, text in enumerate(texts) if not text],
        f"more than {MAX_WORD} characters, or some that cannot be shown,": [
            i for i, text in enumerate(texts) if len(text) > MAX_WORD or not text.isprintable()
        ],
    }
    if role == "split":
        kinds["neither train, test, 0, 1, true nor false"] = [
            i for i, text in enumerate(texts) if text and text.lower() not in SPLITS
        ]
    if role in LABELS and all(_is_number(text) for text in texts):
        kinds["neither a whole number nor a name"] = [
            i for i, text in enumerate(texts) if not re.fullmatch(r"-?[0-9]+", text)
        ]
    return [told(name, what, len(rows), rows) for what, rows in kinds.items() if rows]


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text) is not None


def coded(values: AnyArray, role: str) -> AnyArray:
    """The column's values: bool for a split, int64 if all are whole numbers, else str."""
    texts = [str(value).strip() for value in values.tolist()]
    if role == "split":
        return np.array([SPLITS[text.lower()] for text in texts])
    if all(_WHOLE.fullmatch(text) for text in texts):
        return np.array([int(text) for text in texts], dtype=np.int64)
    return np.array(texts)


def told(name: str, what: str, count: int, rows: list[int]) -> str:
    """One problem; rows are counted as a spreadsheet shows them, the header being row 1."""
    shown = ", ".join(str(row + 2) for row in rows[:SHOWN]) + (", ..." if count > SHOWN else "")
    return f"column {name!r}: {what} in {count} row{'s' if count > 1 else ''}: {shown}"

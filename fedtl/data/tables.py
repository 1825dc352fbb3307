"""``data.source = "table"``: columns of numbers and of names, a label, perhaps domain and client.

A table may hold what nobody else should see: errors name columns and rows, never what stands there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedtl.data.arrays import Column, encode, read_split
from fedtl.data.csv_features import bad_words, coded, told
from fedtl.data.examples import (
    Examples,
    Table,
    array_digest,
    content_fingerprint,
    content_hash,
    data_problems,
)
from fedtl.data.table_files import Cells, column_names, read_cells
from fedtl.errors import InputError, nearest
from fedtl.scenario.schema import Data
from fedtl.types import Float64, Int32

MISSING = ("", "na", "n/a", "nan", "null", "none", "?")
"""What stands for no value in a column of numbers, in lower case; among names only "" does."""

MAX_CATEGORIES = 1000
"""A column with more different names holds identifiers or texts."""

_WHOLE_AS_FLOAT = re.compile(r"(-?[0-9]+)\.0+")

Words = npt.NDArray[np.object_]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Roles:
    """Which column is what.

    Attributes:
        others: columns that nobody named; numbers they must be.
    """

    label: str
    domain: str | None
    client: str | None
    split: str | None
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]
    others: tuple[str, ...] = field(default=())

    @property
    def all(self) -> list[str]:
        """Every column that is read."""
        words = (self.label, self.domain, self.client, self.split)
        return [n for n in (*words, *self.numeric, *self.categorical, *self.others) if n]


def load_table(data: Data, *, one_client: bool = False) -> Examples:
    """A ``.csv`` (comma-separated UTF-8 with a header) or ``.parquet`` file as a table.

    Numbers may be missing: an empty cell, NA, NaN, null, None or ``?``. Names are compared as text,
    but ``1.0`` is ``1``, which is what programs make of whole numbers in a column with gaps.
    Classes are sorted, by number where all are whole numbers. A column ``split`` is used like that
    of a csv of features unless the scenario gives it another role.
    ``one_client``: a single class will do, others may have more.

    Raises:
        InputError: a column that is missing (with the nearest name), or everything wrong with the
            values, by column and row.
        EnvironmentFault: the table does not fit into memory.
    """
    if data.path is None:
        raise InputError("missing", where="data.path", do="Name the .csv or .parquet file")
    path = Path(data.path)
    roles = find_roles(column_names(path), data, str(path))
    cells = read_cells(path, roles.all)
    problems: list[str] = []
    label = _words(cells, roles.label, "label", problems)
    domain = _words(cells, roles.domain, "domain", problems)
    client = _words(cells, roles.client, "client", problems)
    is_test = _split(cells, roles.split, problems)
    table = _table(cells, roles, data.categories, problems)
    if label is not None and len(label.names) < 2 and not one_client:
        problems.append(f"column {roles.label!r} has only one class; a classifier needs two")
    if problems:
        raise data_problems(str(path), problems, "Mend them, or leave such rows or columns out")
    assert label is not None
    none = Column(np.empty(0, np.int32), ())
    domains, clients = (None if column is None else column.codes for column in (domain, client))
    domain_names, client_names = (domain or none).names, (client or none).names
    fingerprint = content_fingerprint(
        table_digest(table),
        label.codes,
        label.names,
        domains,
        domain_names,
        clients,
        client_names,
        is_test,
    )
    return Examples(
        label.codes,
        label.names,
        fingerprint,
        table=table,
        domains=domains,
        domain_names=domain_names,
        clients=clients,
        client_names=client_names,
        is_test=is_test,
    )


def table_digest(table: Table) -> bytes:
    """A digest over all values, names and categories; the order of columns counts."""
    kept = [content_hash(values) for values in table.categories]
    names = content_hash(table.numeric_names, table.categorical_names, kept).encode()
    return names + array_digest(table.numeric) + array_digest(table.codes)


def find_roles(header: Sequence[str], data: Data, where: str) -> Roles:
    """Who is who among the columns of this table.

    Raises:
        InputError: all columns that the scenario names and the table lacks.
    """
    named = (data.label, data.domain, data.client, *(data.numeric or ()), *data.categorical)
    missing = [name for name in dict.fromkeys(named) if name is not None and name not in header]
    if missing:
        raise data_problems(
            where,
            [_missing(name, [other for other in header if other not in named]) for name in missing],
            "Name the column as the scenario does; what was never measured is an empty column",
        )
    taken = {name for name in (*named, *data.ignore) if name is not None}
    free = [name for name in header if name not in taken]

    def default(given: str | None, word: str) -> str | None:
        return given or (word if word in free else None)

    domain, client = default(data.domain, "domain"), default(data.client, "client")
    split = default(None, "split")
    others = [] if data.numeric is not None else free
    others = [name for name in others if name not in (domain, client, split)]
    if not (data.numeric or data.categorical or others):
        raise InputError("no column of features", where=where)
    roles = (tuple(data.numeric or ()), tuple(data.categorical), tuple(others))
    return Roles(data.label, domain, client, split, *roles)


def _missing(name: str, header: Sequence[str]) -> str:
    begins = (other for other in header if other.lower().startswith(name.lower()))
    near = nearest(name, header) or next(begins, None)
    return f"column {name!r} is missing" + (f"; is it {near!r}?" if near else "")


def _table(
    cells: Cells, roles: Roles, stated: Mapping[str, Sequence[str]], problems: list[str]
) -> Table:
    """Numbers and codes; what is wrong with them is added to ``problems``."""
    numeric = [_numbers(cells[name].to_numpy(object), name, problems) for name in roles.numeric]
    for name in roles.others:
        found: list[str] = []
        numeric.append(_numbers(cells[name].to_numpy(object), name, found))
        hint = "; is it one for data.categorical or data.ignore?"
        problems += [problem + hint for problem in found]
    codes, categories = [], []
    for name in roles.categorical:
        column, names = _codes(cells[name].to_numpy(object), name, stated.get(name), problems)
        codes.append(column)
        categories.append(names)
    rows = len(next(iter(cells.values())))
    return Table(
        np.column_stack(numeric) if numeric else np.empty((rows, 0)),
        (*roles.numeric, *roles.others),
        np.column_stack(codes) if codes else np.empty((rows, 0), np.int32),
        roles.categorical,
        tuple(categories),
    )


def _numbers(values: Words, name: str, problems: list[str]) -> Float64:
    """float64 [N], NaN where no value is."""
    import pandas as pd

    missing = np.array([value.lower() in MISSING for value in values.tolist()], dtype=np.bool_)
    numbers = pd.to_numeric(pd.Series(values, dtype=object), errors="coerce").to_numpy(np.float64)
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(numbers.astype(np.float32)) & ~missing)
    if len(bad):
        problems.append(told(name, "no finite number", len(bad), bad.tolist()))
    return np.where(missing, np.nan, numbers)


def _codes(
    values: Words, name: str, stated: Sequence[str] | None, problems: list[str]
) -> tuple[Int32, tuple[str, ...]]:
    """Each value's place among the categories, -1 where there is none."""
    texts = [plain(value) for value in values.tolist()]
    if stated is None:
        found = {text for text in texts if text}
        order = sorted(found, key=lambda text: (len(text), text) if text.isdigit() else (999, text))
        names = tuple(order)
    else:
        names = tuple(plain(value) for value in stated)
    if len(names) > MAX_CATEGORIES:
        many = f"column {name!r} has {len(names)} different values, more than {MAX_CATEGORIES}"
        problems.append(f"{many}; is it one for data.ignore?")
        names = ()
    place = {"": -1} | {value: i for i, value in enumerate(names)}
    codes = np.array([place.get(text, -2) for text in texts], dtype=np.int32)
    if len(names) and len(unknown := np.flatnonzero(codes == -2)):
        what = f"a value that is not in data.categories.{name}"
        problems.append(told(name, what, len(unknown), unknown.tolist()))
    return codes, names


def plain(text: str) -> str:
    """A name as it is compared: ``1.0`` is ``1``."""
    text = text.strip()
    whole = _WHOLE_AS_FLOAT.fullmatch(text)
    return whole[1] if whole else text


def _text(cells: Cells, name: str) -> Words:
    texts: Words = np.array([plain(value) for value in cells[name].tolist()], dtype=object)
    return texts


def _words(cells: Cells, name: str | None, role: str, problems: list[str]) -> Column | None:
    """A column of labels, domains or clients; None, and a problem, where it holds none."""
    if name is None:
        return None
    texts = _text(cells, name)
    if bad := bad_words(texts, name, role):
        problems += bad
        return None
    return encode(coded(texts, role), name)


def _split(cells: Cells, name: str | None, problems: list[str]) -> Mask | None:
    """Which rows are for testing, where the table says so."""
    if name is None:
        return None
    texts = _text(cells, name)
    if bad := bad_words(texts, name):
        problems += bad
        return None
    try:
        return read_split(coded(texts, name))
    except ValueError as error:
        problems.append(str(error))
        return None

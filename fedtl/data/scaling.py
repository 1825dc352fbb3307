"""From a table to rows of numbers, once it is known who holds which rows.

Columns of numbers are centred and scaled by means and deviations of training rows alone, each
client by its own or all by those of everybody's sums; a missing number becomes the mean, 0 by then,
and 1 in a column that says so. There is such a column for every column of numbers, whatever is
missing where: rows are equally wide at clients who cannot look at each other's data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedtl.data.clients import ClientSplit
from fedtl.data.examples import Table
from fedtl.errors import InputError
from fedtl.scenario.schema import Data
from fedtl.types import Float32, Float64, Int64

NO_SPREAD = 1e-12
"""A deviation this small a part of the mean is rounding: the column is constant."""

SHOWN = 5


@dataclass(frozen=True)
class Moments:
    """Mean and deviation of each column of numbers; 0 where nothing was there to take them from.

    Attributes:
        count: values that are there, int64 [n].
    """

    count: Int64
    mean: Float64
    deviation: Float64


@dataclass(frozen=True)
class TableRows:
    """What trunks and heads see of a table.

    Attributes:
        matrix: float32 [N, W], finite; numbers of rows that nobody holds are 0.
        columns: the W names: numbers, what is missing of them, and ``column=category``.
        notes: what a user should know of the columns.
        shared: what was sent for it, one line; "" where nothing was.
    """

    matrix: Float32
    columns: tuple[str, ...]
    notes: tuple[str, ...]
    shared: str = ""


def column_labels(table: Table, data: Data) -> tuple[str, ...]:
    """The names of the columns that a table becomes, in their order."""
    missing = table.numeric_names if data.scaling != "none" else ()
    named = zip(table.categorical_names, table.categories, strict=True)
    return (
        *table.numeric_names,
        *(f"{name} is missing" for name in missing),
        *(f"{name}={value}" for name, values in named for value in values),
    )


def table_rows(table: Table, data: Data, split: ClientSplit) -> TableRows:
    """Rows of numbers of every client.

    Deviations are those of the population (divided by n), as scikit-learn's StandardScaler has
    them. A column that is constant in the rows they come from is 0 in all rows, test rows
    included, and a name that is missing is 0 in all columns of its names.

    Raises:
        InputError: ``scaling = "none"``, and something is missing.
    """
    groups = list(_groups(split))
    if data.scaling == "none":
        _check_complete(table, groups)
        matrix, found = table.numeric, []
    else:
        train = [table.numeric[rows] for rows, _ in groups]
        found = [own_moments(values) for values in train]
        used = found if data.scaling == "client" else [summed_moments(train)] * len(found)
        matrix = np.zeros((len(table), 2 * table.numeric.shape[1]))
        for moments, rows in zip(used, groups, strict=True):
            mine = np.concatenate(rows)
            matrix[mine] = standardised(table.numeric[mine], moments)
        found = used if data.scaling == "client" else used[:1]
    whose = split.names if data.scaling == "client" else ("everybody",)
    return TableRows(
        _joined(matrix, table),
        column_labels(table, data),
        _few(list(_notes(table, found, whose))),
        _shared(table, len(groups)) if data.scaling == "federated" else "",
    )


def own_moments(values: Float64) -> Moments:
    """Of one client's training rows, float64 [m, n] with NaN where a value is missing."""
    return summed_moments([values])


def summed_moments(clients: Sequence[Float64]) -> Moments:
    """Of everybody's training rows, from sums alone.

    Each client sends how many values a column has and their sum; told the mean, it sends the sum of
    squares of the distances to it. Sums of plain squares would do in one message, and would lose
    the deviation of a column whose mean is large.
    """
    count = np.sum([(~np.isnan(values)).sum(axis=0) for values in clients], axis=0)
    total = np.sum([np.nansum(values, axis=0) for values in clients], axis=0)
    mean = total / np.maximum(count, 1)
    squares = np.sum([np.nansum((values - mean) ** 2, axis=0) for values in clients], axis=0)
    deviation = np.sqrt(squares / np.maximum(count, 1))
    constant = deviation <= NO_SPREAD * np.abs(mean)
    return Moments(count, mean, np.where(constant, 0.0, deviation))


def standardised(values: Float64, moments: Moments) -> Float64:
    """[m, 2n]: scaled numbers, then 1 where one is missing."""
    missing = np.isnan(values)
    scale = np.where(moments.deviation > 0, moments.deviation, np.inf)
    scaled = np.where(missing, 0.0, (values - moments.mean) / scale)
    return np.concatenate([scaled, missing], axis=1)


def alone(table: Table, data: Data) -> Float32:
    """All rows of a public table as those of one client more, float32 [N, W]."""
    if data.scaling == "none":
        return _joined(table.numeric, table)
    return _joined(standardised(table.numeric, own_moments(table.numeric)), table)


def _joined(numbers: Float64, table: Table) -> Float32:
    """Numbers, then one column per category: 1 where it is the row's, all 0 where none is."""
    named = (
        table.codes[:, i, None] == np.arange(len(values))
        for i, values in enumerate(table.categories)
    )
    return np.concatenate([numbers, *named], axis=1).astype(np.float32)


def _groups(split: ClientSplit) -> Iterator[tuple[Int64, Int64]]:
    """Training and test rows of each client."""
    for k in range(len(split.names)):
        yield split.train.of(k), split.test.of(k)


def _check_complete(table: Table, groups: Sequence[tuple[Int64, Int64]]) -> None:
    rows = np.concatenate([np.concatenate(group) for group in groups])
    gaps = np.isnan(table.numeric[rows]).sum(axis=0)
    if gaps.any():
        names = [name for name, gap in zip(table.numeric_names, gaps, strict=True) if gap]
        raise InputError(
            f"numbers are missing in {len(names)} columns: {', '.join(map(repr, names[:SHOWN]))}",
            where="data.scaling",
            got='"none"',
            allowed='"client", "federated"',
            do="Scaled columns have a place for what is missing",
        )


def _notes(table: Table, found: Sequence[Moments], whose: Sequence[str]) -> Iterator[str]:
    for i, column in enumerate(table.numeric_names):
        held = [(name, moments) for name, moments in zip(whose, found, strict=bool(found))]
        empty = [name for name, moments in held if not moments.count[i]]
        flat = [name for name, m in held if m.count[i] and not m.deviation[i]]
        for names, what in ((empty, "has no value"), (flat, "is constant")):
            if names:
                shown = ", ".join(names[:SHOWN])
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                yield f"column {column!r} {what} in the training rows of {shown}{more}: 0 there"


def _few(notes: list[str]) -> tuple[str, ...]:
    more = [f"... and so are {len(notes) - SHOWN} columns more"] if len(notes) > SHOWN else []
    return (*notes[:SHOWN], *more)


def _shared(table: Table, clients: int) -> str:
    columns = len(table.numeric_names)
    return (
        f"for everybody's means and deviations each of {clients} clients shares {3 * columns} "
        f"numbers: count, sum and sum of squared distances to the mean of {columns} columns, over "
        "its training rows"
    )

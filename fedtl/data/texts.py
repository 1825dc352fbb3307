"""``data.source = "texts"``: texts with labels from a ``.csv`` or Parquet file.

Texts may be what nobody else should see: errors name columns and rows, never what stands there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedtl import machine
from fedtl.data.arrays import Column, encode, read_split
from fedtl.data.csv_features import bad_words, coded, told
from fedtl.data.examples import Examples, content_fingerprint, content_hash, data_problems
from fedtl.data.table_files import column_names, read_cells
from fedtl.data.tables import plain
from fedtl.errors import EnvironmentFault, InputError, nearest
from fedtl.scenario.schema import Data
from fedtl.types import Int64

MAX_CHARACTERS = 1_000_000
"""Of one text: only its first tokens count, and all of it would be held and read for them."""

_TIMES = 4  # what texts take in memory, as a multiple of their bytes in a file

Columns = Mapping[str, Sequence[str]]
"""Role (text, label, domain, client, split) -> one value per row, "" where there is none."""


class TextRows:
    """Texts in memory, known by their rows in the table."""

    def __init__(self, texts: Sequence[str], rows: Int64) -> None:
        self._texts, self._rows = texts, rows

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, i: int) -> str:
        """Text ``i``, not empty."""
        return self._texts[i]

    def where(self, i: int) -> str:
        """Its row as a spreadsheet shows it, the header being row 1."""
        return f"row {int(self._rows[i]) + 2}"


def load_texts(data: Data, *, one_client: bool = False) -> Examples:
    """Read the columns that ``data.text``, ``label``, ``domain`` and ``client`` name.

    White space around a text is dropped; whatever a cell holds is read as text, a number too. A
    column ``split`` (train or test) is the split that came with the data. A row without a text or
    without a label is refused, or left out where ``data.on_bad_file`` is ``"skip"``.

    Args:
        one_client: a single class will do, others may have more.

    Raises:
        InputError: no such file or columns (with the nearest), not UTF-8, rows as above, a text of
            more than ``MAX_CHARACTERS``, one class only.
        EnvironmentFault: the texts do not fit into memory.
    """
    if data.path is None:
        raise InputError("missing", where="data.path", do="Name the .csv or .parquet file")
    path = Path(data.path)
    roles = find_columns(column_names(path), data, str(path))
    _check_memory(path)
    cells = read_cells(path, list(roles.values()))
    columns = {role: cells[name].tolist() for role, name in roles.items()}
    return text_examples(columns, roles, data, str(path), one_client=one_client)


def find_columns(names: Sequence[str], data: Data, where: str) -> dict[str, str]:
    """The columns in use, role -> name: text, label, and domain, client, split where there.

    Raises:
        InputError: a column that is needed, or was named, is missing.
    """
    asked = {"text": data.text, "label": data.label, "domain": data.domain, "client": data.client}
    roles = {role: name for role, name in asked.items() if name is not None}
    if missing := {role: name for role, name in roles.items() if name not in names}:
        free = [name for name in names if name not in roles.values()]
        near = {role: nearest(name, free) for role, name in missing.items()}
        lines = [
            f"column {name!r} is missing" + (f"; is it {near[role]!r}?" if near[role] else "")
            for role, name in missing.items()
        ]
        role = next(iter(missing))
        do = f"Name it in the scenario, e.g. data.{role} = {near[role] or names[0]!r}"
        raise data_problems(where, lines, do)
    taken = set(roles.values())
    return roles | {
        role: role
        for role in ("domain", "client", "split")
        if role not in roles and role in names and role not in taken
    }


def text_examples(
    columns: Columns,
    names: Mapping[str, str],
    data: Data,
    where: str,
    *,
    classes: tuple[str, ...] = (),
    one_client: bool = False,
) -> Examples:
    """Columns as examples, everything wrong with them told at once.

    Args:
        names: what the columns are called, for messages.
        where: the source, for messages.
        classes: the order of the classes, where it is known; else by number or alphabet.
    """
    values = {role: np.array(column, dtype=object) for role, column in columns.items()}
    values["text"] = np.array([text.strip() for text in columns["text"]], dtype=object)
    for role in set(values) - {"text"}:
        values[role] = np.array([plain(word) for word in columns[role]], dtype=object)
    empty = {names[role]: np.flatnonzero(column == "") for role, column in values.items()}
    gaps = [told(n, "no value", len(rows), rows.tolist()) for n, rows in empty.items() if len(rows)]
    keep = np.arange(len(values["text"]))
    notes: tuple[str, ...] = ()
    if gaps and data.on_bad_file == "skip":
        keep = np.setdiff1d(keep, np.concatenate(list(empty.values())))
        notes = tuple(f"rows are left out: {gap}" for gap in gaps)
        values = {role: column[keep] for role, column in values.items()}
        gaps = []
    texts = values.pop("text").tolist()
    if not texts:
        raise InputError("no row with a text and a label", where=where)
    if long := [int(keep[i]) for i, text in enumerate(texts) if len(text) > MAX_CHARACTERS]:
        what = f"more than {MAX_CHARACTERS:,} characters"
        gaps.append(told(names["text"], what, len(long), long))
    bad = [p for role, c in values.items() for p in bad_words(c, names[role], role)]
    problems = [*gaps, *(problem for problem in bad if problem not in gaps)]
    if not problems:
        split = values.pop("split", None)
        found = {role: _column(column, role, classes) for role, column in values.items()}
        try:
            is_test = None if split is None else read_split(coded(split, "split"))
        except ValueError as error:
            problems.append(str(error))
        if len(found["label"].names) < 2 and not one_client:
            problems.append(f"column {data.label!r} has only one class; a classifier needs two")
    if problems:
        do = 'Mend them; data.on_bad_file = "skip" leaves out rows without a value'
        raise data_problems(where, problems, do)
    return _examples(texts, keep, found, is_test, notes)


def _column(values: npt.NDArray[np.object_], role: str, classes: tuple[str, ...]) -> Column:
    if role == "label" and classes:
        place = {plain(name): i for i, name in enumerate(classes)}
        return Column(np.array([place[value] for value in values], np.int32), classes)
    return encode(coded(values, role), role)


def _examples(
    texts: list[str],
    rows: Int64,
    columns: Mapping[str, Column],
    is_test: npt.NDArray[np.bool_] | None,
    notes: tuple[str, ...],
) -> Examples:
    none = Column(np.empty(0, np.int32), ())
    label, domain, client = (columns.get(role, none) for role in ("label", "domain", "client"))
    domains = domain.codes if "domain" in columns else None
    clients = client.codes if "client" in columns else None
    fingerprint = content_fingerprint(
        bytes.fromhex(content_hash(*texts)),
        label.codes,
        label.names,
        domains,
        domain.names,
        clients,
        client.names,
        is_test,
    )
    return Examples(
        label.codes,
        label.names,
        fingerprint,
        texts=TextRows(texts, rows),
        domains=domains,
        domain_names=domain.names,
        clients=clients,
        client_names=client.names,
        is_test=is_test,
        notes=notes,
    )


def _check_memory(path: Path) -> None:
    """What the texts take, before they are read."""
    size = path.stat().st_size
    if path.suffix.lower() != ".csv":
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            groups = range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(i).total_byte_size for i in groups)
    available = machine.available_memory_bytes()
    if available is not None and _TIMES * size > available:
        raise EnvironmentFault(
            "the texts do not fit into memory",
            where=str(path),
            got=f"about {_TIMES * size:,} bytes needed",
            allowed=f"{available:,} bytes available",
            do="Use fewer rows, or a machine with more memory",
        )

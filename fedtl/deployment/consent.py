"""What of its own file a client's user lets be read, and what a server's scenario reads of it.

A scenario names columns, or a pattern for file names, on machines that its author never saw. Both
sides are compared by the file's header and the server's words alone, before any value is read.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from fedtl.data.csv_features import LABELS
from fedtl.data.table_files import SUFFIXES, column_names
from fedtl.data.tables import find_roles
from fedtl.data.texts import find_columns
from fedtl.errors import InputError, SecurityRefusal, not_among, printable
from fedtl.scenario.schema import Data

FOLDERS = "folders"
"""As a label: the names of the folders that images or recordings lie in."""

MOST_NAMED = 40
"""Columns that are told one by one."""


@dataclass(frozen=True)
class Use:
    """What a scenario reads of a client's data.

    Attributes:
        label: what the class is: a column; of recordings a pattern for their paths, or FOLDERS.
        columns: every other column that is read; () where there are none.
        tabular: whether the data have columns.
        chosen: whether it was the server who chose.
    """

    label: str
    columns: tuple[str, ...] = ()
    tabular: bool = False
    chosen: bool = False

    def words(self) -> str:
        """What is read, for the client's user."""
        if not self.tabular:
            if self.label == FOLDERS:
                return "the names of folders as classes"
            return f"as classes what {printable(self.label)} finds in file names"
        told = f"column {printable(self.label)!r} as the class"
        return f"{told}, and besides {_named(self.columns)}" if self.columns else told

    def options(self) -> str:
        """What a user types to consent to this and nothing else."""
        if len(self.columns) > MOST_NAMED:
            return f"--label {shlex.quote(self.label)} --columns ... (these {len(self.columns)})"
        return shlex.join(Consent(self.label, self.columns if self.tabular else None).options())


@dataclass(frozen=True)
class Consent:
    """What the user of a client typed.

    Attributes:
        label: the only class there may be, as in ``Use``; None for whatever a scenario names, as
            far as ``columns`` has it.
        columns: the only columns that may be read besides; None for all.
    """

    label: str | None = None
    columns: tuple[str, ...] | None = None

    def options(self) -> list[str]:
        """The words on the command line that say it."""
        typed = [] if self.label is None else ["--label", self.label]
        if self.columns is not None:
            row = StringIO()
            csv.writer(row, lineterminator="").writerow(self.columns)
            typed += ["--columns", row.getvalue()]
        return typed

    def check(self, path: Path) -> str:
        """That it fits the data, as one line for the user.

        Raises:
            InputError: a column that is not there (with the nearest), or data without columns.
        """
        if path.suffix.lower() not in SUFFIXES:
            if self.columns is not None:
                raise InputError("these data have no columns", where="--columns", got=path.name)
            if self.label is not None and path.suffix.lower() == ".npz":
                raise InputError("the class in an .npz is its y", where="--label", got=self.label)
            return "" if self.label is None else Use(self.label).words()
        names = column_names(path)
        for option, own in (("--label", self.label), *(("--columns", n) for n in self._columns)):
            if own is not None and own not in names:
                raise not_among("no such column in the data", own, names, option, most=12)
        if self == Consent():
            return "to any column that the scenario names; --label and --columns would limit it"
        label = "any of them" if self.label is None else f"column {self.label!r}"
        every = "any column" if self.columns is None else _named(self.columns)
        return f"{label} as the class, and besides {every}; else it takes no part"

    @property
    def _columns(self) -> tuple[str, ...]:
        return self.columns or ()

    def hold(self, use: Use) -> list[str]:
        """What the user is told before a scenario's columns are read.

        Raises:
            SecurityRefusal: it reads what was not consented to. What travels to the server names
                no column: those that nobody named come from the file.
        """
        allowed = use.columns if self.columns is None else self.columns
        strange = tuple(name for name in use.columns if name not in allowed)
        if self.label is None:
            fits = not use.tabular or self.columns is None or use.label in self.columns
        else:
            fits = use.label == self.label
        if not fits or strange:
            wrong = [] if fits else [Use(use.label, tabular=use.tabular).words()]
            raise SecurityRefusal(
                "this client's user did not consent to all that the scenario reads of its data (to "
                "what is said on the client's own terminal)",
                got="; ".join([*wrong, *([_named(strange)] if strange else [])]),
                allowed=shlex.join(self.options()),
                do=f"Who consents to this too starts the client with {use.options()}",
            )
        if not use.chosen:
            return []
        lines = [f"the server's scenario reads {use.words()}; nothing else of the file"]
        if Consent(use.label, use.columns if use.tabular else None) != self:
            lines.append(f"to consent to exactly this from now on, start with {use.options()}")
        return lines


def typed_consent(label: str | None, columns: str | None) -> Consent:
    """What stands after ``--label`` and ``--columns``, these with commas as in a csv's header.

    Raises InputError where no column is named.
    """
    if columns is None:
        return Consent(label)
    names = tuple(dict.fromkeys(n.strip() for n in next(csv.reader([columns]), []) if n.strip()))
    if not names:
        raise InputError("names no column", where="--columns", allowed="e.g. age,sex,pressure")
    return Consent(label, names)


def use_of(path: Path, data: Data) -> Use:
    """What a scenario reads of a client's data, by their header; no value is looked at.

    Args:
        data: how the client reads its own path, see ``private_data.own_data``.

    Raises:
        InputError: no such file, or a column that the scenario names is not there.
    """
    if path.suffix.lower() not in SUFFIXES:
        return Use(data.label_pattern or FOLDERS, chosen=data.source == "sound")
    names = column_names(path)
    if data.source == "table":
        roles = find_roles(names, data, str(path))
        label, read = roles.label, roles.all
    elif data.source == "texts":
        found = find_columns(names, data, str(path))
        label, read = found["label"], list(found.values())
    else:
        label, read = next((name for name in LABELS if name in names), LABELS[0]), names
    others = list(read)
    if label in others:
        others.remove(label)  # once: a feature that is the class as well stays
    return Use(label, tuple(others), tabular=True, chosen=True)


def _named(columns: Sequence[str]) -> str:
    told = ", ".join(repr(printable(name)) for name in columns[:MOST_NAMED])
    more = f" and {len(columns) - MOST_NAMED} more" if len(columns) > MOST_NAMED else ""
    return ("column " if len(columns) == 1 else "columns ") + told + more

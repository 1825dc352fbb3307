"""Classes are agreed on by name: who holds which, and names that look like slips."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtl.data.folder import clashes, typos
from fedtl.errors import InputError, printable

MAX_CLASSES = 65_536

SHOWN = 20
"""Lines of a table in a message."""


@dataclass(frozen=True)
class Held:
    """What a client says of its classes.

    Attributes:
        classes: their names, in the order its data have them.
        numbered: they may be numbers that stand for themselves, not names of folders.
    """

    classes: tuple[str, ...]
    numbered: bool = False


@dataclass(frozen=True)
class ClassTable:
    """The federation's classes.

    Attributes:
        classes: C names, in the order of the head's outputs.
        clients: K names, sorted.
        held: whether a client has a class, bool [C, K].
    """

    classes: tuple[str, ...]
    clients: tuple[str, ...]
    held: npt.NDArray[np.bool_]

    @property
    def differs(self) -> bool:
        """Whether some client lacks a class that another has."""
        return not bool(self.held.all())

    def lines(self) -> list[str]:
        """The classes that not everybody has, a line each, safe to print."""
        lines = []
        for i in np.flatnonzero(~self.held.all(axis=1)).tolist():
            here = [name for name, held in zip(self.clients, self.held[i], strict=True) if held]
            lacks = [name for name in self.clients if name not in here]
            lines.append(
                f"{printable(self.classes[i])}: held by {_some(here)}; missing at {_some(lacks)}"
            )
        return lines


def agree_on_classes(clients: Mapping[str, Held]) -> ClassTable:
    """One list of classes for all clients; the same for the same clients, whoever came first.

    Clients that all have the same classes in the same order keep it. Else numbers are put in
    numeric order, as one data set of them all would have them, and names in that of the alphabet.
    A class that some client lacks is fine.

    Raises:
        InputError: names that are most likely meant to be one, with the table; or only one class.
    """
    names = tuple(sorted(clients))
    classes = _ordered([clients[name] for name in names])
    own = {name: frozenset(clients[name].classes) for name in names}
    holders = {label: {name for name in names if label in own[name]} for label in classes}
    held = np.array([[name in holders[label] for name in names] for label in classes], np.bool_)
    table = ClassTable(classes, names, held)
    problems = [*clashes("class", classes), *typos(holders)]
    if problems:
        told = "".join(f"\n  {printable(problem)}" for problem in problems[:SHOWN])
        shown = "".join(f"\n  {line}" for line in table.lines()[:SHOWN])
        raise InputError(
            f"the clients' class names do not agree:{told}\n",
            got=f"{shown}\n",
            do="Have those clients rename the class; then run again",
        )
    if len(classes) > MAX_CLASSES:
        raise InputError(f"the clients have {len(classes)} classes; {MAX_CLASSES} is the limit")
    if len(classes) < 2:
        raise InputError(
            "all clients together have only one class; a classifier needs two",
            got=", ".join(map(printable, classes)),
        )
    return table


def _ordered(clients: list[Held]) -> tuple[str, ...]:
    own = [client.classes for client in clients]
    if all(classes == own[0] for classes in own):
        return own[0]
    union = {label for classes in own for label in classes}
    whole = all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", label) for label in union)
    if (
        whole
        and all(client.numbered for client in clients)
        and all(list(classes) == sorted(classes, key=int) for classes in own)
    ):
        return tuple(sorted(union, key=int))
    return tuple(sorted(union))


def _some(names: list[str]) -> str:
    shown = ", ".join(map(printable, names[:5]))
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")

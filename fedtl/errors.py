"""What can go wrong, as the user sees it, and the exit code each kind ends with.

FedtlError
 +-- InputError        2  bad input, configuration or data
 |    +-- ScenarioError   several problems of one scenario, told together
 +-- EnvironmentFault  3  disk, memory, missing package, GPU, output folder
 +-- PolicyStop        4  divergence, quorum, privacy budget: stopped on purpose
 +-- SecurityRefusal   5  something unsafe was refused (pickle, hash mismatch)
 +-- Interrupted     130  Ctrl-C (143 on SIGTERM): committed and resumable
Anything else is a bug of ours and ends with 1.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

EXIT_BUG = 1


class FedtlError(Exception):
    """An error with everything a user needs to mend it.

    Args:
        what: what is wrong, in one clause.
        where: file, key path, client or round.
        got: the value that was given.
        allowed: what would have been accepted.
        do: the next thing to do or the next command to type.
    """

    exit_code = EXIT_BUG

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        allowed: object = None,
        do: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.allowed, self.do = what, where, got, allowed, do
        super().__init__(self.line())

    def line(self) -> str:
        """The whole error on one line: ``where: what (got ..., allowed ...). Do this.``"""
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        facts = [f"got {self.got}"] if self.got is not None else []
        facts += [f"allowed: {self.allowed}"] if self.allowed is not None else []
        if facts:
            text += f" ({'; '.join(facts)})"
        if self.do:
            text += f" {self.do}" if text.endswith("?") else f". {self.do}"
        return "\n".join(map(printable, text.split("\n")))


class InputError(FedtlError):
    """Bad input, configuration or data."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a scenario: key path, what, what was given, what is allowed."""

    where: str
    what: str
    got: str | None = None
    allowed: str | None = None
    do: str | None = None

    def line(self) -> str:
        """The problem on one line."""
        return InputError(
            self.what, where=self.where, got=self.got, allowed=self.allowed, do=self.do
        ).line()


class ScenarioError(InputError):
    """Every problem of one scenario at once."""

    def __init__(self, source: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        self.source = source
        count = len(self.problems)
        super().__init__(
            f"{count} problem{'s' if count != 1 else ''} in this scenario", where=source
        )

    def line(self) -> str:
        """Headline, then one line a problem."""
        return "\n".join([super().line() + ":"] + [f"  {p.line()}" for p in self.problems])


class EnvironmentFault(FedtlError):
    """The machine cannot do it: disk, memory, missing package, output folder."""

    exit_code = 3


class PolicyStop(FedtlError):
    """The run was stopped on purpose; what was committed is kept."""

    exit_code = 4


class SecurityRefusal(FedtlError):
    """Something unsafe was refused."""

    exit_code = 5


class Interrupted(FedtlError):
    """Ctrl-C or SIGTERM; everything committed is kept and the run can be resumed."""

    exit_code = 130

    def __init__(self, what: str, *, exit_code: int = 130, do: str | None = None) -> None:
        self.exit_code = exit_code
        super().__init__(what, do=do)


def printable(text: str) -> str:
    """Text from outside, safe for a terminal: control characters and stray bytes are escaped."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def times(count: int) -> str:
    """How often, in words: once, 2 times."""
    return "once" if count == 1 else f"{count:,} times"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name in ``names`` most like ``name``, or None where none is near."""
    lowered = {candidate.lower(): candidate for candidate in names}
    found = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


def unknown_name(kind: str, name: str, names: Iterable[str], where: object = None) -> InputError:
    """The error for a name that is not in a table of names, with the nearest right one."""
    names = sorted(names)
    hint = nearest(name, names)
    shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    return InputError(
        f"unknown {kind}",
        where=where,
        got=repr(name),
        allowed=shown,
        do=f"Did you mean {hint!r}?" if hint else "'fedtl list' shows all names",
    )


_BAD_NAME = frozenset(
    {errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP}
)


def machine_fault(error: OSError) -> FedtlError:
    """The system's refusal as an error of ours: a bad path is input, the rest the machine."""
    kind = InputError if error.errno in _BAD_NAME else EnvironmentFault
    where = None if error.filename is None else str(error.filename)[:200]
    return kind(error.strerror or str(error), where=where)


_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def writing(what: str, where: object) -> Iterator[None]:
    """Turn the operating system's refusals while writing ``what`` into EnvironmentFault."""
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        raise EnvironmentFault(
            f"cannot write {what}: {'the disk is full' if full else error.strerror or error}",
            where=where,
            do="Free some space and run again" if full else "Choose a folder that can be written",
        ) from error


def client_of(name: str, names: Sequence[str], where: object) -> int:
    """The id of the client of this name. Raises InputError where there is none."""
    if name in names:
        return list(names).index(name)
    raise not_among("no client has this name", name, names, where)


def not_among(
    what: str, name: str, names: Sequence[str], where: object, most: int = 8
) -> InputError:
    """The error for a name that a user's own data do not have, with the nearest that they have.

    Args:
        most: names that are shown, in their order.
    """
    hint = nearest(name, names)
    return InputError(
        what,
        where=where,
        got=repr(name),
        allowed=", ".join(names[:most]) + (", ..." if len(names) > most else ""),
        do=f"Did you mean {hint!r}?" if hint else None,
    )

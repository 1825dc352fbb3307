"""What several commands take on the command line, and where they write."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Annotated, Any

import typer

ScenarioName = Annotated[
    str, typer.Argument(metavar="SCENARIO", help="A name from scenarios/ or a path to a .toml.")
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, its name, or 'last'.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override one value; repeatable."),
]
EngineName = Annotated[
    str | None, typer.Option("--engine", help="Where clients live: local, ray or flower.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Result as JSON on standard output.")]


def again(scenario: str, overrides: Sequence[str] | None, engine: str | None = None) -> str:
    """What the user called, for commands to type next."""
    settings = ["--engine", engine] if engine else []
    settings += [part for override in overrides or () for part in ("--set", override)]
    return shlex.join([scenario, *settings])


def console_for(as_json: bool) -> Any:
    """Where people read: standard output, or standard error while that carries JSON."""
    from fedtl.terminal import PatientConsole

    return PatientConsole(stderr=as_json)


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """``1,5`` as numbers. Raises InputError."""
    from fedtl.errors import InputError

    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise InputError(
            "not a list of whole numbers", where=option, got=repr(text), allowed="e.g. 1,5"
        ) from None

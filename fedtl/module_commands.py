"""Commands for modules: trained heads and adapters as files that snap onto their trunk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtl.options import AsJson, Overrides, console_for

app = typer.Typer(no_args_is_help=True, help="List, read and apply trained heads and adapters.")

ModuleName = Annotated[
    str, typer.Argument(metavar="FILE|RUN", help="A .safetensors file, or a run.")
]

LONGEST = 60
"""Characters of a text from outside that a table shows."""

MOST_GROUPS = 20
"""Clients or domains that a table shows; all are in the JSON."""


@app.command("ls")
def list_all(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="Default: runs/.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List modules, newest first: what each fits, and how good it is."""
    from fedtl.modules import list_modules
    from fedtl.terminal import percent, plain_table, shown

    cards, others = list_modules(folders or [])
    if as_json:
        facts = {
            "modules": [card.as_facts() for card in cards],
            "others": [{"path": str(path), "why": why} for path, why in others],
        }
        typer.echo(json.dumps(facts, indent=2))
        return
    console = console_for(as_json)
    table = plain_table("module", "trunk", "kind", "right")
    for card in cards:
        measured = card.part("measured")
        accuracy = measured.get("accuracy") if isinstance(measured, dict) else None
        table.add_row(
            shown(_short(card.path)),
            shown(f"{card.facts['backbone'][:LONGEST]} {card.facts['backbone_sha256'][:8]}"),
            shown(card.kind[:LONGEST]),
            percent(accuracy if isinstance(accuracy, float) else None),
        )
    console.print(table if cards else "there is no module here; 'fedtl run quickstart' makes one")
    for path, why in others[:8]:
        console.print(f"[dim]{shown(str(path))}: no module, {shown(why[:LONGEST])}[/]")


def _short(path: Path) -> str:
    """A run's module by the run."""
    from fedtl.results.module_card import HEAD

    return str(path.parent if path.name == HEAD else path)


@app.command()
def show(module: ModuleName, as_json: AsJson = False) -> None:
    """Show a module's card: what it fits, what it was trained on, what was measured."""
    from fedtl.modules import find_module
    from fedtl.modules.trunk_of import next_step
    from fedtl.terminal import sentences, shown, size

    card = find_module(module)
    facts = card.as_facts()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    names = card.classes
    more = f" and {len(names) - 12:,} more" if len(names) > 12 else ""
    transfer = _told(facts["sections"], "transfer")
    rows = [
        ("Trunk", f"{card.facts['backbone']}, weights {card.facts.get('backbone_source', '')}"),
        ("Weights' SHA-256", card.facts["backbone_sha256"][:40]),
        ("Licence of the trunk", card.facts.get("backbone_licence", "unknown")),
        ("Cut", card.facts["cut"]),
        ("Module", card.kind),
        ("Classes", f"{len(names):,}: " + ", ".join(n[:LONGEST] for n in names[:12]) + more),
        ("Size", f"{facts['parameters']:,} parameters, {size(card.num_bytes)}"),
        ("Trained on", _words(facts["trained_on"])),
        ("Measured", _words(facts["measured"])),
        ("Scenario", card.facts.get("scenario_hash", "")[:16]),
    ]
    if card.facts["mode"] == "lora":
        keys = ("rank", "alpha", "aggregation", "targets")
        rows.insert(5, ("LoRA", _words({key: transfer.get(key) for key in keys})))
    console = console_for(as_json)
    console.print(f"\n[bold]{shown(str(card.path))}[/]", soft_wrap=True)
    console.print(sentences([(name, text[:1000]) for name, text in rows]))
    console.print("\nNext")
    console.print(f"  {shown(next_step(card, 'FOLDER'))}  [dim]# on other data[/]", soft_wrap=True)


def _told(facts: Any, key: str) -> Mapping[str, Any]:
    own = facts.get(key) if isinstance(facts, dict) else None
    return own if isinstance(own, dict) else {}


def _words(facts: Any) -> str:
    """Plain values in a line: what is not there is left out."""
    told = facts.items() if isinstance(facts, dict) else ()
    known = [(name, value) for name, value in told if value not in (None, [], "")]
    return ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in known)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@app.command()
def apply(
    modules: Annotated[
        list[str], typer.Argument(metavar="FILE|RUN...", help="One, or several over one trunk.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="SCENARIO|RUN",
            help="Its trunk; and without --data, what its clients are tested on.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PATH", help="Judge on all that is there.")
    ] = None,
    overrides: Overrides = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Only predict: the data's classes do not matter.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="A csv file of all predictions.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put modules on their trunk over other data; several share one pass of the trunk."""
    from fedtl.errors import InputError
    from fedtl.interrupts import Interrupts
    from fedtl.modules import find_module
    from fedtl.modules.applying import apply_modules, facts_of, write_predictions
    from fedtl.modules.trunk_of import given_trunk, scenario_of
    from fedtl.results.files import refuse_unwritable
    from fedtl.terminal import Terminal

    if to is None and data is None:
        raise InputError(
            "on which data?",
            where="fedtl module apply",
            allowed="--to SCENARIO, --data PATH, or both: the scenario's trunk, the path's data",
            do=f"Type 'fedtl module apply {modules[0]} --data FOLDER'",
        )
    if overrides and to is None:
        raise InputError("--set changes a scenario, and there is none", do="Give one with --to")
    refuse_unwritable(out)
    cards = [find_module(name) for name in modules]
    given = None if to is None else given_trunk(to, overrides or ())
    if data is not None:
        scenario = scenario_of(cards[0], data, given.backbone if given else None)
    else:
        assert given is not None
        scenario = given
    console = console_for(as_json)
    with Interrupts() as interrupts, Terminal(console) as terminal:

        def progress(done: int, total: int) -> None:
            terminal.extracting(done, total)
            interrupts.check("interrupted while examples went through the trunk")

        found = apply_modules(
            cards, scenario, whole=data is not None, predict=predict, progress=progress
        )
    if out is not None:
        write_predictions(found, out)
    facts = facts_of(found, predict)
    _print_applied(facts, console)
    if out is not None:
        console.print(f"every prediction is in {out}", markup=False, soft_wrap=True)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))


def _print_applied(facts: Mapping[str, Any], console: Any) -> None:
    from fedtl.terminal import percent, plain_table, shown

    count = f"{facts['examples']:,} examples"
    console.print(f"\n[bold]{shown(facts['trunk'][:LONGEST])}[/] [dim]{count}, one pass[/]")
    for note in facts["notes"]:
        console.print(f"[yellow]note[/] {shown(note)}", soft_wrap=True)
    modules = facts["modules"]
    for number, one in enumerate(modules, 1):
        console.print(f"{number}  {shown(one['module'])}: {shown(one['kind'][:LONGEST])}")
    if facts["judged"]:
        table = plain_table("right", "examples", *(str(i) for i in range(1, len(modules) + 1)))
        everything = (percent(one["accuracy"]) for one in modules)
        table.add_row("all", f"{facts['examples']:,}", *everything)
        for name, group in list(modules[0]["groups"].items())[:MOST_GROUPS]:
            cells = (percent(one["groups"][name]["accuracy"]) for one in modules)
            table.add_row(shown(name[:LONGEST]), f"{group['examples']:,}", *cells)
        console.print(table)
        return
    for one in facts["modules"]:
        most = sorted(one["predicted"].items(), key=lambda item: -item[1])[:8]
        told = ", ".join(f"{name[:LONGEST]} {number:,}" for name, number in most if number)
        console.print(f"{shown(one['module'])}: {shown(told)}", soft_wrap=True)

"""``fedtl client ...``: what people at a client type. Their data never leave their machine."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Take part with data of your own, which stay here.")

Name = Annotated[
    str | None,
    typer.Option("--name", help="This client's name, as it is approved; default: its key's."),
]
Join = Annotated[
    Path, typer.Option("--join", metavar="FILE", help="The join file that the server gave out.")
]
DataPath = Annotated[
    Path, typer.Option("--data", metavar="PATH", help="A folder of class folders, .npz or table.")
]
Label = Annotated[
    str | None,
    typer.Option(
        "--label",
        metavar="COLUMN",
        help="The only column that may be the class; of recordings the pattern of file names, or "
        "'folders'. Another scenario is refused before a value is read.",
    ),
]
Columns = Annotated[
    str | None,
    typer.Option("--columns", metavar="A,B,...", help="The only columns that may be read besides."),
]
Folder = Annotated[Path, typer.Option("--folder", help="Where this client's keys and logs are.")]
Careless = Annotated[
    bool,
    typer.Option("--insecure-key-permissions", help="Use a key that others here can read."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Result as JSON on standard output.")]


@app.command()
def keys(
    name: Annotated[
        str | None, typer.Option("--name", help="This client's name; default: the machine's.")
    ] = None,
    folder: Folder = Path(),
    as_json: AsJson = False,
) -> None:
    """Make this client's key pair. The private half never leaves this machine."""
    from fedtl.deployment.keys import machine_name, make_keys

    name = machine_name() if name is None else name
    private, public, key = make_keys(folder, name)
    if as_json:
        facts = {"name": name, "private": str(private), "public": str(public)}
        typer.echo(json.dumps({**facts, "fingerprint": key.fingerprint}, indent=2))
        return
    typer.echo(f"private key  {private}  (stays here; keep it secret)")
    typer.echo(f"public key   {public}  {key.fingerprint}")
    typer.echo(f"\nSend {public.name} to whoever runs the server, who types")
    typer.echo(f"  fedtl server approve {public.name}")
    typer.echo("and compare the fingerprint by phone.")


@app.command()
def check(
    join: Join,
    data: DataPath,
    name: Name = None,
    label: Label = None,
    columns: Columns = None,
    folder: Folder = Path(),
    careless: Careless = False,
    as_json: AsJson = False,
) -> None:
    """Look whether this client is ready. Sends no image and no label anywhere."""
    from fedtl.deployment.consent import typed_consent
    from fedtl.deployment.keys import PRIVATE, check_name, only_name
    from fedtl.deployment.preflight import examine_client
    from fedtl.listings import print_findings
    from fedtl.terminal import shown

    name = only_name(folder) if name is None else check_name(name)
    key = folder / (name + PRIVATE)
    consent = typed_consent(label, columns)
    flight = examine_client(join, key, data, insecure_permissions=careless, consent=consent)
    verdict = flight.verdict()
    if as_json:
        findings = [finding.__dict__ for finding in flight.findings]
        facts = {"ready": verdict is None, "findings": findings, "classes": flight.classes}
        typer.echo(json.dumps(facts, indent=2))
    else:
        console = _console()
        print_findings(console, flight.findings)
        for label, count in flight.classes.items():
            console.print(f"  {count:>7,}  {shown(label)}", highlight=False)
    if verdict is not None:
        raise verdict
    if not as_json:
        here = [] if folder == Path() else ["--folder", str(folder)]
        here += ["--insecure-key-permissions"] if careless else []
        own = ["--name", name, "--data", str(data), *consent.options()]
        start = ["--join", str(join), *own, *here]
        typer.echo(f"ready. Next: fedtl client start {shlex.join(start)}")


@app.command()
def start(
    join: Join,
    data: DataPath,
    name: Name = None,
    label: Label = None,
    columns: Columns = None,
    folder: Folder = Path(),
    careless: Careless = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="WHAT",
            help="Take no part without it: 'secagg' (secure aggregation), 'dp' (differential "
            "privacy with an epsilon). May be given twice.",
        ),
    ] = None,
) -> None:
    """Take part: answer the server's requests until you stop it."""
    from fedtl.deployment.consent import typed_consent
    from fedtl.deployment.keys import only_name
    from fedtl.deployment.taking_part import take_part
    from fedtl.interrupts import Interrupts

    name = only_name(folder) if name is None else name
    with Interrupts() as interrupts:
        take_part(
            join,
            name,
            data,
            folder,
            device,
            _console(),
            interrupts,
            insecure_permissions=careless,
            demands=require or (),
            consent=typed_consent(label, columns),
        )


@app.command()
def audit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="<name>.audit.jsonl")],
    as_json: AsJson = False,
) -> None:
    """Check that nobody changed the audit log, and sum up what has left this machine."""
    from fedtl.deployment.audit import verify
    from fedtl.terminal import plain_table, shown, size

    tally = verify(file)
    if as_json:
        typer.echo(json.dumps(tally.__dict__, indent=2))
        return
    console = _console()
    console.print(
        f"{tally.lines} entries, {shown(tally.first)} to {shown(tally.last)}; the chain is whole"
        + (f"; {tally.torn} lines were torn by crashes" if tally.torn else ""),
        highlight=False,
    )
    table = plain_table("what left", "messages", "numbers", "bytes")
    for kind in sorted(tally.messages):
        counts = tally.messages[kind], tally.numbers[kind]
        table.add_row(shown(kind), *(f"{count:,}" for count in counts), size(tally.num_bytes[kind]))
    console.print(table if tally.messages else "nothing has left this machine")
    console.print(f"last hash {tally.head}", highlight=False, soft_wrap=True)


def _console() -> Any:
    from fedtl.terminal import PatientConsole

    return PatientConsole()

"""Commands that take a trained model out of the house: into a file, and onto a port."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtl.errors import InputError
from fedtl.options import AsJson, RunName, console_for

app = typer.Typer()


class Format(StrEnum):
    """What a run can be exported to."""

    onnx = "onnx"
    safetensors = "safetensors"
    torch = "torch"


class Width(StrEnum):
    """Numbers that a file can be written in beside float32."""

    int8 = "int8"


@app.command()
def export(
    run: RunName,
    to: Annotated[Format, typer.Option("--to", help="Format of the file.")] = Format.onnx,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Default: export/ in the run.")
    ] = None,
    quantize: Annotated[
        Width | None, typer.Option("--quantize", help="Also write it in 8-bit integers.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run as one file: trunk, head, preprocessing, labels, and a model card."""
    from fedtl.export import export_run
    from fedtl.interrupts import Interrupts
    from fedtl.simulation import find_run
    from fedtl.terminal import Terminal

    console = console_for(as_json)
    path = find_run(run)
    if not path.is_dir():
        raise InputError(
            "there is no such run" if not path.exists() else "not a run but a file",
            where=path,
            allowed="a run's folder, its name under runs/, or 'last'",
        )
    with Interrupts() as interrupts, Terminal(console) as terminal:
        facts = export_run(path, to.value, terminal, interrupts, out=out, int8=quantize is not None)
    _print_export(facts, console)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))


def _print_export(facts: dict[str, Any], console: Any) -> None:
    from fedtl.terminal import percent, plain_table, sentences, shown

    card = facts["card"]
    parity, made_up = card["parity"], bool(card["parity"]["note"])
    what = "made-up inputs" if made_up else "test examples of the run"
    rows = [
        ("checked", f"on {parity['examples']} {what}"),
        ("", f"largest difference of a probability {parity['difference']:.2g} (at most 0.0001)"),
        ("", f"the same label on {percent(parity['agreement'])}"),
    ]
    if made_up:
        rows.append(("[yellow]note[/]", f"made up, as {parity['note']}"))
    if not made_up and parity["accuracy"] is not None:
        rows.append(("", f"accuracy on them {percent(parity['accuracy'])}"))
    rows.append(("licence", f"of the trunk's weights: {card['trunk']['licence']}"))
    console.print(sentences(rows))
    if "quantized" in card:
        table = plain_table("", "bytes", "p50", "accuracy", "as the run")
        for row in card["quantized"]["files"]:
            table.add_row(
                row["name"],
                f"{row['bytes']:,}",
                f"{1e3 * row['p50']:.2f} ms",
                percent(row["accuracy"]),
                percent(row["agreement"]),
            )
        console.print(table)
        console.print(shown(card["quantized"]["verdict"]))
    for file in facts["files"]:
        console.print(shown(file), soft_wrap=True)
    if facts["files"][0].endswith(".onnx"):
        console.print(f"\nNext\n  fedtl serve {shown(facts['files'][0])}", soft_wrap=True)


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(metavar="RUN|FILE", help="A run, or an .onnx file that was exported.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    cert: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="PEM", help="Certificate, for TLS.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--tls-key", metavar="PEM", help="Its private key.")
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure-i-understand", help="Listen for others without TLS."),
    ] = False,
) -> None:
    """Answer pictures, texts or rows over HTTP, with a page to try it on."""
    from fedtl.interrupts import Interrupts
    from fedtl.serve import Place, file_of, missing
    from fedtl.serve import serve as answer
    from fedtl.simulation import find_run
    from fedtl.terminal import Terminal, shown

    place = Place(host, port, cert, key, insecure)
    place.refuse_unsafe()
    try:
        from fedtl.serve.predictor import open_predictor
    except ImportError as error:
        raise missing(error) from error
    console = console_for(False)
    with Interrupts() as interrupts, Terminal(console) as terminal:
        predictor = open_predictor(file_of(find_run(model), terminal, interrupts))

    def ready(address: str) -> None:
        console.print(f"serving {shown(predictor.path.name)} at {address}", soft_wrap=True)
        console.print(f"  {address}/      a page to try it on\n  {address}/docs  for programs")

    answer(predictor, place, ready)

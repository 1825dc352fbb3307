"""The command line. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtl.client_commands import app as client_app
from fedtl.export_commands import app as export_app
from fedtl.module_commands import app as module_app
from fedtl.options import AsJson, EngineName, Overrides, RunName, ScenarioName, again, console_for
from fedtl.privacy_commands import app as privacy_app
from fedtl.server_commands import app as server_app
from fedtl.study_commands import app as study_app
from fedtl.tune_commands import app as tune_app

app = typer.Typer(
    name="fedtl",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune one pretrained backbone together while every client keeps its data.",
    epilog="Start with: fedtl run quickstart",
)
cache_app = typer.Typer(no_args_is_help=True, help="Look into the feature store.")
app.add_typer(study_app)
app.add_typer(privacy_app)
app.add_typer(tune_app)
app.add_typer(export_app)
app.add_typer(cache_app, name="cache")
app.add_typer(module_app, name="module")
app.add_typer(server_app, name="server")
app.add_typer(client_app, name="client")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fedtl {version('fedtl')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command; --debug is taken out of the arguments in main()."""


@app.command()
def run(
    scenario: ScenarioName,
    engine: EngineName = None,
    overrides: Overrides = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Run this many seeds, counted up from the scenario's.")
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/<scenario>-<time>.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a scenario: plan, rounds, verdict."""
    from fedtl.interrupts import Interrupts
    from fedtl.listings import print_seeds
    from fedtl.results.runs import refuse_taken
    from fedtl.scenario.load import load_scenario, with_seed
    from fedtl.simulation import new_run_path, run_scenario
    from fedtl.terminal import Terminal

    chosen = load_scenario(scenario, overrides or (), engine=engine)
    path = out or new_run_path(chosen)
    refuse_taken(path)
    console = console_for(as_json)
    command = again(scenario, overrides, engine)
    summaries: list[dict[str, Any]] = []
    with Interrupts() as interrupts:
        for seed in range(chosen.seed, chosen.seed + seeds):
            one = with_seed(chosen, seed)
            place = path if seeds == 1 else path / f"seed-{seed}"
            with Terminal(console, command if seeds == 1 else None) as terminal:
                summaries.append(run_scenario(one, place, terminal, interrupts))
    if seeds > 1:
        print_seeds(console, summaries)
    if as_json:
        typer.echo(json.dumps(summaries[0] if seeds == 1 else {"runs": summaries}, indent=2))


@app.command()
def resume(
    run: RunName,
    allow: Annotated[
        bool, typer.Option("--allow", help="Go on although data or versions changed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Go on with an interrupted run from its last commit."""
    from fedtl.interrupts import Interrupts
    from fedtl.results.runs import SCENARIO
    from fedtl.simulation import find_run, resume_run
    from fedtl.terminal import Terminal

    path = find_run(run)
    with (
        Interrupts() as interrupts,
        Terminal(console_for(as_json), f"{path}/{SCENARIO}") as terminal,
    ):
        summary = resume_run(path, terminal, interrupts, allow_changes=allow)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))


@app.command()
def forget(
    run: RunName,
    client: Annotated[str, typer.Argument(metavar="CLIENT", help="The client's name.")],
) -> None:
    """Make a closed-form run's head without one client, exactly, asking nobody again."""
    from fedtl.evaluation.contributions import forget_client
    from fedtl.simulation import find_run

    path = forget_client(find_run(run), client)
    typer.echo(f"{path}: the head as if {client} had never taken part")
    typer.echo("Its statistics are still in the run's folder, and in its old commits.")


@app.command()
def check(
    scenario: ScenarioName,
    engine: EngineName = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Validate a scenario, decode all its data and print the plan. Trains nothing."""
    from fedtl.check import check_scenario
    from fedtl.interrupts import Interrupts
    from fedtl.scenario.load import load_scenario

    chosen = load_scenario(scenario, overrides or (), engine=engine)
    with Interrupts() as interrupts:
        command = again(scenario, overrides, engine)
        facts = check_scenario(chosen, command, console_for(as_json), interrupts)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))


@app.command()
def parity(
    scenario: ScenarioName,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run a scenario on every engine and certify that all give the same head."""
    from fedtl.errors import FedtlError
    from fedtl.interrupts import Interrupts
    from fedtl.listings import print_attempt, print_certificate
    from fedtl.parity import Quiet, certify, ways
    from fedtl.scenario.load import load_scenario

    chosen = load_scenario(scenario, overrides or ())
    console = console_for(as_json)
    with Interrupts() as interrupts:
        quiet = Quiet(lambda note: console.print(note, style="yellow", markup=False))
        certificate = certify(
            chosen,
            quiet,
            interrupts,
            ways(chosen),
            lambda a: print_attempt(console, a.engine, a.seconds, a.reason),
        )
    print_certificate(console, certificate.as_facts())
    if as_json:
        typer.echo(json.dumps(certificate.as_facts(), indent=2))
    if not certificate.equal:
        raise FedtlError(
            "the engines do not agree: this is a bug in fedtl",
            where=scenario,
            do="Report it with the certificate (--json)",
        )


@app.command("list")
def list_names(
    kind: Annotated[
        str | None, typer.Argument(help="Of this kind only, e.g. backbones.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what there is to choose from."""
    from fedtl.choices import choices
    from fedtl.errors import unknown_name
    from fedtl.listings import print_choices

    every = choices()
    found = {name: those for name, those in every.items() if name.startswith(kind or "")}
    if not found:
        raise unknown_name("kind of names", kind or "", every)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_choices(console_for(False), found)


@app.command()
def cuts(scenario: ScenarioName, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show where a scenario's network can be cut, and what each cut takes."""
    from dataclasses import asdict

    from fedtl.listings import print_cuts
    from fedtl.scenario.load import load_scenario
    from fedtl.transfer.tails import blocks_before

    chosen = load_scenario(scenario, overrides or ())
    found = blocks_before(chosen.backbone, chosen.seed)
    if as_json:
        typer.echo(json.dumps([asdict(point) for point in found], indent=2))
    else:
        print_cuts(console_for(False), found)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say whether this machine can run fedtl, and what to mend where it cannot."""
    from fedtl.doctor import examine
    from fedtl.errors import EnvironmentFault
    from fedtl.listings import print_findings

    findings = examine()
    if as_json:
        typer.echo(json.dumps([finding.__dict__ for finding in findings], indent=2))
    else:
        print_findings(console_for(False), findings)
    broken = [finding.what for finding in findings if not finding.ok]
    if broken:
        raise EnvironmentFault(f"this machine lacks: {', '.join(broken)}", do="See the lines above")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a scenario file, for editors."""
    from fedtl.scenario.load import json_schema

    typer.echo(json_schema(), nl=False)


@cache_app.command("ls")
def cache_ls(as_json: AsJson = False) -> None:
    """List the feature store's entries."""
    from fedtl.listings import print_entries
    from fedtl.transfer.features import FeatureStore

    store = FeatureStore()
    entries = store.entries()
    if as_json:
        typer.echo(json.dumps([entry.__dict__ for entry in entries], indent=2, default=str))
    else:
        print_entries(console_for(False), store, entries)


@cache_app.command("rm")
def cache_rm(
    key: Annotated[str | None, typer.Argument(help="An entry's key, or its beginning.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every entry.")] = False,
) -> None:
    """Remove entries of the feature store; they are rebuilt when needed."""
    from fedtl.errors import InputError
    from fedtl.transfer.features import FeatureStore

    if (not key) != everything:
        raise InputError("name one entry, or --all", do="'fedtl cache ls' shows the keys")
    store = FeatureStore()
    if key is not None:
        found = [entry.key for entry in store.entries() if entry.key.startswith(key)]
        if len(found) > 1:
            raise InputError(f"{len(found)} keys begin so", got=key, do="Give more of the key")
        key = found[0] if found else key
    freed = store.remove(key)
    typer.echo(f"freed {freed / 2**20:.1f} MiB")


def main() -> None:
    """Run the command line; every expected error is one line and an exit code."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors are told on standard error.

    ``--debug`` anywhere among the arguments lets errors through with their traceback.
    """
    import click

    from fedtl.errors import EXIT_BUG, FedtlError, machine_fault

    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        result = app(arguments, prog_name="fedtl", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as done:
        return int(done.exit_code)
    except click.ClickException as error:
        error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        typer.echo("stopped: interrupted", err=True)
        return 130
    except SystemExit as done:  # how click ends when nobody reads its output any more
        return 0 if isinstance(done.__context__, BrokenPipeError) else int(done.code or 0)
    except FedtlError as error:
        if debug:
            raise
        prefix = "stopped" if error.exit_code in (4, 130, 143) else "error"
        typer.echo(f"{prefix}: {error.line()}", err=True)
        return error.exit_code
    except MemoryError:
        if debug:
            raise
        typer.echo("error: out of memory. Use fewer clients per round or smaller images", err=True)
        return 3
    except BrokenPipeError:
        return 0
    except OSError as error:
        if debug:
            raise
        fault = machine_fault(error)
        typer.echo(f"error: {fault.line()}", err=True)
        return fault.exit_code
    except Exception as error:
        if debug:
            raise
        typer.echo(
            f"error: this is a bug in fedtl: {type(error).__name__}: {error}. "
            "Run again with --debug for the traceback and report it",
            err=True,
        )
        return EXIT_BUG


if __name__ == "__main__":
    main()

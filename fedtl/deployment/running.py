"""One run with real clients, from a scenario to a finished folder, new or resumed."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtl import machine
from fedtl.conduct import Prepared, conduct
from fedtl.deployment.certificates import WARNING_DAYS
from fedtl.deployment.federation import Federation
from fedtl.deployment.gathering import Gathered, Gathering
from fedtl.deployment.judging import judge_remotely
from fedtl.deployment.promises import Sums, Tell, carried_sums, promise_to, settlement
from fedtl.deployment.roll_call import RollCall
from fedtl.deployment.server import OpenGrid, open_grid
from fedtl.errors import EnvironmentFault, FedtlError, InputError, Interrupted, PolicyStop
from fedtl.interrupts import Interrupts
from fedtl.results.files import write_atomic
from fedtl.results.runs import PARTY, SCENARIO, RunFolder, refuse_taken
from fedtl.rounds import Federation as Rounds
from fedtl.scenario.adaptation_rules import check_real
from fedtl.scenario.compatibility import check_cohort
from fedtl.scenario.load import dump_scenario, load_scenario
from fedtl.scenario.schema import Scenario
from fedtl.strategies import make_strategy, notes_of, protected
from fedtl.terminal import Terminal
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.tails import first_head, open_network, trunk_section
from fedtl.transfer.zero_shot import with_names

if TYPE_CHECKING:
    from fedtl.engines.flower_engine import FlowerEngine

DEADLINE_SECONDS = 600.0
"""Of a round, where the scenario sets none."""

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Deployment:
    """What a run with real clients needs besides its scenario.

    Attributes:
        least: clients that suffice once the time to join is over; None for all that are approved.
    """

    federation: Federation
    least: int | None
    terminal: Terminal
    interrupts: Interrupts

    def hint(self, path: Path) -> None:
        """What to type after a stop."""
        self.interrupts.hint = f"Type 'fedtl server resume {path}' to go on"


def run_deployed(scenario: Scenario, path: Path, deployment: Deployment) -> dict[str, Any]:
    """Run a scenario with real clients into a new folder; returns its summary.

    Raises:
        FedtlError: any; a folder in which nothing was committed yet is removed again, unless the
            run was interrupted or too few clients came.
    """
    started = time.perf_counter()
    if scenario.attack.kind != "none":
        raise InputError(
            "an attack is for simulation only, nobody is made to lie among real clients",
            where="attack.kind",
            got=repr(scenario.attack.kind),
            allowed='"none"',
        )
    check_real(scenario)
    deployment.federation.join()
    refuse_taken(path)
    deployment.hint(path)
    folder = RunFolder.create(path, dump_scenario(scenario))
    try:
        _write_party(path, {"run": secrets.token_hex(16), "clients": None})
        return _carry_on(scenario, folder, deployment, started)
    except FedtlError as error:
        resumable = isinstance(error, Interrupted | PolicyStop)
        if not resumable and not any((path / "checkpoints").glob("*.json")):
            folder.discard()
        raise
    finally:
        folder.release()


def resume_deployed(
    path: Path, deployment: Deployment, *, allow_changes: bool = False
) -> dict[str, Any]:
    """Go on with a run from its last commit, with the clients it was begun with."""
    started = time.perf_counter()
    deployment.federation.join()
    if (path / SCENARIO).is_file() and not (path / PARTY).is_file():
        raise InputError("this run was simulated", where=path, do=f"Type 'fedtl resume {path}'")
    folder = RunFolder.reopen(path)
    deployment.hint(path)
    try:
        if folder.finished() is not None:
            raise InputError(
                "this run is finished", where=path, do="Read its summary.json, or start another"
            )
        scenario = load_scenario(str(path / SCENARIO))
        folder.event("resumed")
        return _carry_on(scenario, folder, deployment, started, allow_changes)
    finally:
        folder.release()


def _carry_on(
    scenario: Scenario,
    folder: RunFolder,
    deployment: Deployment,
    started: float,
    allow_changes: bool = False,
) -> dict[str, Any]:
    """Clients, rounds, references, summary."""
    from fedtl.engines.flower_server import FlowerExchange

    terminal, interrupts = deployment.terminal, deployment.interrupts
    # Each client computes on what it has; the scenario's device is a simulation's.
    own = scenario.engine.model_copy(update={"device": "auto"})
    scenario = scenario.model_copy(update={"engine": own})
    backbone = open_backbone(trunk_section(scenario.backbone, scenario.transfer), scenario.seed)
    party = _read_party(folder.path)
    if (left := deployment.federation.certificate_days()) < WARNING_DAYS:
        terminal.noted(
            f"the server's certificate ends in {left:.0f} days: 'fedtl server init --renew'"
        )
    terminal.console.print("starting Flower's SuperLink", style="dim")
    with open_grid(deployment.federation) as opened, closing(RollCall(terminal)) as roll_call:
        exchange = FlowerExchange(
            opened.grid,
            opened.names,
            opened.sign,
            poll_seconds=POLL_SECONDS,
            late=_tell_late(opened, folder, terminal),
            trouble=opened.trouble,
        )
        approved = opened.approved()
        gathering = Gathering(
            exchange,
            scenario,
            backbone,
            approved=opened.approved,
            data_key=_data_key(deployment.federation, party["run"]),
            quorum=deployment.least or max(1, len(approved)),
            join_seconds=scenario.engine.join_seconds,
            expected=party["clients"],
            observer=roll_call,
            check=lambda: _check(opened, interrupts),
        )
        gathered = gathering.gather()
        roll_call.close()
        party["clients"] = list(gathered.roster.names)
        _write_party(folder.path, party)
        liar = _tell_liar(gathered.roster.names, folder, terminal)
        sums = partial(carried_sums, scenario, gathered.roster, run=party["run"], tell=liar)
        prepared = _prepare(scenario, backbone, gathering, gathered, terminal, sums)
        terminal.begin(scenario)
        return conduct(prepared, folder, terminal, interrupts, started, allow_changes)


def _prepare(
    scenario: Scenario,
    backbone: Backbone,
    gathering: Gathering,
    gathered: Gathered,
    terminal: Terminal,
    sums: Callable[[FlowerEngine], Sums | None],
) -> Prepared:
    """The federation over the gathered clients, and what is written down about it."""
    from fedtl.engines.flower_engine import FlowerEngine

    roster, facts = gathered.roster, gathered.facts
    deadline = scenario.engine.deadline_seconds or DEADLINE_SECONDS
    engine = FlowerEngine(
        gathering.exchange,
        roster,
        gathering.seat,
        gathered.seats,
        deadline,
        real=True,
        quorum=scenario.participation.quorum,
        waiting_seconds=min(deadline, scenario.engine.join_seconds),
    )
    identity = {
        "scenario_hash": scenario.hash(),
        "weights_sha256": backbone.weights_hash,
        "versions": machine.versions(),
        **gathered.identity,
    }
    check_cohort(scenario, roster.num_clients)
    _, tail = open_network(scenario.backbone, scenario.transfer, scenario.seed)
    head = first_head(scenario, tail, roster.width, len(roster.classes))
    head = with_names(head, scenario, backbone, roster.classes, scenario.backbone.extraction)
    strategy, promise = make_strategy(scenario, roster.names), promise_to(scenario, roster)
    strategy = protected(strategy, scenario, promise, roster.train)
    if promise is not None:
        gathering.settle(settlement(promise, strategy))
    federation = Rounds(
        scenario,
        roster,
        head,
        strategy,
        engine,
        identity,
        promise,
        sums(engine),
        "system",
    )
    seconds = max(float(facts[name].get("seconds", 0.0)) for name in roster.names)
    return Prepared(
        federation=federation,
        judge=judge_remotely(federation, engine, terminal.noted),
        data={
            "fingerprint": hashlib.blake2b(
                "".join(facts[name]["fingerprint"] for name in roster.names).encode(),
                digest_size=16,
            ).hexdigest(),
            "examples": int(roster.train.sum() + roster.test.sum()),
            "skipped_examples": sum(int(facts[name]["left_out"]) for name in roster.names),
            "excluded_clients": len(gathered.left_out),
            "leaks_train_test": sum(int(facts[name]["leaks"]) for name in roster.names),
            "leaks_between_clients": None,  # nobody sees everybody's data
        },
        backbone=backbone.card(),
        extract_seconds=seconds,
        notes=[
            *(f"{name} is left out: {reason}" for name, reason in gathered.left_out.items()),
            *_for_simulation(scenario),
            *notes_of(scenario, roster, head, real=True),
        ],
    )


def _for_simulation(scenario: Scenario) -> list[str]:
    """What a user may take for an order, and is none to real clients."""
    section = scenario.clients
    if section.num is None and section.partition in ("domain", "natural"):
        return []
    dealt = f"num = {section.num}" if section.num else f'partition = "{section.partition}"'
    return [f"[clients] {dealt} is for simulation; here each client has data of its own"]


def _read_party(path: Path) -> dict[str, Any]:
    """The run's id and its clients' names, None until they have gathered."""
    try:
        party: dict[str, Any] = json.loads((path / PARTY).read_bytes())
    except ValueError as error:
        raise InputError("is damaged", where=path / PARTY) from error
    return party


def _write_party(path: Path, party: Mapping[str, Any]) -> None:
    write_atomic(path / PARTY, json.dumps(party, indent=2).encode())


def _data_key(federation: Federation, run: str) -> bytes:
    """Keys the fingerprints of the clients' data: the same in a resumed run, and known to nobody
    who has only the run's folder."""
    secret = federation.signing_key().private_bytes_raw()
    return hashlib.blake2b(run.encode(), key=secret, digest_size=32).digest()


def _check(opened: OpenGrid, interrupts: Interrupts) -> None:
    """Called often while clients gather."""
    interrupts.check("interrupted while clients gathered")
    if trouble := opened.trouble():
        raise EnvironmentFault(trouble, where=opened.federation.path("superlink.log"))


def _tell_liar(names: Sequence[str], folder: RunFolder, terminal: Terminal) -> Tell:
    """Writes down and shows who broke the rules of a secure sum."""

    def liar(round: int, client: int, what: str) -> None:
        folder.event("secure_sum", client=names[client], round=round, what=what)
        terminal.noted(f"{names[client]} {what} in round {round}")

    return liar


def _tell_late(
    opened: OpenGrid, folder: RunFolder, terminal: Terminal
) -> Callable[[int, str, int], None]:
    """Writes down and shows answers that came after their deadline."""

    def late(node: int, kind: str, round: int) -> None:
        name = opened.name(node)
        folder.event("late", client=name, asked=kind, round=round)
        terminal.noted(f"{name} answered late in round {round}; not used")

    return late

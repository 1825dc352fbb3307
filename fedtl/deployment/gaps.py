"""``fedtl server gap``: the gaps between real clients, from what each sums up at home.

Clients gather as for a run and are told that they will sum statistics, and nothing else. Each sends
counts, class sums and the Gram matrix of its features once; distances that need rows side by side
are not to be had. Nothing is trained, and nothing of what came stays on the disk.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedtl.deployment.federation import Federation
from fedtl.deployment.gathering import Gathered, Gathering
from fedtl.deployment.roll_call import RollCall
from fedtl.deployment.server import OpenGrid, open_grid
from fedtl.engines.base import Engine
from fedtl.errors import EnvironmentFault, PolicyStop, times
from fedtl.evaluation.client_sums import Sums
from fedtl.evaluation.gap_words import expectation
from fedtl.evaluation.gaps import from_statistics
from fedtl.gap import FORMAT
from fedtl.gap_terminal import print_gap
from fedtl.interrupts import Interrupts
from fedtl.plans import Protection
from fedtl.ready_features import allowed_threads
from fedtl.results.files import refuse_unwritable, write_atomic
from fedtl.scenario.load import validate
from fedtl.scenario.schema import Scenario
from fedtl.strategies.closed_form import Fed3R
from fedtl.strategies.validation import accept_updates
from fedtl.terminal import Terminal, size
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.types import Roster

DEADLINE_SECONDS = 600.0
"""Of an answer, where the scenario sets none."""

POLL_SECONDS = 0.1

NOT_LOOKED_AT = (
    "nobody's pictures can be looked at from here: each client can, with 'fedtl gap' on its own "
    "data"
)


@dataclass(frozen=True)
class Collected:
    """What came.

    Attributes:
        sums: of the clients that answered, in the order of their ids.
        clients: their ids.
        missing: name -> why there is nothing of it.
        num_bytes: what one client sends.
    """

    sums: list[Sums]
    clients: list[int]
    missing: Mapping[str, str]
    num_bytes: int


def asking_for_statistics(scenario: Scenario) -> Scenario:
    """The scenario whose only round sums statistics: so that clients are told just that.

    Features are compared as the trunk gives them, before any alignment.
    """
    own = scenario.engine.model_copy(update={"device": "auto"})  # each client has its own
    tables = {
        "data": scenario.data.model_dump(),
        "clients": {**scenario.clients.model_dump(), "fraction": 1.0},
        "adaptation": {"input": scenario.adaptation.input},
        "backbone": scenario.backbone.model_dump(),
        "strategy": {"name": "fed3r", "keep_statistics": False},
        "evaluation": {"references": []},
        "privacy": {"min_class_examples": scenario.privacy.min_class_examples},
        "engine": own.model_dump(),
    }
    return validate({"name": scenario.name, "seed": scenario.seed, **tables}, scenario.name, {})


def collect_statistics(
    engine: Engine,
    roster: Roster,
    scenario: Scenario,
    check: Callable[[], None] = lambda: None,
) -> Collected:
    """Ask every client once, a few at a time, and believe what is well formed.

    Args:
        engine: with the clients behind it.
        scenario: for how much an answer may differ, and which classes stay out of it.
        check: called before each wave; may raise to stop.

    Raises:
        PolicyStop: no client's statistics can be used.
    """
    names, classes = roster.names, len(roster.classes)
    head = {
        "weight": np.zeros((classes, roster.width), np.float32),
        "bias": np.zeros(classes, np.float32),
    }
    everybody, least = np.arange(len(names)), scenario.privacy.min_class_examples
    question = replace(
        Fed3R().question(),
        round=1,
        clients=everybody,
        batch_keys=everybody.astype(np.uint64),
        protection=Protection(least_per_class=least) if least > 1 else None,
    )
    each = question.up_bytes(head)
    at_a_time = max(1, getattr(engine, "held_bytes", 2**28) // each)
    sums: list[Sums] = []
    clients: list[int] = []
    missing: dict[str, str] = {}
    for wave in question.waves(at_a_time):
        check()
        replies = engine.run_clients(wave, head)
        updates, _ = accept_updates(
            replies, wave, head, roster.train, scenario.validation.max_norm_ratio
        )
        for i, client in enumerate(updates.clients.tolist()):
            clients.append(client)
            sums.append({name: tensor[i].copy() for name, tensor in updates.tensors.items()})
        missing.update({names[one.client]: one.reason for one in updates.failures})
    if not sums:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(missing.items())[:5])
        raise PolicyStop(
            f"no client's statistics came ({reasons})", do="Bring the clients back and try again"
        )
    return Collected(sums, clients, missing, each)


def gap_facts(
    scenario: Scenario,
    backbone: Backbone,
    roster: Roster,
    collected: Collected,
    threads: int = 1,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The facts of ``fedtl gap``, as far as they follow from statistics."""
    here = collected.clients
    found = from_statistics(
        collected.sums,
        [roster.names[k] for k in here],
        [roster.domains[k] for k in here],
        roster.classes,
        threads=threads,
        check=check,
    )
    lone = sum(int((np.asarray(own["counts"]) == 1).sum()) for own in collected.sums)
    notes = [
        f"nothing was trained: each client sent counts, class sums and the Gram matrix of its "
        f"training features once ({size(collected.num_bytes)}), and none of it is kept",
        *(f"{name} is missing: {reason}" for name, reason in collected.missing.items()),
    ]
    if lone:
        notes.append(
            f"{times(lone)} a client has one example of a class: the sum of that class's features, "
            "which it sent, is that example's features themselves"
        )
    found["notes"] = [*notes, *found["notes"], NOT_LOOKED_AT]
    facts = {
        "format": FORMAT,
        "name": scenario.name,
        "scenario_hash": scenario.hash(),
        "backbone": {
            "name": backbone.name,
            "cut": backbone.cut,
            "weights": backbone.weights_source,
            "weights_sha256": backbone.weights_hash,
        },
        **found,
        "checks": [],
    }
    return {**facts, "expectation": expectation(facts)}


def gap_deployed(
    scenario: Scenario,
    command: str,
    federation: Federation,
    least: int | None,
    terminal: Terminal,
    interrupts: Interrupts,
    *,
    html: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Wait for the approved clients, collect their statistics, show the gaps between them.

    Args:
        command: what the user called the scenario, for the command to type next.
        least: clients that suffice once the time to join is over; None for all that are approved.
        html, out: where a page and a JSON file are written.

    Raises:
        PolicyStop: too few clients came, or none could answer.
        FedtlError: as for a run with real clients.
    """
    refuse_unwritable(html, out)
    asked = asking_for_statistics(scenario)
    federation.join()
    backbone = open_backbone(asked.backbone, asked.seed)
    roster, collected = _collect(asked, backbone, federation, least, terminal, interrupts)

    def check() -> None:
        interrupts.check("interrupted while gaps were measured")

    facts = gap_facts(scenario, backbone, roster, collected, allowed_threads(asked), check)
    print_gap(facts, terminal.console, f"fedtl server run {command}")
    if out is not None:
        write_atomic(out, (json.dumps(facts, indent=2, allow_nan=False) + "\n").encode())
    if html is not None:
        from fedtl.results.pages import gap_page

        write_atomic(html, gap_page(facts).encode())
    return facts


def _collect(
    scenario: Scenario,
    backbone: Backbone,
    federation: Federation,
    least: int | None,
    terminal: Terminal,
    interrupts: Interrupts,
) -> tuple[Roster, Collected]:
    """Clients gather, answer, and may go."""
    from fedtl.engines.flower_server import FlowerExchange

    def check(opened: OpenGrid) -> None:
        interrupts.check("interrupted while clients gathered")
        if trouble := opened.trouble():
            raise EnvironmentFault(trouble, where=federation.path("superlink.log"))

    terminal.console.print("starting Flower's SuperLink", style="dim")
    with open_grid(federation) as opened, closing(RollCall(terminal)) as roll_call:
        exchange = FlowerExchange(
            opened.grid,
            opened.names,
            opened.sign,
            poll_seconds=POLL_SECONDS,
            trouble=opened.trouble,
        )
        gathering = Gathering(
            exchange,
            scenario,
            backbone,
            approved=opened.approved,
            data_key=secrets.token_bytes(32),
            quorum=least or max(1, len(opened.approved())),
            join_seconds=scenario.engine.join_seconds,
            observer=roll_call,
            check=lambda: check(opened),
        )
        gathered = gathering.gather()
        roll_call.close()
        for name, reason in gathered.left_out.items():
            terminal.noted(f"{name} is left out: {reason}")
        with closing(_engine(scenario, gathering, gathered)) as engine:
            return gathered.roster, collect_statistics(
                engine, gathered.roster, scenario, lambda: check(opened)
            )


def _engine(scenario: Scenario, gathering: Gathering, gathered: Gathered) -> Engine:
    from fedtl.engines.flower_engine import FlowerEngine

    deadline = scenario.engine.deadline_seconds or DEADLINE_SECONDS
    return FlowerEngine(
        gathering.exchange,
        gathered.roster,
        gathering.seat,
        gathered.seats,
        deadline,
        real=True,
        waiting_seconds=min(deadline, scenario.engine.join_seconds),
    )

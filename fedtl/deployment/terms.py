"""What a server tells every client when it asks it to join: all that features depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtl import machine
from fedtl.deployment.backbone_transfer import announce
from fedtl.deployment.pledge import pledge_facts
from fedtl.deployment.private_data import told_of
from fedtl.errors import EnvironmentFault
from fedtl.scenario.schema import Scenario
from fedtl.strategies import tasks_of
from fedtl.transfer.backbones import Backbone
from fedtl.transfer.tails import trunk_section


def make_terms(
    scenario: Scenario, backbone: Backbone, settled: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The facts of a request to join, but for the client's own name.

    Args:
        scenario: the server's; no path of it is told.
        backbone: the scenario's whole trunk, opened; see ``tails.trunk_section``.
        settled: of privacy, what is known once everybody has gathered, see ``pledge``.
    """
    return {
        "scenario": scenario.name,
        "scenario_hash": scenario.hash(),
        "seed": scenario.seed,
        "test_fraction": scenario.data.test_fraction,
        "on_bad_file": scenario.data.on_bad_file,
        "leakage": scenario.data.leakage,
        "max_pixels": scenario.data.max_pixels,
        "data": told_of(scenario.data),
        "min_examples": scenario.clients.min_examples,
        "tasks": tasks_of(scenario),
        "adaptation": {name: getattr(scenario.adaptation, name) for name in ("input", "features")},
        "backbone": announce(backbone, trunk_section(scenario.backbone, scenario.transfer)),
        "transfer": scenario.transfer.model_dump(),
        "versions": machine.versions(),
        **pledge_facts(scenario, settled),
    }


def refuse_other_version(theirs: Any, other: str, own: str) -> None:
    """Raise EnvironmentFault where the other side's fedtl is of another minor version.

    Args:
        theirs: ``machine.versions()`` of the other side.
        other, own: who they are, for the message.
    """
    found = str(theirs.get("fedtl", "unknown"))[:40] if isinstance(theirs, dict) else "unknown"
    mine = machine.versions().get("fedtl", "unknown")
    if _minor(found) != _minor(mine):
        newer, older = (other, own) if _order(found) > _order(mine) else (own, other)
        wanted = max(found, mine, key=_order)
        raise EnvironmentFault(
            f"{other} has fedtl {found} and {own} fedtl {mine}, which do not work together; "
            f"type 'pip install \"fedtl=={_minor(wanted)}.*\"' at {older}, "
            f"for {newer} is ahead"
        )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _order(version: str) -> list[int]:
    return [int(part) for part in _minor(version).split(".") if part.isdecimal()]

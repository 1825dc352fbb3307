"""The trunk that a module is put on: of the user's own scenario, or one that fedtl brings along.

A card, and a scenario that came beside it, say which trunk a module is for. That is somebody else's
word: no model is fetched, no file opened and no code run for it, so only what needs none of that is
opened on it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtl.errors import InputError
from fedtl.results.module_card import Card
from fedtl.results.runs import SCENARIO
from fedtl.scenario.load import load_scenario, validate
from fedtl.scenario.schema import Backbone, Scenario
from fedtl.simulation import find_run
from fedtl.transfer.backbones import EMBEDDED, IDENTITY, OPENERS

CODE = ("module", "hub")
"""Backbones that run code of the user's."""

PACKAGED = (EMBEDDED, "hf")
"""Backbones whose default weights are installed."""

WEIGHTLESS = (IDENTITY, "fourier", "windows")
"""Backbones without weights."""


def comes_along(backbone: Mapping[str, Any]) -> bool:
    """Whether a backbone needs no network, no file of the user's and no code.

    Args:
        backbone: a scenario's ``[backbone]``, defaults left out or not.
    """
    name, weights = backbone.get("name", EMBEDDED), backbone.get("weights", "default")
    if name in WEIGHTLESS:
        return True
    if name in PACKAGED:
        return weights in ("default", "none")
    return name not in OPENERS and weights == "none"  # torchvision's networks are installed


def given_trunk(name: str, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario that a user names, by its own name or path, or as a run. Raises InputError."""
    beside = find_run(name) / SCENARIO
    return load_scenario(str(beside) if beside.is_file() else name, overrides)


def scenario_of(card: Card, data: Path, given: Backbone | None = None) -> Scenario:
    """A scenario with all of ``data`` as one client's, and the backbone to put a module on.

    Args:
        given: the backbone that the user named; default that of the run the file lies in, else the
            one its card names, as far as it ``comes_along``.

    Raises:
        InputError: such a backbone does not come along; says what to type.
        ScenarioError: what the card says is no scenario.
    """
    if given is not None:
        backbone = given.model_dump(mode="json", exclude_none=True)
    else:
        backbone = _own_backbone(card)
        if not comes_along(backbone):
            raise _not_on_its_word(card, backbone, data)
    suffix = {".npz": "arrays", ".csv": "table", ".parquet": "table", ".zip": "folder"}
    source = suffix.get(data.suffix.lower(), "folder")
    if backbone.get("name") == "hf":
        source = "texts"
    raw = {
        "name": "module",
        "seed": seed_of(card),
        "data": {"source": source, "path": str(data.resolve())},
        "clients": {"num": 1, "min_examples": 2},
        "backbone": backbone,
    }
    return validate(raw, str(card.path), {})


def seed_of(card: Card) -> int:
    """The seed of the module's run. Raises InputError."""
    text = card.facts["seed"]
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise card.damaged("its card's 'seed' is no number")
    return int(text)


def next_step(card: Card, data: str) -> str:
    """The command that puts a module on its trunk over data in a folder.

    Raises InputError where card or scenario say nothing of a trunk.
    """
    plain = comes_along(_own_backbone(card))
    to = [] if plain else ["--to", _named(card)]
    return shlex.join(["fedtl", "module", "apply", str(card.path), *to, "--data", data])


def _named(card: Card) -> str:
    """What stands for the user's own scenario in a command: the run, or a place to fill in."""
    beside = card.path.parent
    return str(beside) if (beside / SCENARIO).is_file() else "SCENARIO"


def _own_backbone(card: Card) -> dict[str, Any]:
    beside = card.path.parent / SCENARIO
    if beside.is_file():
        dumped = load_scenario(str(beside)).backbone.model_dump(mode="json", exclude_none=True)
        return dict(dumped)
    sections = card.part("sections")
    own = sections.get("backbone") if isinstance(sections, dict) else None
    if not isinstance(own, dict):
        raise card.damaged("its card names no backbone")
    return {key: value for key, value in own.items() if value is not None}


def _not_on_its_word(card: Card, backbone: Mapping[str, Any], data: Path) -> InputError:
    what = "this module's trunk would have to be fetched, or read from a file that it names"
    if backbone.get("name") in CODE:
        what = "this module's trunk is code of whoever trained it, and a card cannot bring code"
    called = f"{backbone.get('name')!r}, weights {backbone.get('weights', 'default')!r}"
    if _named(card) == "SCENARIO":
        do = "Write a scenario with the trunk that you trust, and type"
    else:
        do = "If the run is yours, or you trust the trunk that it names, type"
    return InputError(
        what,
        where=card.path,
        got=called[:200],
        allowed="without --to, what is installed with fedtl",
        do=f"{do} '{next_step(card, str(data))}'",
    )

"""A trained module as a file: safetensors, with a card of what it fits and where it is from.

What comes from outside is measured before it is read, and nothing in it is ever run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fedtl.errors import InputError
from fedtl.scenario.schema import Scenario
from fedtl.types import TAIL, Head, Roster

FORMAT = "fedtl-module 1"
HEAD = "head.safetensors"

MAX_HEADER = 2**22
"""Bytes of names, shapes and card together."""
MAX_BYTES = 2**32


@dataclass(frozen=True)
class Card:
    """What a module says of itself; text from outside, to be escaped where it is shown.

    Attributes:
        path: the file.
        facts: the file's metadata as it stands there.
        tensors: name -> shape.
        num_bytes: of the file.
    """

    path: Path
    facts: Mapping[str, str]
    tensors: Mapping[str, tuple[int, ...]]
    num_bytes: int

    @property
    def classes(self) -> tuple[str, ...]:
        """C class names in the order of the head's scores."""
        return tuple(self.facts["classes"].split("\n"))

    @property
    def trunk(self) -> str:
        """The trunk by name and the beginning of its weights' hash."""
        return f"{self.facts['backbone']} {self.facts['backbone_sha256'][:12]}"

    @property
    def kind(self) -> str:
        """What it is: "linear head", "lora, linear head"."""
        head = f"{self.facts['kind']} head"
        tail = any(name.startswith(TAIL) for name in self.tensors)
        return f"{self.facts['mode']}, {head}" if tail else head

    def part(self, key: str) -> Any:
        """One of the facts that are JSON.

        Raises InputError where it is damaged.
        """
        try:
            return json.loads(self.facts[key])
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"its card's {key!r} cannot be read") from error

    def damaged(self, why: str) -> InputError:
        """The refusal of this file."""
        return InputError(
            f"this module is damaged: {why}",
            where=self.path,
            do="Take it from its run again, or from whoever made it",
        )

    def as_facts(self) -> dict[str, Any]:
        """The card as plain values, for ``--json``."""
        parts = {key: self.part(key) for key in PARTS if key in self.facts}
        return {
            "path": str(self.path),
            "bytes": self.num_bytes,
            "parameters": sum(int(np.prod(shape)) for shape in self.tensors.values()),
            **{key: value for key, value in self.facts.items() if key not in PARTS},
            **parts,
            "classes": list(self.classes),
            "tensors": {name: list(shape) for name, shape in self.tensors.items()},
        }


def card_facts(
    scenario: Scenario,
    roster: Roster,
    backbone: Mapping[str, Any],
    rounds: int,
    measured: Mapping[str, Any],
    epsilon: float | None,
    whole: bool,
) -> dict[str, str]:
    """What a run's head fits and where it is from: the metadata of its file.

    Of the data only counts are told, and of this machine no path.

    Args:
        backbone: ``Backbone.card()``.
        rounds: that it was trained for.
        measured: of the clients' tests.
        epsilon: None promises nothing.
        whole: whether it is a model without anything that only clients have.
    """
    sections = scenario.canonical()
    trained_on = {
        "clients": roster.num_clients,
        "examples": int(roster.train.sum()),
        "domains": len({domain for domain in roster.domains if domain}),
        "rounds": rounds,
    }
    found = {name: measured[name] for name in ("accuracy", "balanced_accuracy")}
    return {
        "format": FORMAT,
        "fedtl": version("fedtl"),
        "scenario_hash": scenario.hash(),
        "backbone": backbone["name"],
        "backbone_sha256": backbone["weights_sha256"],
        "backbone_source": backbone["weights_source"],
        "backbone_licence": backbone["licence"],
        "preprocessing": json.dumps(backbone["preprocessing"]),
        "settings": json.dumps(backbone["settings"]),
        "cut": backbone["cut"],
        "mode": scenario.transfer.mode,
        "kind": scenario.head.kind,
        "classes": "\n".join(roster.classes),
        "seed": str(scenario.seed),
        "sections": json.dumps({key: sections[key] for key in ("backbone", "transfer", "head")}),
        "trained_on": json.dumps(trained_on),
        "measured": json.dumps({**found, "epsilon": epsilon}),
        "aligned": scenario.adaptation.features,
        "whole": "yes" if whole else "no",
    }


NEEDED = ("backbone", "backbone_sha256", "cut", "kind", "mode", "classes", "seed")
PARTS = ("sections", "preprocessing", "settings", "trained_on", "measured")
"""Facts that are JSON."""


def read_card(path: Path) -> Card:
    """The card of a module file; no tensor is read.

    Raises:
        InputError: there is no such file, it is no safetensors file, too large, damaged, or no
            module of this version.
    """
    size = _measured(path)
    try:
        with safe_open(str(path), "np") as file:
            facts = dict(file.metadata() or {})
            shapes = {}
            for name in file.keys():  # noqa: SIM118 -- not a mapping
                part = file.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                if part.get_dtype() != "F32":
                    raise _no_module(path, f"{name[:80]!r} is {part.get_dtype()}, not F32")
    except (OSError, SafetensorError) as error:
        raise _no_module(path, "it cannot be read as safetensors") from error
    if facts.get("format") != FORMAT:
        made = "it has no card" if "format" not in facts else f"format {facts['format'][:40]!r}"
        raise _no_module(path, made)
    if lacking := [key for key in (*NEEDED, *PARTS) if key not in facts]:
        raise _no_module(path, f"its card lacks {', '.join(lacking)}")
    card = Card(path, facts, shapes, size)
    for key in PARTS:
        if not isinstance(card.part(key), dict | None):
            raise card.damaged(f"its card's {key!r} is no table")
    return card


def read_module(card: Card) -> Head:
    """The module's tensors, float32 and finite.

    Raises InputError where they are not.
    """
    try:
        with safe_open(str(card.path), "np") as file:
            tensors = {name: file.get_tensor(name) for name in card.tensors}
    except (OSError, SafetensorError) as error:
        raise card.damaged("its tensors cannot be read") from error
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise card.damaged(f"{name[:80]!r} has a value that is not finite")
    return tensors


def _measured(path: Path) -> int:
    """The file's size, once it and its header are known to be of a size that can be read."""
    try:
        if not path.is_file():
            what = "this is a folder without a module" if path.is_dir() else "no such file"
            raise InputError(what, where=path, do="'fedtl module ls' shows modules")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = int.from_bytes(file.read(8), "little")
    except (OSError, ValueError) as error:
        raise _no_module(path, "it cannot be opened") from error
    if size < 8 or header > size - 8:
        raise _no_module(path, "it is no safetensors file, or was cut off")
    if header > MAX_HEADER:
        raise _no_module(path, f"a header of {header:,} bytes; at most {MAX_HEADER:,} are read")
    if size > MAX_BYTES:
        raise _no_module(path, f"{size:,} bytes; at most {MAX_BYTES:,} are read")
    return size


def _no_module(path: Path, why: str) -> InputError:
    return InputError(
        "this is no module of fedtl",
        where=path,
        got=why,
        allowed="a head.safetensors that 'fedtl run' wrote",
        do="'fedtl module ls' shows modules",
    )

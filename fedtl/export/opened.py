"""A finished run as one model: trunk, what is behind the cut, head, labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fedtl.audit.reopened import read_head
from fedtl.errors import InputError
from fedtl.results.runs import PARTY, SCENARIO, RunFolder
from fedtl.results.tables import RunTables, read_run, seed_folders
from fedtl.scenario.load import load_scenario
from fedtl.scenario.schema import Scenario
from fedtl.transfer.backbones import INPUT, Backbone
from fedtl.transfer.tails import open_network
from fedtl.types import TAIL, Head, Tail

OWN_LAYERS = ("fedper", "lgfedavg", "fedrep", "fedbabu")
"""Strategies whose shared head is no model without something that each client keeps."""


@dataclass(frozen=True)
class Model:
    """What a run ended with, as one program would hold it.

    Attributes:
        path: the run's folder.
        scenario: the run's.
        tables: what the run wrote down.
        head: all tensors that were trained.
        front: the frozen trunk, as far as the cut.
        tail: what is behind the cut; None where only a head is.
        labels: C class names.
        columns: d of rows before any trunk; None where that is not known.
    """

    path: Path
    scenario: Scenario
    tables: RunTables
    head: Head
    front: Backbone
    tail: Tail | None
    labels: tuple[str, ...]
    columns: int | None = None

    @property
    def takes(self) -> str:
        """images, texts or rows."""
        return self.front.takes

    @property
    def half(self) -> bool:
        """Whether the run stored activations in half precision: then they are rounded here too."""
        return self.scenario.backbone.feature_dtype == "float16" and self.front.cut != INPUT

    @property
    def tokens(self) -> int | None:
        """Tokens to which every text is filled up; None: to the longest beside it."""
        whole = self.takes == "texts" and self.tail is not None and self.front.cut == INPUT
        return self.tail.shape[0] if whole and self.tail is not None else None

    @cached_property
    def width(self) -> int:
        """A, of the activations at the cut."""
        if self.tail is not None:
            return int(np.prod(self.tail.shape))
        if self.front.known_dim == 0:  # identity: the data decide
            first = self.head.get("hidden.0.weight", self.head.get("fourier.weight"))
            return int((self.head["weight"] if first is None else first).shape[-1])
        return self.front.dim


def open_model(path: Path, check: Callable[[], None] = lambda: None) -> Model:
    """Read a finished run, with its trunk located and its weights' hash compared.

    Args:
        check: called between slow steps; may raise to stop.

    Raises:
        InputError: no finished run, its trunk or head is gone or another, or its clients have
            models of their own that no single file can hold.
    """
    if seeds := seed_folders(path):
        raise InputError(
            "holds a run for each seed, and one is exported at a time",
            where=path,
            allowed=", ".join(seed.name for seed in seeds),
            do=f"Type 'fedtl export {seeds[0]}'",
        )
    if not (path / SCENARIO).is_file():
        raise InputError("not a run folder", where=path, allowed="a folder that 'fedtl run' made")
    summary = RunFolder(path).finished()
    if summary is None:
        real = (path / PARTY).is_file()
        raise InputError(
            "this run is not finished, so there is no model to export",
            where=path,
            do=f"Type '{'fedtl server resume' if real else 'fedtl resume'} {path}'",
        )
    scenario = load_scenario(str(path / SCENARIO))
    _refuse_own_models(scenario, path)
    head = read_head(path, summary)
    check()
    examples = int((summary.get("data") or {}).get("examples") or 0)
    front, tail = open_network(scenario.backbone, scenario.transfer, scenario.seed, examples)
    known = (summary.get("backbone") or {}).get("weights_sha256")
    if known not in (None, front.weights_hash):
        raise InputError(
            "these are not the backbone's weights that the run was made with",
            where="backbone.weights",
            got=f"SHA-256 {front.weights_hash[:12]}",
            allowed=str(known)[:12],
            do="Put the weights back, or run the scenario anew",
        )
    _refuse_strange(head, tail, path)
    labels = _labels(path, int(summary["data"]["classes"]))
    return Model(path, scenario, read_run(path), head, front, tail, labels)


def _refuse_own_models(scenario: Scenario, path: Path) -> None:
    kind = scenario.adaptation.features
    if kind != "none":
        raise InputError(
            "every client of this run sends its features through a map of its own, which no "
            "single file can hold",
            where=path,
            got=f"adaptation.features = {kind!r}",
            do="Run the scenario with adaptation.features = 'none'",
        )
    if scenario.strategy.name in OWN_LAYERS:
        raise InputError(
            "every client of this run keeps layers of its own: the shared ones are no model alone",
            where=path,
            got=f"strategy.name = {scenario.strategy.name!r}",
            do="Run the scenario with strategy.name = 'fedavg', or 'finetune'",
        )


def _refuse_strange(head: Head, tail: Tail | None, path: Path) -> None:
    """Raise InputError where the head's tensors are not those of the network behind the cut."""
    mine = {name[len(TAIL) :]: t.shape for name, t in head.items() if name.startswith(TAIL)}
    wanted = {} if tail is None else {n: tail.tensors[n].shape for n in tail.recipe["trained"]}
    if mine != wanted:
        odd = sorted(set(mine.items()) ^ set(wanted.items()))
        raise InputError(
            "what this run trained behind the cut does not fit the network its scenario describes",
            where=path,
            got=", ".join(name for name, _ in odd[:3]),
            do="Run the scenario anew with this version of fedtl",
        )


def _labels(path: Path, count: int) -> tuple[str, ...]:
    """Class names: of the head's card, or where one has a line break in it, of the tables."""
    from safetensors import safe_open

    with safe_open(str(path / "head.safetensors"), "np") as file:
        names = str((file.metadata() or {}).get("classes", "")).split("\n")
    if len(names) != count:
        import pyarrow.parquet as pq

        table = path / "classes.parquet"
        found = pq.read_table(table, columns=["class"]) if table.is_file() else None
        names = [] if found is None else list(dict.fromkeys(found["class"].to_pylist()))
    if len(names) != count:
        names = [f"class {i}" for i in range(count)]
    return tuple(names)

"""The study of docs/privacy.md: accuracy against epsilon, with audited lower bounds.

    uv run python benchmarks/privacy_study.py --out DIR [DATA ...]   # runs what DIR lacks
    uv run python benchmarks/privacy_study.py --out DIR --tables     # the tables

Each cell is two runs of the scenario with the keys of ``MECHANISMS`` and an epsilon: one whose
accuracy is told, and one with canaries, each in or out of the training by a coin flip, whose head
``fedtl audit`` attacks. "none" is the same training with the noise switched off
(``privacy.noise_multiplier = 0``): clipped, and nothing promised.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedtl
from fedtl.audit import audit_run
from fedtl.interrupts import Interrupts
from fedtl.terminal import PatientConsole

DATA = ("privacy-pacs", "privacy-cifar10")
SEEDS = (1, 2, 3)
LEVELS = (None, 8.0, 2.0, 0.5)
"""Epsilons of a whole run; None: no noise."""

FED3R = {"strategy.name": "fed3r", "strategy.keep_statistics": False, "rounds": 1}
MECHANISMS: dict[str, dict[str, Any]] = {
    "DP-FedAvg, whole clients": {"privacy.mechanism": "central", "privacy.clip": 0.3},
    "DP-SGD at the clients, single examples": {
        "privacy.mechanism": "example",
        "privacy.clip": 4.0,
        "rounds": 5,
        "training.learning_rate": 0.1,
    },
    "DP ridge in one release, single examples": {
        "privacy.mechanism": "release",
        "privacy.unit": "example",
        **FED3R,
    },
}
"""Keys over the scenario's, by what is protected and how."""

PLAIN: dict[str, dict[str, Any]] = {"FedAvg": {}, "ridge": FED3R}
"""The same training without any mechanism: keys over the scenario's."""

CLIENT_CANARIES = {"privacy-pacs": 99, "privacy-cifar10": 499}
"""Of the audited runs of whole clients: all but one."""

CANARIES = 1000
"""Of the other audited runs, examples."""


@dataclass(frozen=True)
class Cell:
    """One data set, mechanism, epsilon and seed."""

    data: str
    mechanism: str
    level: float | None
    seed: int

    def keys(self, audited: bool) -> dict[str, Any]:
        """What is set over the scenario."""
        own = MECHANISMS[self.mechanism]
        noise = (
            {"privacy.epsilon": self.level}
            if self.level is not None
            else {"privacy.noise_multiplier": 0.0}
        )
        central = own["privacy.mechanism"] == "central"
        canaries = CLIENT_CANARIES[self.data] if central else CANARIES
        return {
            **own,
            **noise,
            "seed": self.seed,
            "privacy.canaries": canaries if audited else 0,
            "privacy.compare": False,
            "evaluation.references": [],
        }

    def folder(self, out: Path, audited: bool) -> Path:
        """Where its run is."""
        words = self.mechanism.split(",")[0].replace(" ", "-")
        level = "none" if self.level is None else f"{self.level:g}"
        return out / self.data / words / f"{level}-{self.seed}{'-audited' if audited else ''}"


def cells(data: Sequence[str]) -> Iterator[Cell]:
    """All of them."""
    for name in data:
        for mechanism in MECHANISMS:
            for level in LEVELS:
                yield from (Cell(name, mechanism, level, seed) for seed in SEEDS)


def run_plain(data: str, out: Path) -> None:
    """What is compared with, as far as it is missing."""
    for name, own in PLAIN.items():
        for seed in SEEDS:
            folder = out / data / name / str(seed)
            if not (folder / "summary.json").is_file():
                keys = {**own, "privacy.mechanism": "none", "seed": seed}
                keys["evaluation.references"] = []
                fedtl.run(data, out=folder, **nested(keys))


def run_cell(cell: Cell, out: Path) -> None:
    """Both runs and the attack, as far as they are missing."""
    for audited in (False, True):
        folder = cell.folder(out, audited)
        if not (folder / "summary.json").is_file():
            fedtl.run(cell.data, out=folder, **nested(cell.keys(audited)))
        if audited and not (folder / "audit.json").is_file():
            with Interrupts() as interrupts:
                audit_run(folder, PatientConsole(stderr=True, quiet=True), interrupts)


def nested(keys: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as tables."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        *tables, name = key.split(".")
        place = found
        for table in tables:
            place = place.setdefault(table, {})
        place[name] = value
    return found


def table(data: str, out: Path) -> Iterator[str]:
    """One data set's table as Markdown: mean (deviation) over seeds."""
    yield "| | epsilon | noise | accuracy | audited epsilon, seed by seed | AUC |"
    yield "|---|---|---|---|---|---|"
    for name in PLAIN:
        found = [_json(out / data / name / str(seed) / "summary.json") for seed in SEEDS]
        if all(found):
            yield f"| {name}, nothing protected | | | {spread(found)} | | |"
    for mechanism in MECHANISMS:
        for level in LEVELS:
            own = [Cell(data, mechanism, level, seed) for seed in SEEDS]
            runs = [_json(one.folder(out, False) / "summary.json") for one in own]
            audits = [_json(one.folder(out, True) / "audit.json") for one in own]
            if not all(runs) or not all(audits):
                continue
            noise = runs[0]["privacy"]["noise_multiplier"]
            lower = ", ".join(f"{audit['lower']['epsilon']:.2f}" for audit in audits)
            auc = statistics.mean(audit["membership"][0]["auc"] for audit in audits)
            yield (
                f"| {mechanism} | {'none' if level is None else f'{level:g}'} | {noise:.2f} | "
                f"{spread(runs)} | {lower} | "
                f"{100 * auc:.1f} % |"
            )


def spread(runs: Sequence[dict[str, Any]]) -> str:
    """Mean and deviation of the accuracy on all tests, per cent."""
    accuracy = [100 * run["final"]["accuracy"] for run in runs]
    return f"{statistics.mean(accuracy):.1f} ({statistics.stdev(accuracy):.1f})"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def main() -> None:
    """Runs, or prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*", default=DATA)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args()
    if not given.tables:
        for name in given.data:
            run_plain(name, given.out)
        todo = list(cells(given.data))
        for i, cell in enumerate(todo):
            print(f"{i + 1} of {len(todo)}: {cell}", flush=True)
            run_cell(cell, given.out)
    for name in given.data:
        print(f"\n### {name}\n")
        print("\n".join(table(name, given.out)))


if __name__ == "__main__":
    main()

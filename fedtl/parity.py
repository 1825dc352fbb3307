"""``fedtl parity``: one scenario on every engine this machine can run, and whether they agree."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtl import machine
from fedtl.errors import EnvironmentFault, Interrupted
from fedtl.evaluation.verdicts import Verdict
from fedtl.forecast import Forecast
from fedtl.interrupts import Interrupts
from fedtl.ready_features import OpenedData
from fedtl.scenario.load import validate
from fedtl.scenario.schema import Scenario
from fedtl.simulation import Observer, run_scenario
from fedtl.types import ClientUpdates

COMPARED = ("cohorts_blake2b", "batches_blake2b", "head_sha256", "bytes_up", "bytes_down")
"""What must be the same on all engines; the first three are hashes."""

NEEDS = {"ray": ("ray",), "flower": ("flwr", "ray")}
"""Packages without which an engine cannot run."""


@dataclass(frozen=True)
class Attempt:
    """One way to run the scenario.

    Attributes:
        engine: its name and settings, as the certificate shows them.
        facts: COMPARED of its summary; empty where it could not run.
        seconds: the whole run with start-up.
        reason: why it could not run, or None.
    """

    engine: str
    facts: Mapping[str, Any]
    seconds: float
    reason: str | None = None


@dataclass(frozen=True)
class Certificate:
    """Which engines ran a scenario, and whether all gave the same.

    Attributes:
        scenario_hash: of the scenario as it was run: without references, which no engine trains.
    """

    name: str
    scenario_hash: str
    attempts: tuple[Attempt, ...]
    versions: Mapping[str, str]
    cpu: str

    @property
    def equal(self) -> bool:
        """Whether at least two ways ran, and all that ran agree in everything compared."""
        ran = [attempt.facts for attempt in self.attempts if attempt.facts]
        return len(ran) > 1 and all(facts == ran[0] for facts in ran)

    def as_facts(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "scenario_hash": self.scenario_hash,
            "equal": self.equal,
            "engines": [
                {
                    "engine": attempt.engine,
                    **attempt.facts,
                    "seconds": attempt.seconds,
                    "not_run": attempt.reason,
                }
                for attempt in self.attempts
            ],
            "versions": dict(self.versions),
            "cpu": self.cpu,
        }


def ways(scenario: Scenario, block_sizes: Sequence[int | None] = (None, 1)) -> list[dict[str, Any]]:
    """Engine sections to compare: each engine, with one worker and with all, in several blocks."""
    own = scenario.engine.model_dump(exclude_none=True)
    for key in ("kind", "threads", "num_cpus", "num_nodes", "block_size"):
        own.pop(key, None)
    cores = machine.allowed_cores()
    counts = sorted({1, min(cores, scenario.engine.num_cpus or cores)})
    found: list[dict[str, Any]] = []
    for count in counts:
        found += [{"kind": "local", "threads": count, "block_size": b} for b in block_sizes]
    for count in counts:
        found.append({"kind": "ray", "num_cpus": count})
    for count in counts:
        found.append({"kind": "flower", "num_cpus": count, "num_nodes": count})
    return [{**own, **{k: v for k, v in way.items() if v is not None}} for way in found]


def certify(
    scenario: Scenario,
    observer: Observer,
    interrupts: Interrupts,
    sections: Sequence[dict[str, Any]],
    attempted: Callable[[Attempt], None] = lambda attempt: None,
) -> Certificate:
    """Run the scenario once for each engine section and compare.

    Args:
        observer: as ``run_scenario`` takes it.
        sections: ``[engine]`` tables.
        attempted: called after each.

    Raises:
        InputError: the scenario itself cannot be run (data, weights).
        EnvironmentFault: of several engines, fewer than two can run here.
        Interrupted: nothing is kept.
    """
    content = scenario.model_dump()
    content["evaluation"]["references"] = []
    attempts = []
    for section in sections:
        one = validate({**content, "engine": section}, scenario.name, {})
        attempts.append(_attempt(one, section, observer, interrupts))
        attempted(attempts[-1])
    wanted = {section["kind"] for section in sections}
    ran = {s["kind"] for s, a in zip(sections, attempts, strict=True) if a.reason is None}
    if len(ran) < min(2, len(wanted)):
        failed = {s["kind"]: a.reason for s, a in zip(sections, attempts, strict=True) if a.reason}
        reasons = "; ".join(f"{kind}: {reason}" for kind, reason in failed.items())
        raise EnvironmentFault(
            f"fewer than two engines can run here ({reasons})", do="See 'fedtl doctor'"
        )
    hashed = validate({**content, "engine": sections[0]}, scenario.name, {}).hash()
    return Certificate(
        scenario.name, hashed, tuple(attempts), machine.versions(), machine.cpu_model()
    )


def _attempt(
    scenario: Scenario, section: Mapping[str, Any], observer: Observer, interrupts: Interrupts
) -> Attempt:
    name = ", ".join(
        [section["kind"]]
        + [
            f"{section[key]} {word}{'s' if section[key] > 1 else ''}"
            for key, word in (("threads", "thread"), ("num_cpus", "worker"))
            if key in section
        ]
        + ([f"blocks of {section['block_size']}"] if "block_size" in section else [])
    )
    missing = [p for p in NEEDS.get(section["kind"], ()) if importlib.util.find_spec(p) is None]
    if missing:
        return Attempt(name, {}, 0.0, f"{', '.join(missing)} is not installed")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedtl-parity-") as place:
        try:
            summary = run_scenario(scenario, Path(place) / "run", observer, interrupts)
        except EnvironmentFault as fault:
            reason = fault.what if fault.got is None else f"{fault.what} ({fault.got})"
            return Attempt(name, {}, time.perf_counter() - began, reason)
        except Interrupted as stop:  # not to be resumed: its folder goes with it
            raise Interrupted("interrupted; no certificate", exit_code=stop.exit_code) from stop
    facts = {key: summary[key] for key in COMPARED}
    return Attempt(name, facts, time.perf_counter() - began)


class Quiet:
    """An observer that shows nothing but what the user should know, once."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._told = tell, set[str]()

    def planned(self, opened: OpenedData, plan: Forecast) -> None:
        """Nothing."""

    def extracting(self, done: int, total: int) -> None:
        """Nothing."""

    def ready(self, notes: Sequence[str], names: Sequence[str]) -> None:
        """The notes, the first time."""
        for note in notes:
            self.noted(note)

    def round_done(self, row: Mapping[str, Any], updates: ClientUpdates) -> None:
        """Nothing."""

    def noted(self, note: str) -> None:
        """The note, the first time."""
        if note not in self._told:
            self._told.add(note)
            self._tell(note)

    def comparing(self, reference: str) -> None:
        """Nothing."""

    def finished(self, summary: Mapping[str, Any], verdict: Verdict, folder: Path) -> None:
        """Nothing."""

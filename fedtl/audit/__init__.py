"""``fedtl audit``: attacks on the head that a run trained, and on what its clients sent.

What the attacks showed is a lower bound of epsilon, beside the upper bound that was promised.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from fedtl.audit.bounds import lower_bound_facts
from fedtl.audit.members import attack_members
from fedtl.audit.reopened import Reopened, reopen
from fedtl.audit.sent import attack_sent
from fedtl.audit.told import print_audit
from fedtl.errors import InputError
from fedtl.interrupts import Interrupts
from fedtl.privacy.canaries import canary_unit
from fedtl.privacy.membership import found_something
from fedtl.results.audit_file import AUDIT, FORMAT
from fedtl.results.files import write_atomic
from fedtl.results.tables import seed_folders
from fedtl.terminal import Terminal

__all__ = ["audit_run"]

SURE = 0.95
"""Confidence of the lower bound."""


def audit_run(path: Path, console: Console, interrupts: Interrupts) -> dict[str, Any]:
    """Attack a finished run and write what was found into its folder, as ``audit.json``.

    Args:
        path: the run folder; its data must be where they were.

    Returns:
        What the file holds.

    Raises:
        InputError: no finished simulation, or not the data or the head that belong to it.
        Interrupted: by a signal; nothing is written.
        EnvironmentFault: the folder cannot be written.
    """
    started = time.perf_counter()
    if seeds := seed_folders(path):
        raise InputError(
            "holds a run for each seed, and one is attacked at a time",
            where=path,
            allowed=", ".join(seed.name for seed in seeds),
            do=f"Type 'fedtl audit {seeds[0]}'",
        )
    with Terminal(console) as terminal:

        def extracting(done: int, total: int) -> None:
            terminal.extracting(done, total)
            interrupts.check("interrupted while examples went through the trunk")

        run = reopen(path, extracting)
    facts = audit(run, interrupts)
    facts["seconds"] = round(time.perf_counter() - started, 3)
    interrupts.check("interrupted; nothing was written")
    write_atomic(path / AUDIT, (json.dumps(facts, indent=2, allow_nan=False) + "\n").encode())
    print_audit(facts, path, console)
    return facts


def audit(run: Reopened, interrupts: Interrupts) -> dict[str, Any]:
    """All attacks on a run, as JSON values; ``seconds`` is None."""
    membership, notes = attack_members(run, interrupts)
    lower = lower_bound_facts(run, interrupts, 1 - SURE)
    leakage, seen = attack_sent(run)
    if run.summary.get("personal") is not None:
        notes.append("the shared head is attacked; clients' own heads never leave them")
    return {
        "format": FORMAT,
        "unit": canary_unit(run.scenario.privacy),
        "upper": run.promised,
        "lower": lower,
        "membership": membership,
        "leakage": leakage,
        "warnings": _warnings(run, lower, membership),
        "notes": [*notes, *seen],
        "seconds": None,
    }


def _warnings(run: Reopened, lower: dict[str, Any], membership: list[dict[str, Any]]) -> list[str]:
    warnings, shown, upper = [], lower["epsilon"], run.promised
    if shown is not None and upper is not None and shown > upper:
        warnings.append(
            f"THE PROMISE IS BROKEN: at least epsilon {shown:.3g} was shown "
            f"({100 * lower['confidence']:.0f} % sure), and at most {upper:.3g} was promised. Do "
            "not rely on this run's promise, and report it"
        )
    if upper is None and shown:
        warnings.append(
            f"nothing was promised, and at least epsilon {shown:.3g} was shown: the head tells who "
            "was in its training"
        )
    warnings += [
        f"{attack['attack']}: training examples are told from others by the head alone "
        f"(AUC {attack['auc']:.2f})"
        for attack in membership
        if found_something(attack) and attack["auc"] >= LEAKY
    ]
    return warnings


LEAKY = 0.6
"""AUC from which membership is worth a warning."""

"""What a run says of privacy: before its rounds in notes, after them in its summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtl.checkpoints import Progress
from fedtl.planning import plan_round
from fedtl.plans import RoundPlan
from fedtl.privacy.ledger import LEDGER, Ledger
from fedtl.privacy.noise import SEEDED, SYSTEM
from fedtl.privacy.promise import Promise
from fedtl.privacy.secure_graph import asked_neighbours
from fedtl.rounds import Federation
from fedtl.scenario.privacy import unit_of
from fedtl.scenario.schema import Scenario
from fedtl.strategies import secure_ring
from fedtl.strategies.base import ServerState
from fedtl.strategies.private import CLIP

SIMULATED_MASKS = (
    "in this simulation all ends of the secure sum are in one process: its messages and sums are "
    "the real ones, but nothing is hidden from whoever runs it, and the bytes of keys and shares "
    "are not counted"
)
SEEDED_NOISE = (
    "noise follows from the seed, as this is a simulation: whoever knows the seed can take it off"
)
ROUNDED = "updates and noise are as good as continuous: they are rounded to the secure sum's grid"
ARITHMETIC = "of secure aggregation only the arithmetic is run: the server sees every client's part"
FOLDER = "the run's folder says who took part in which round: only the head may be shown around"
PAST_NOISE = "the run's folder holds the noise of past rounds: only the head may be shown around"


def privacy_notes(federation: Federation) -> list[str]:
    """What is promised, a line each, before the first round; nothing where nothing is."""
    promise, section = federation.promise, federation.scenario.privacy
    notes = []
    if promise is not None:
        spent = promise.epsilon_after(promise.rounds)
        source = SEEDED if federation.noise == "seeded" else SYSTEM
        notes.append(
            f"{promised(promise.mechanism, promise.unit, spent, promise.delta)}, after "
            f"{_rounds(promise.rounds)}; noise multiplier {promise.noise_multiplier:.4g}, clip "
            f"{promise.clip:g}"
            + (
                f", noise from the {source} at the {_place(federation)}"
                if promise.noise_multiplier
                else ""
            )
        )
        notes += promise.notes
    if section.secure_aggregation != "none":
        how = "its arithmetic alone" if section.secure_aggregation == "arithmetic" else "with masks"
        notes.append(f"secure aggregation ({section.secure_aggregation}): {how}")
    return notes


def _rounds(count: int) -> str:
    return "its one round" if count == 1 else f"all {count} rounds"


def promised(mechanism: str, unit: str, epsilon: float | None, delta: float) -> str:
    """Epsilon with its unit, in half a line."""
    whom = "whole clients" if unit == "client" else "single examples"
    bound = "not bounded" if epsilon is None else f"{epsilon:.4g} (delta {delta:g})"
    return f"differential privacy ({mechanism}) of {whom}: epsilon {bound}"


def privacy_words(scenario: Scenario, epsilon: float | None) -> str:
    """What is promised of all rounds."""
    asked = scenario.privacy
    unit = unit_of(asked)
    words = "data stay at the clients; no differential privacy, epsilon is not bounded"
    if unit is not None:
        words = promised(asked.mechanism, unit, epsilon, asked.delta)
        if asked.budget is not None and (epsilon is None or epsilon > asked.budget):
            words += f", but the budget of {asked.budget:g} stops the run before"
    if asked.secure_aggregation != "none":
        words += f"; secure aggregation ({asked.secure_aggregation})"
    return words


def privacy_lines(summary: Mapping[str, Any]) -> list[str]:
    """What was promised and spent."""
    facts = summary.get("privacy")
    if facts is None:
        return []
    lines = []
    if facts["unit"] is not None:
        spent = facts["epsilon"], facts["delta"]
        lines.append(f"{promised(facts['mechanism'], facts['unit'], *spent)}.")
    if (secure := facts["secure_aggregation"]) is not None:
        how = "Sums were made under masks"
        if secure["protocol"] == "arithmetic":
            how = "Sums were made as under masks, but without any"
        lines.append(
            f"{how} ({secure['protocol']}): {secure['dropouts']} dropouts, "
            f"{secure['aborted_rounds']} rounds given up."
        )
    return lines


def privacy_card(
    federation: Federation, folder: Path, state: ServerState, progress: Progress
) -> dict[str, Any]:
    """``epsilon`` and ``privacy`` of the summary.

    Args:
        folder: the run's.
        state, progress: after the last round.
    """
    promise, section = federation.promise, federation.scenario.privacy
    if promise is None and section.secure_aggregation == "none":
        return {"epsilon": None, "privacy": None}
    plan = _first_plan(federation)
    entries = Ledger(folder / LEDGER).entries
    epsilon = None if promise is None else promise.epsilon(entries)
    facts: dict[str, Any] = {
        "mechanism": section.mechanism,
        "epsilon": epsilon,
        "epsilon_against_server": None if promise is None else promise.against_server(entries),
        "releases": sum(entry.count for entry in entries),
        **_of_promise(promise),
        "final_clip": None if promise is None else float(state.slots.get(CLIP, [promise.clip])[0]),
        "noise_source": None,
        "noise_at": None,
        "assumptions": list(_assumptions(federation)),
        "secure_aggregation": _secure(federation, plan, progress),
        "min_class_examples": section.min_class_examples,
        "canaries": section.canaries,
        "leaves": _leaves(federation, state, plan),
    }
    if promise is not None and promise.noise_multiplier:
        facts["noise_source"] = SEEDED if federation.noise == "seeded" else SYSTEM
        facts["noise_at"] = _place(federation)
    return {"epsilon": epsilon, "privacy": facts}


def _of_promise(promise: Promise | None) -> dict[str, Any]:
    names = ("unit", "delta", "noise_multiplier", "clip", "accountant", "sampling", "rate")
    return {name: None if promise is None else getattr(promise, name) for name in names}


def _place(federation: Federation) -> str:
    """Where noise is added."""
    own = federation.scenario.privacy
    at_clients = own.mechanism in ("local", "example") or own.secure_aggregation != "none"
    return "clients" if at_clients else "server"


def _assumptions(federation: Federation) -> Iterator[str]:
    promise, section = federation.promise, federation.scenario.privacy
    masked = section.secure_aggregation in ("secagg", "secagg_plus")
    if promise is not None:
        yield from promise.assumptions
        if promise.sampling in ("poisson", "fixed"):
            yield FOLDER
        if promise.banded:
            yield PAST_NOISE
        if promise.noise_multiplier and federation.noise == "seeded":
            yield SEEDED_NOISE
        if promise.noise_multiplier and section.secure_aggregation != "none":
            yield ROUNDED
    if section.secure_aggregation == "arithmetic":
        yield ARITHMETIC
    if masked and federation.noise == "seeded":
        yield SIMULATED_MASKS


def _secure(federation: Federation, plan: RoundPlan, progress: Progress) -> dict[str, Any] | None:
    """How sums were made in secret; thresholds and the like are those of the first round."""
    scenario = federation.scenario
    ring, section = secure_ring(scenario, federation.roster.train), scenario.privacy
    if ring is None or federation.secure is None or plan.protection is None:
        return None
    asked = len(plan.clients)
    neighbours, threshold = asked_neighbours(section, asked), ring.least(asked)
    if section.secure_aggregation == "secagg":
        neighbours, threshold = max(0, asked - 1), max(threshold, asked // 2 + 1)
    return {
        "protocol": section.secure_aggregation,
        "threshold": threshold,
        "neighbours": neighbours,
        "ring_bits": plan.protection.ring_bits,
        "scale": plan.protection.scale,
        "dropouts": progress.dropouts,
        "aborted_rounds": progress.aborted,
    }


def _first_plan(federation: Federation) -> RoundPlan:
    roster, strategy = federation.roster, federation.strategy
    state = strategy.init(federation.head, roster.num_clients)
    return plan_round(federation.scenario, roster.num_clients, strategy, state, 1)


def _leaves(federation: Federation, state: ServerState, first: RoundPlan) -> list[dict[str, Any]]:
    """What a client answers with in the first round and, where that differs, in the last."""
    roster, scenario = federation.roster, federation.scenario
    last = plan_round(scenario, roster.num_clients, federation.strategy, state, scenario.rounds)
    tensors = {**first.reply(federation.head), **last.reply(state.head)}
    tensors["num_examples"] = ((), federation.roster.train.dtype)
    found = [
        {"tensor": name, "shape": list(shape), "dtype": dtype.name}
        for name, (shape, dtype) in tensors.items()
    ]
    if first.protection is None:
        found.append({"tensor": "loss", "shape": [], "dtype": "float64"})
    return found

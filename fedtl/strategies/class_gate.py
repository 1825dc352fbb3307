"""What the least examples per class (``privacy.min_class_examples``) kept at the clients."""

from __future__ import annotations

from fedtl.errors import PolicyStop
from fedtl.scenario.schema import Scenario
from fedtl.strategies.base import ServerState
from fedtl.strategies.closed_form import class_counts
from fedtl.types import Roster


def kept_back(scenario: Scenario, roster: Roster, state: ServerState) -> list[str]:
    """How much of the data stayed out of the statistics, a line, after they were summed.

    Neither classes nor clients are named. Of statistics under differential privacy the number is
    not told: it has no noise.

    Raises:
        PolicyStop: nothing is left.
    """
    least, slots = scenario.privacy.min_class_examples, dict(state.slots)
    if least <= 1 or "reported" not in slots or not slots["reported"].any():
        return []
    fewer = f"classes of which a client has fewer than {least} examples stayed at that client"
    if scenario.privacy.mechanism != "none":
        return [f"{fewer}; how many examples that were is not told, as no noise covers it"]
    declared = int(roster.train[slots["reported"] > 0].sum())
    held = int(class_counts(slots).sum())
    if not held:
        raise PolicyStop(
            f"no client has {least} examples of any class, so there is no head",
            where="privacy.min_class_examples",
            got=str(least),
            do="Lower it, or ask clients with more data",
        )
    return [f"{fewer}: {declared - held} of {declared} examples are not in the head"]

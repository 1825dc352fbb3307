"""What a private run says on the terminal, and what it suggests to type next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedtl.listings import print_seeds
from fedtl.privacy_card import privacy_lines, privacy_words
from fedtl.scenario.schema import Scenario
from fedtl.terminal import HEADS, comparison_table, next_commands


def scenario(**privacy: object) -> Scenario:
    return Scenario.model_validate({"name": "made", "privacy": privacy})


def test_a_private_run_is_to_be_audited_next() -> None:
    own = scenario(mechanism="example", epsilon=4.0)
    told = next_commands(own, "made --engine ray --set rounds=2", Path("runs/made"))
    assert any(line.startswith("fedtl audit runs/made ") for line in told)
    plan = next(line for line in told if line.startswith("fedtl privacy"))
    assert plan.startswith("fedtl privacy made --set rounds=2  #")  # which takes no engine
    plain = next_commands(Scenario(name="made"), "made", Path("runs/made"))
    assert not any("audit" in line for line in plain)


def test_a_long_command_moves_no_other_explanation() -> None:
    told = next_commands(scenario(mechanism="example", epsilon=4.0), "m" * 90, Path("made"))
    assert max(len(line) for line in told if "mmm" not in line) < 80


def test_a_budget_below_the_promise_is_told() -> None:
    own = scenario(mechanism="central", epsilon=8.0, budget=4.0)
    assert "the budget of 4 stops the run before" in privacy_words(own, 7.9)
    assert "budget" not in privacy_words(own, 3.9)


def test_arithmetic_alone_is_no_mask() -> None:
    sums = {"protocol": "arithmetic", "dropouts": 0, "aborted_rounds": 0}
    (line,) = privacy_lines({"privacy": {"unit": None, "secure_aggregation": sums}})
    assert "without any" in line
    (line,) = privacy_lines(
        {"privacy": {"unit": None, "secure_aggregation": {**sums, "protocol": "secagg"}}}
    )
    assert "under masks" in line


def told(kept: bool, seed: int) -> dict[str, Any]:
    """A summary; where clients keep a part of the head its final figures are the clients' own."""
    final = {"accuracy": 0.5, "accuracy_everyone": 0.4, "worst_decile_accuracy": 0.1, "spread": 0.2}
    own = final if kept else {**final, "accuracy": 0.6}
    return {"seed": seed, "final": dict(final), "personal": own, "references": {"start": final}}


@pytest.mark.parametrize("kept", [True, False])
def test_no_head_is_shown_under_two_names(kept: bool) -> None:
    console = Console(record=True, width=120)
    print_seeds(console, [told(kept, 1), told(kept, 2)])
    console.print(comparison_table(told(kept, 1)))
    shown = console.export_text()
    assert shown.count("\nfederated ") == (0 if kept else 2)
    for name in ("personal", "start"):
        assert shown.count(f"\n{HEADS[name]} ") == 2

"""What low-rank and other modules cannot be together with, each told by name."""

from __future__ import annotations

from typing import Any

import pytest

from fedtl.scenario.lora_rules import LORA_RULES
from fedtl.scenario.schema import Scenario


def problems(**tables: Any) -> dict[str, str]:
    asked = Scenario.model_validate({"name": "rules", **tables})
    return {problem.where: problem.line() for rule in LORA_RULES for problem in rule(asked)}


LORA, FLORA = {"mode": "lora"}, {"mode": "lora", "aggregation": "flora"}


@pytest.mark.parametrize(
    ("where", "says", "tables"),
    [
        ("transfer.cut", "there is nothing", {"transfer": {"mode": "bitfit", "cut": 0}}),
        ("transfer.batch_norm", "pretrained", {"transfer": {**LORA, "batch_norm": "local"}}),
        (
            "transfer.activations", "join the tokens",
            {"transfer": {"mode": "prompt", "activations": "recompute"}},
        ),
        ("transfer.rank", 'mode = "lora"', {"transfer": {"rank": 4}}),
        ("transfer.aggregation", "no use", {"transfer": {"aggregation": "ffa", "mode": "bitfit"}}),
        ("transfer.targets", "no use", {"transfer": {"targets": ["x"], "mode": "full"}}),
        ("transfer.width", '"adapter"', {"transfer": {**LORA, "width": 4}}),
        (
            "transfer.aggregation", "combines the factors",
            {"transfer": FLORA, "strategy": {"name": "fedadam"}},
        ),
        (
            "privacy.secure_aggregation", "each client's own",
            {"transfer": FLORA, "privacy": {"secure_aggregation": "secagg"}},
        ),
        (
            "privacy.mechanism", "multiplied",
            {"transfer": FLORA, "privacy": {"mechanism": "central", "noise_multiplier": 1.0}},
        ),
        (
            "transfer.rate_factor", "diverge",
            {"transfer": {**LORA, "rate_factor": 20.0}, "strategy": {"name": "scaffold"}},
        ),
        (
            "compression.kind", "exact without",
            {"transfer": FLORA, "compression": {"kind": "int8"}},
        ),
    ],
)  # fmt: skip
def test_refused(where: str, says: str, tables: dict[str, Any]) -> None:
    found = problems(**tables)
    assert says in found[where], found


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"transfer": {**LORA, "rank": 4, "targets": ["conv"], "cut": "layer4"}},
        {"transfer": FLORA, "strategy": {"name": "fedprox"}},
        {"transfer": {**LORA, "aggregation": "ffa"}, "strategy": {"name": "fedadam"}},
        {"transfer": {"mode": "adapter", "width": 4, "targets": ["conv"]}},
        {"transfer": {"mode": "prompt", "width": 4}},
        {"transfer": LORA, "strategy": {"name": "scaffold"}},
        {"transfer": {"mode": "last_blocks", "batch_norm": "local"}},
    ],
)
def test_allowed(tables: dict[str, Any]) -> None:
    assert problems(**tables) == {}

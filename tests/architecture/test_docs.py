"""The page on strategies names every one, and what it says to type is understood."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fedtl.scenario.load import load_scenario, strategy_names
from fedtl.strategies import STRATEGIES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "strategies.md").read_text()
COMMANDS = re.findall(r"^ *uv run (fedtl run .*)$", PAGE, re.M)


@pytest.mark.parametrize("name", strategy_names())
def test_every_strategy_is_there_and_on_the_page(name: str) -> None:
    assert name in STRATEGIES
    assert f"`{name}`" in PAGE


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_page_says_to_type_is_a_scenario(command: str) -> None:
    _, _, name, *options = shlex.split(command)
    assert set(options[::2]) == {"--set"}
    load_scenario(name, options[1::2])


def test_the_page_says_what_to_type() -> None:
    assert len(COMMANDS) >= 5

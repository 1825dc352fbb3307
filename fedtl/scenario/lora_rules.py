"""What cannot go together with low-rank and other modules behind the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario

LORA_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = ()

"""What cannot go together with how many examples there are: views and few shots."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario

EXAMPLE_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = ()

"""What cannot go together with tables, series and sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario

TABLE_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = ()

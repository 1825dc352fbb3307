"""What cannot go together with the head and with how it is regularised."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario

HEAD_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = ()

"""What cannot go together with the head and how it is regularised (``scenario.head``, ``scenario.training``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario

HEAD_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = ()

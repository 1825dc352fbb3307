"""What cannot go together with the cut and with what is trained behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario

TRANSFER_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = ()

"""What cannot go together with texts and the trunks that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario

TEXT_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = ()

"""What cannot go together with where the network is cut and what is trained behind the cut (``scenario.transfer``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario

TRANSFER_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = ()

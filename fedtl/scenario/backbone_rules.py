"""What cannot go together with where a trunk comes from (``scenario.backbone``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario

BACKBONE_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = ()

"""Whether ``gap.json`` holds what a run's page reads of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, FiniteFloat, ValidationError, model_validator


class _Kind(BaseModel):
    """What the page tells of a measure."""

    title: str
    range: str
    made_from: str


class _Check(BaseModel):
    """One thing noticed about the input."""

    severity: str
    what: str
    change: str
    gain: FiniteFloat | None
    gain_note: str | None


class _Figures(BaseModel):
    """What a page reads of ``gap.json``."""

    clients: list[str]
    kinds: dict[str, _Kind] | None = None
    pairs: dict[str, list[list[FiniteFloat | None]] | None] | None = None
    rest: dict[str, list[FiniteFloat | None] | None] | None = None
    checks: list[_Check] = []

    @model_validator(mode="after")
    def _fit(self) -> _Figures:
        pairs = [matrix for matrix in (self.pairs or {}).values() if matrix is not None]
        rest = [row for row in (self.rest or {}).values() if row is not None]
        sizes = [len(matrix) for matrix in pairs]
        sizes += [len(row) for row in [*rest, *(row for matrix in pairs for row in matrix)]]
        if any(size != len(self.clients) for size in sizes):
            raise ValueError("not a figure for every client")
        return self


def is_whole(content: Mapping[str, Any]) -> bool:
    """Whether clients, measures and findings have the right kinds, a figure for every client."""
    try:
        _Figures.model_validate(content)
    except ValidationError:
        return False
    return True

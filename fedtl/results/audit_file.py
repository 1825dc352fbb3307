"""What a run's page reads of ``audit.json``, and whether it is all there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

AUDIT = "audit.json"

FORMAT = 1
"""Of ``audit.json``; one of another format is as if it were not there."""


class _Lower(BaseModel):
    epsilon: FiniteFloat | None
    confidence: FiniteFloat | None = None
    method: str
    canaries: int | None = None
    guesses: int | None = None
    correct: int | None = None
    note: str | None = None


class _Attack(BaseModel):
    attack: str
    auc: FiniteFloat | None
    low: FiniteFloat | None = Field(alias="tpr_at_0.1%")
    high: FiniteFloat | None = Field(alias="tpr_at_1%")
    members: int
    nonmembers: int
    note: str | None = None


class _Leak(BaseModel):
    what: str
    clients: int | None = None
    found: str | FiniteFloat | None
    note: str | None = None


class _Audit(BaseModel):
    upper: FiniteFloat | None
    lower: _Lower | None
    membership: list[_Attack]
    leakage: list[_Leak]
    warnings: list[str] = []
    notes: list[str] = []


def is_whole(content: Mapping[str, Any]) -> bool:
    """Whether bound, attacks and leaks have the right kinds."""
    try:
        _Audit.model_validate(content)
    except ValidationError:
        return False
    return True

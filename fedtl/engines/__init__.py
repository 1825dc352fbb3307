"""Engines by the name a scenario gives them."""

from __future__ import annotations

from fedtl.engines.base import Engine
from fedtl.engines.local import LocalEngine

__all__ = ["Engine", "LocalEngine"]

"""Where clients live. The table of engines by name is in ``build.py``, which can make them all."""

from __future__ import annotations

from fedtl.engines.base import Engine
from fedtl.engines.local import LocalEngine

__all__ = ["Engine", "LocalEngine"]

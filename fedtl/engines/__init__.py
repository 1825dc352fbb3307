"""Where clients live. The table of engines by name is in ``build.py``, which can make them all.

The engines on Ray and Flower are imported where they are made: their packages take a second.
"""

from __future__ import annotations

import os

from fedtl.engines.base import Engine
from fedtl.engines.local import LocalEngine

# Flower reads these when it is imported, and so do the processes that we start.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

__all__ = ["Engine", "LocalEngine"]

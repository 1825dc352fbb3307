"""fedtl: federated transfer learning, in simulation and for real.

The command line is ``fedtl`` (see ``fedtl --help``); a scenario in TOML says what to run. From
Python: ``fedtl.run(scenario)`` and ``fedtl.load(run)``, see ``fedtl.api``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtl.api import Run, load, run

__all__ = ["Run", "load", "run"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are used: ``import fedtl`` alone is quick."""
    if name in __all__:
        from fedtl import api

        return getattr(api, name)
    raise AttributeError(f"module 'fedtl' has no attribute {name!r}")

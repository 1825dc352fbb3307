"""A client: ``python client.py start ...`` at a site that holds data, or Flower's ClientApp.

The ClientApp hosts simulated clients only. At a real site nothing that a server sends is run: the
resident process of ``fedtl client start`` answers requests itself.
"""

from __future__ import annotations

import sys

from fedtl.engines.flower_client import app

__all__ = ["app", "main"]


def main() -> None:
    """``python client.py ...`` is ``fedtl client ...``."""
    from fedtl.cli import run_command

    sys.exit(run_command(["client", *sys.argv[1:]]))


if __name__ == "__main__":
    main()

"""The server: ``python server.py run SCENARIO`` for real clients, or Flower's ServerApp.

With Flower's own tools (``flwr run .``) the scenario is named in the run configuration and its
clients are simulated; the result is that of ``fedtl run``, to the last bit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import fedtl.engines  # noqa: F401  before Flower's import: switches its telemetry off

# isort: split
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def simulate(grid: Grid, context: Context) -> None:
    """Run the scenario of the run configuration on the nodes of Flower's simulation."""
    from rich.console import Console

    from fedtl.engines.flower_simulation import given
    from fedtl.interrupts import Interrupts
    from fedtl.scenario.load import load_scenario
    from fedtl.simulation import new_run_path, run_scenario
    from fedtl.terminal import Terminal

    scenario = load_scenario(str(context.run_config["scenario"]), engine="flower")
    out = str(context.run_config["out"])
    path = Path(out) if out else new_run_path(scenario)
    with given(grid), Interrupts() as interrupts, Terminal(Console(width=120)) as terminal:
        summary = run_scenario(scenario, path, terminal, interrupts)
    print(f"head_sha256 {summary['head_sha256']}")


def main() -> None:
    """``python server.py ...`` is ``fedtl server ...``."""
    from fedtl.cli import run_command

    sys.exit(run_command(["server", *sys.argv[1:]]))


if __name__ == "__main__":
    main()

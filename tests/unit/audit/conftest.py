"""Small runs to be audited: many features, few rows, so that a head remembers them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedtl.audit import audit_run, shadows
from fedtl.interrupts import Interrupts
from fedtl.parity import Quiet
from fedtl.scenario.load import load_scenario
from fedtl.simulation import run_scenario

SCENARIO = """name = "remembers"
seed = 3
rounds = 3
[data]
source = "arrays"
path = "data.npz"
[clients]
num = 6
[backbone]
name = "identity"
[training]
local_epochs = 2
batch_size = 16
learning_rate = 0.05
[evaluation]
references = []
"""


@pytest.fixture(scope="session", autouse=True)
def _few_shadows() -> Iterator[None]:
    """Two pairs of shadow federations are enough to see that they are trained and used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shadows, "TRAINED_MOST", 4)
        patch.setattr(shadows, "SOLVED_MOST", 16)
        patch.setattr(shadows, "SOLVED_FEWEST", 16)
        yield


Audited = tuple[dict[str, Any], dict[str, Any], str]


@pytest.fixture(scope="session")
def remembering(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenario's file, with its data beside it."""
    place = tmp_path_factory.mktemp("remembering")
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 360)
    x = rng.normal(size=(360, 200)).astype(np.float32)
    x[np.arange(360), y] += 2
    np.savez(place / "data.npz", x=x, y=y)
    path = place / "remembers.toml"
    path.write_text(SCENARIO)
    return path


@pytest.fixture(scope="session")
def make_run(
    remembering: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Runs the scenario with some keys set: the run's folder and its summary."""

    def make(*settings: str) -> tuple[Path, dict[str, Any]]:
        path = tmp_path_factory.mktemp("runs") / "run"
        scenario = load_scenario(str(remembering), settings)
        return path, run_scenario(scenario, path, Quiet(lambda note: None), Interrupts())

    return make


@pytest.fixture(scope="session")
def audited(make_run: Callable[..., tuple[Path, dict[str, Any]]]) -> Callable[..., Audited]:
    """The same and its audit: summary, what ``audit.json`` holds, what was printed."""

    def audit(*settings: str) -> Audited:
        path, summary = make_run(*settings)
        console = Console(width=200, record=True, file=io.StringIO())
        facts = audit_run(path, console, Interrupts())
        assert json.loads((path / "audit.json").read_text()) == facts
        return summary, facts, console.export_text()

    return audit

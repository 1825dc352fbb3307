"""Run folders for tests of what is made from them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def made_runs() -> ModuleType:
    """The module ``tests/made_runs.py``."""
    path = Path(__file__).parents[1] / "made_runs.py"
    spec = importlib.util.spec_from_file_location("made_runs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def made(made_runs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with references, gaps and hostile names; not to be changed."""
    return made_runs.write_run(tmp_path_factory.mktemp("made") / "run")

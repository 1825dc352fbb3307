"""What tests share: small federations, real data where present, a feature store of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from fedtl.types import ClientUpdates, Population, Rows

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

SCENARIO = """name = "small"
seed = 3
rounds = 4
[data]
source = "arrays"
path = "small.npz"
[clients]
num = 5
fraction = 0.6
[backbone]
name = "identity"
[training]
local_epochs = 1
batch_size = 8
[strategy]
name = "fedavgm"
[evaluation]
references = []
"""


@pytest.fixture(scope="session", autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests never touch the user's feature store; one store serves the whole session."""
    os.environ["FEDTL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("FEDTL_FAIL", None)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """A file of the real data folder, or a skip that says what is missing."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"real data not here: {name}")
        return path

    return find


@pytest.fixture(scope="session")
def make_population() -> Callable[[], Population]:
    """Makes the population below, for fixtures that serve more than one test."""
    return _population


@pytest.fixture
def population() -> Population:
    """Five ragged clients, three classes that a linear head can mostly tell apart."""
    return _population()


def _population() -> Population:
    rng = np.random.default_rng(0)
    counts, tests = [30, 7, 55, 12, 20], [8, 3, 10, 4, 5]
    total = sum(counts) + sum(tests)
    labels = rng.integers(0, 3, total).astype(np.int32)
    features = rng.normal(size=(total, 9)).astype(np.float32)
    features[np.arange(total), labels] += 2
    ends = np.cumsum([0, *counts]).astype(np.int64)
    test_ends = np.cumsum([0, *tests]).astype(np.int64)
    return Population(
        features,
        labels,
        ("a", "b", "c"),
        Rows(np.arange(sum(counts), dtype=np.int64), ends),
        Rows(np.arange(sum(counts), total, dtype=np.int64), test_ends),
        tuple(f"client-{i}" for i in range(5)),
        ("x", "x", "x", "y", "y"),
    )


@pytest.fixture
def descendants() -> Callable[[int], dict[int, str]]:
    """Tells the processes below one: process id -> command line."""

    def find(parent: int) -> dict[int, str]:
        found: dict[int, str] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[1]) == parent and fields[0] != "Z":
                found |= {int(entry.name): line, **find(int(entry.name))}
        return found

    return find


@pytest.fixture
def updates() -> Callable[..., ClientUpdates]:
    """A maker of updates: round, client ids, one [k, ...] array per tensor."""

    def make(
        tensors: Mapping[str, np.ndarray],
        *,
        clients: list[int] | None = None,
        examples: list[int] | None = None,
        round: int = 1,
    ) -> ClientUpdates:
        size = len(next(iter(tensors.values())))
        return ClientUpdates(
            round,
            np.array(clients if clients is not None else range(size), np.int64),
            {name: np.asarray(t, np.float32) for name, t in tensors.items()},
            np.array(examples or [10] * size, np.int64),
            np.ones(size),
        )

    return make


@pytest.fixture
def fedtl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line in this process, called in the test's own folder: quick."""
    from fedtl.cli import run_command

    def call(
        *arguments: str, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            for name, value in {"NO_COLOR": "1", "COLUMNS": "120", **(env or {})}.items():
                patch.setenv(name, value)
            capfd.readouterr()
            code = run_command(list(arguments))
            out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, out, err)

    return call


@pytest.fixture
def fedtl_process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line as a process of its own, for what a process must die of."""

    def call(
        *arguments: str, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedtl.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=tmp_path,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **(env or {})},
        )

    return call


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small federation on disk, as a user has one: features in an .npz, a scenario beside it."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    x[np.arange(200), y] += 2
    np.savez(tmp_path / "small.npz", x=x, y=y)
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO)
    return path

"""``fedtl audit`` on what it cannot audit: one error, with what to do, and exit code 2."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(fedtl: Call, small: Path) -> Path:
    """A finished run."""
    assert fedtl("run", "small.toml", "--out", "run").returncode == 0
    return small.parent / "run"


def refused(found: subprocess.CompletedProcess[str], *words: str) -> None:
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stdout + found.stderr
    told = " ".join(found.stderr.split())
    for word in words:
        assert word in told


def test_a_run_is_audited_out_of_the_box(fedtl: Call, run: Path) -> None:
    found = fedtl("audit", "run")
    assert found.returncode == 0, found.stderr
    assert "promised" in found.stdout
    assert json.loads((run / "audit.json").read_text())["format"] == 1
    as_json = fedtl("audit", "run", "--json")
    assert (
        json.loads(as_json.stdout)["lower"] == json.loads((run / "audit.json").read_text())["lower"]
    )


def test_no_run(fedtl: Call) -> None:
    refused(fedtl("audit", "nowhere"), "not a run folder")


def test_runs_of_several_seeds(fedtl: Call, run: Path) -> None:
    (run.parent / "seeds").mkdir()
    run.rename(run.parent / "seeds" / "seed-1")
    refused(fedtl("audit", "seeds"), "seed-1", "fedtl audit seeds/seed-1")


def test_an_unfinished_run(fedtl: Call, run: Path) -> None:
    (run / "summary.json").unlink()
    refused(fedtl("audit", "run"), "not finished", "fedtl resume")


def test_a_run_with_real_clients(fedtl: Call, run: Path) -> None:
    (run / "party.json").write_text("{}")
    refused(fedtl("audit", "run"), "real clients", "simulation")


def test_data_that_are_gone_or_others(fedtl: Call, run: Path) -> None:
    data = run.parent / "small.npz"
    data.write_bytes(data.read_bytes()[:-100])
    refused(fedtl("audit", "run"))
    data.unlink()
    refused(fedtl("audit", "run"))
    assert not (run / "audit.json").exists()


def test_a_damaged_head(fedtl: Call, run: Path) -> None:
    (run / "head.safetensors").write_bytes(b"\0" * 40)
    refused(fedtl("audit", "run"), "head", "damaged")


def test_a_damaged_audit_is_written_anew(fedtl: Call, run: Path) -> None:
    (run / "audit.json").write_text("{")
    assert fedtl("audit", "run").returncode == 0
    assert json.loads((run / "audit.json").read_text())["format"] == 1


def test_more_canaries_than_examples(fedtl: Call, small: Path) -> None:
    refused(fedtl("run", str(small), "--set", "privacy.canaries=100000"), "canaries", "at most")

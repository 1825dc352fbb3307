"""Killed at any point and resumed, a run ends with the head of the unbroken one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

PLACES = ["after_train", "after_aggregate", "before_commit", "before_manifest", "after_commit"]
ENDING = ["before_local_only", "before_centralised", "before_summary"]


@pytest.fixture
def unbroken(fedtl, small: Path, tmp_path: Path) -> dict:
    done = fedtl("run", str(small), "--out", str(tmp_path / "whole"), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def leftovers(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*") if p.name.endswith((".tmp", ".lock"))]


def assert_resumes(fedtl, run: Path, unbroken: dict) -> None:
    done = fedtl("resume", str(run), "--json")
    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout)
    for key in ("head_sha256", "final", "references", "bytes_up", "rounds_completed"):
        assert resumed[key] == unbroken[key]
    whole = pq.read_table(run.parent / "whole" / "clients.parquet")
    assert pq.read_table(run / "clients.parquet") == whole
    assert leftovers(run) == []


@pytest.mark.parametrize("place", PLACES)
def test_kill_and_resume(
    fedtl, fedtl_process, small: Path, tmp_path: Path, unbroken: dict, place: str
) -> None:
    run = tmp_path / "broken"
    killed = fedtl_process(
        "run", str(small), "--out", str(run), env={"FEDTL_FAIL": f"{place}:kill:3"}
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    assert_resumes(fedtl, run, unbroken)


@pytest.mark.parametrize("place", ENDING)
def test_kill_after_the_last_round(
    fedtl, fedtl_process, small: Path, tmp_path: Path, place: str
) -> None:
    settings = ["--set", "evaluation.references=['local_only', 'centralised']"]
    done = fedtl("run", str(small), *settings, "--out", str(tmp_path / "whole"), "--json")
    unbroken = json.loads(done.stdout)
    run = tmp_path / "broken"
    failing = {"FEDTL_FAIL": f"{place}:kill"}
    killed = fedtl_process("run", str(small), *settings, "--out", str(run), env=failing)
    assert killed.returncode == -signal.SIGKILL
    assert not (run / "summary.json").exists()
    assert_resumes(fedtl, run, unbroken)


def test_killed_twice_and_with_a_damaged_commit(
    fedtl, fedtl_process, small: Path, tmp_path: Path, unbroken: dict
) -> None:
    run = tmp_path / "broken"
    fedtl_process("run", str(small), "--out", str(run), env={"FEDTL_FAIL": "after_commit:kill:2"})
    fedtl_process("resume", str(run), env={"FEDTL_FAIL": "after_train:kill:4"})
    newest = sorted((run / "checkpoints").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert_resumes(fedtl, run, unbroken)
    assert "damaged" in (run / "events.jsonl").read_text()


@pytest.mark.parametrize(("how", "code"), [("interrupt", 130), ("terminate", 143)])
def test_signals_finish_the_round_commit_and_say_how_to_go_on(
    fedtl, fedtl_process, small: Path, tmp_path: Path, unbroken: dict, how: str, code: int
) -> None:
    run = tmp_path / "broken"
    failing = {"FEDTL_FAIL": f"after_train:{how}:2"}
    stopped = fedtl_process("run", str(small), "--out", str(run), env=failing)
    assert stopped.returncode == code
    assert "saved round 2 of 4" in stopped.stderr
    assert f"fedtl resume {run}" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert pq.read_table(run / "rounds.parquet")["round"].to_pylist() == [1, 2]
    assert_resumes(fedtl, run, unbroken)


def test_resume_of_what_is_finished_or_no_run(fedtl, unbroken: dict, tmp_path: Path) -> None:
    done = fedtl("resume", str(tmp_path / "whole"))
    assert done.returncode == 2
    assert "finished" in done.stderr
    assert fedtl("resume", str(tmp_path / "nowhere")).returncode == 2


def test_resume_with_other_data_is_refused(
    fedtl, fedtl_process, small: Path, tmp_path: Path
) -> None:
    import numpy as np

    run = tmp_path / "broken"
    fedtl_process("run", str(small), "--out", str(run), env={"FEDTL_FAIL": "after_commit:kill:2"})
    content = dict(np.load(tmp_path / "small.npz"))
    content["x"] = content["x"] + 1
    np.savez(tmp_path / "small.npz", **content)
    refused = fedtl("resume", str(run))
    assert refused.returncode == 2
    assert "data_fingerprint: was" in refused.stderr
    assert "--allow" in refused.stderr
    assert fedtl("resume", str(run), "--allow").returncode == 0

"""Killing the driver or a worker on the engines with processes of their own: nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def unbroken(fedtl, small: Path, tmp_path: Path) -> dict:
    done = fedtl("run", str(small), "--out", str(tmp_path / "whole"), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def processes_of(place: Path) -> list[str]:
    """Command lines of processes that still work in a test's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if os.readlink(entry / "cwd").startswith(str(place)):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


def assert_nobody_is_left(place: Path) -> None:
    end = time.monotonic() + 60
    while (left := processes_of(place)) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []


def assert_resumes(fedtl, run: Path, unbroken: dict) -> None:
    done = fedtl("resume", str(run), "--json")
    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout)
    for key in ("head_sha256", "final", "bytes_up", "batches_blake2b"):
        assert resumed[key] == unbroken[key]


@pytest.mark.parametrize(
    ("engine", "place"), [("ray", "after_train"), ("flower", "before_manifest")]
)
def test_the_driver_is_killed(
    fedtl, fedtl_process, small: Path, tmp_path: Path, unbroken: dict, engine: str, place: str
) -> None:
    run = tmp_path / "broken"
    killed = fedtl_process(
        "run", str(small), "--engine", engine, "--out", str(run),
        env={"FEDTL_FAIL": f"{place}:kill:3"},
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (run / "summary.json").exists()
    assert_nobody_is_left(tmp_path)
    assert_resumes(fedtl, run, unbroken)


@pytest.mark.parametrize(
    ("engine", "place"), [("ray", "client_before_train"), ("flower", "client_after_train")]
)
def test_a_worker_is_killed_and_its_work_done_again(
    fedtl_process, small: Path, tmp_path: Path, unbroken: dict, engine: str, place: str
) -> None:
    failing = {"FEDTL_FAIL": f"{place}:kill:2:once={tmp_path / 'died'}"}
    done = fedtl_process(
        "run", str(small), "--engine", engine, "--out", str(tmp_path / "run"), "--json",
        env=failing,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "died").exists()
    summary = json.loads(done.stdout)
    assert summary["head_sha256"] == unbroken["head_sha256"]
    assert summary["engine"] == engine
    assert_nobody_is_left(tmp_path)


@pytest.mark.parametrize("engine", ["ray", "flower"])
def test_workers_that_keep_dying_end_the_run_resumably(
    fedtl, fedtl_process, small: Path, tmp_path: Path, unbroken: dict, engine: str
) -> None:
    run = tmp_path / "broken"
    done = fedtl_process(
        "run", str(small), "--engine", engine, "--out", str(run),
        env={"FEDTL_FAIL": "client_before_train:kill:3"},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "fedtl resume" in done.stderr
    assert_nobody_is_left(tmp_path)
    assert_resumes(fedtl, run, unbroken)


@pytest.mark.parametrize(
    ("engine", "how", "code"), [("ray", "interrupt", 130), ("flower", "terminate", 143)]
)
def test_signals_finish_the_commit(
    fedtl, fedtl_process, small: Path, tmp_path: Path, unbroken: dict, engine: str, how: str,
    code: int,
) -> None:  # fmt: skip
    run = tmp_path / "broken"
    done = fedtl_process(
        "run", str(small), "--engine", engine, "--out", str(run),
        env={"FEDTL_FAIL": f"before_commit:{how}:2"},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert (run / "checkpoints" / "round-000002.json").exists()
    assert_nobody_is_left(tmp_path)
    assert_resumes(fedtl, run, unbroken)

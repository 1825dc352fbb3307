"""Ray's processes die, or a signal comes, in the middle of a round: nothing hangs or is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Found = dict[int, str]


@pytest.fixture
def unbroken(fedtl, small: Path, tmp_path: Path) -> dict:
    done = fedtl("run", str(small), "--out", str(tmp_path / "whole"), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def stopped_run(
    small: Path, tmp_path: Path, descendants: Callable[[int], Found]
) -> Iterator[tuple[subprocess.Popen[str], Found]]:
    """A run on two Ray workers, one of which stands still in round 2; and all its processes."""
    marker = tmp_path / "stands"
    command = [sys.executable, "-m", "fedtl.cli", "run", str(small), "--engine", "ray"]
    with subprocess.Popen(
        [*command, "--set", "engine.num_cpus=2", "--out", str(tmp_path / "broken")],
        env={
            **os.environ, "NO_COLOR": "1",
            "FEDTL_FAIL": f"client_before_train:stop:2:once={marker}",
        },
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,  # a process group of its own, as a shell gives it one
    ) as process:  # fmt: skip
        wait_for(lambda: marker.exists() or process.poll() is not None, 120)
        below = descendants(process.pid)
        try:
            yield process, below
        finally:
            for pid in [process.pid, *below]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def wait_for(happened: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def called(below: Found, name: str) -> list[int]:
    """Process ids by the name of their program."""
    return [pid for pid, line in below.items() if line.split(" ")[0].endswith(name)]


def ended(process: subprocess.Popen[str], below: Found) -> tuple[str, str]:
    """What a process wrote until its end, which must come, as that of all below it."""
    out, err = process.communicate(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), 20)
    assert "Traceback" not in out + err
    return out, err


def temporary() -> set[Path]:
    return {*Path(tempfile.gettempdir()).glob("fedtl-run-*"), *Path("/tmp").glob("fedtl-run-*")}


def assert_resumes(fedtl, run: Path, unbroken: dict) -> None:
    done = fedtl("resume", str(run), "--json")
    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout)
    for key in ("head_sha256", "final", "bytes_up", "batches_blake2b"):
        assert resumed[key] == unbroken[key]
    assert resumed["engine"] == "ray"


@pytest.mark.parametrize(("part", "name"), [("raylet", "/raylet"), ("head", "/gcs_server")])
def test_ray_dies_in_mid_round(
    fedtl, stopped_run, tmp_path: Path, unbroken: dict, part: str, name: str
) -> None:
    process, below = stopped_run
    (victim,) = called(below, name)
    mine = {place for place in temporary() if str(place) in " ".join(below.values())}
    assert mine
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    out, err = ended(process, below)
    assert time.monotonic() - began < 30
    assert process.returncode == 3, out + err
    assert f"Ray's {part} died; the last commit is kept" in err
    assert "fedtl resume" in err
    assert "ray::" not in out + err
    assert not mine & temporary()
    # with fewer workers than it began with
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert_resumes(fedtl, tmp_path / "broken", unbroken)
    finally:
        os.sched_setaffinity(0, cores)


def test_all_workers_die(fedtl, stopped_run, tmp_path: Path, unbroken: dict) -> None:
    process, below = stopped_run
    workers = called(below, "ray::Worker.train") + called(below, "ray::Worker")  # busy, idle
    assert len(workers) == 2, below
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    out, err = ended(process, below)
    assert process.returncode == 3, out + err
    assert "2 of Ray's workers died; the last commit is kept" in err
    assert_resumes(fedtl, tmp_path / "broken", unbroken)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_everybody_finishes_the_round(
    fedtl, stopped_run, tmp_path: Path, unbroken: dict, number: int, code: int
) -> None:
    process, below = stopped_run
    os.killpg(process.pid, number)  # Ctrl-C reaches the whole group, and so does ``timeout``
    time.sleep(1)
    assert process.poll() is None
    for worker in called(below, "ray::Worker.train"):
        os.kill(worker, signal.SIGCONT)
    out, err = ended(process, below)
    assert process.returncode == code, out + err
    assert "saved round 2 of 4" in err
    assert (tmp_path / "broken" / "checkpoints" / "round-000002.json").exists()
    assert_resumes(fedtl, tmp_path / "broken", unbroken)


def test_a_second_signal_stops_at_once(fedtl, stopped_run, tmp_path: Path, unbroken: dict) -> None:
    process, below = stopped_run
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = ended(process, below)
    assert process.returncode == 130, out + err
    assert "stopped at once" in err
    assert not (tmp_path / "broken" / "checkpoints" / "round-000002.json").exists()
    assert_resumes(fedtl, tmp_path / "broken", unbroken)


def test_the_driver_is_killed_while_a_worker_stands_still(
    fedtl, stopped_run, tmp_path: Path, unbroken: dict
) -> None:
    process, below = stopped_run
    mine = {place for place in temporary() if str(place) in " ".join(below.values())}
    os.kill(process.pid, signal.SIGKILL)
    ended(process, below)  # those below end by themselves, also the one that stands still
    assert process.returncode == -signal.SIGKILL
    assert_resumes(fedtl, tmp_path / "broken", unbroken)
    assert not mine & temporary()  # the next run has swept them away


def test_a_lost_cluster_is_told_before_the_first_round(fedtl, small: Path, tmp_path: Path) -> None:
    place = tmp_path / "run"
    settings = ["--engine", "ray", "--set", "engine.address='127.0.0.1:1'"]
    done = fedtl("run", str(small), *settings, "--out", str(place))
    assert done.returncode == 3
    assert "no Ray cluster answers" in done.stderr
    assert not place.exists()

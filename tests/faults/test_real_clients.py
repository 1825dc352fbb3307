"""Whole runs with real clients on loopback: the simulation's head, kills, resumption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from fedtl.engines.flower_processes import free_port

SCENARIO = """name = "real"
seed = 3
rounds = 3
[data]
source = "arrays"
path = "all.npz"
[clients]
partition = "natural"
[backbone]
name = "identity"
[training]
local_epochs = 1
batch_size = 8
[strategy]
name = "fedavgm"
[evaluation]
references = []
[engine]
deadline_seconds = 60
"""

NAMES = ("site-a", "site-b")
Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each site's data, all of them together for the simulation, and a scenario."""
    folder = tmp_path_factory.mktemp("sites")
    rng = np.random.default_rng(0)
    parts = []
    for name, count in zip(NAMES, (90, 60), strict=True):
        y = rng.integers(0, 3, count)
        x = rng.normal(size=(count, 6)).astype(np.float32)
        x[np.arange(count), y] += 2
        labels = np.array(["cat", "dog", "owl"])[y]
        np.savez(folder / f"{name}.npz", x=x, y=labels)
        parts.append((x, labels, np.array([name] * count)))
    x, y, client = (np.concatenate(column) for column in zip(*parts, strict=True))
    np.savez(folder / "all.npz", x=x, y=y, client=client)
    (folder / "real.toml").write_text(SCENARIO)
    return folder


@pytest.fixture(scope="module")
def call(place: Path) -> Call:
    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedtl.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=place,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120", **env},
        )

    return run


@pytest.fixture(scope="module")
def simulated(call: Call) -> str:
    """The head of the same scenario in one process."""
    done = call("run", "real.toml", "--out", "simulated", "--json")
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["head_sha256"])


@pytest.fixture(scope="module")
def federation(call: Call) -> None:
    made = call("server", "init", "--address", f"127.0.0.1:{free_port()}")
    assert made.returncode == 0, made.stderr
    for name in NAMES:
        assert call("client", "keys", "--name", name).returncode == 0
        assert call("server", "approve", f"{name}.pub").returncode == 0


@pytest.fixture(scope="module")
def clients(place: Path, federation: None) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Both clients, started before any server."""
    started = [start(place, name) for name in NAMES]
    yield started
    for process in started:
        process.kill()
        process.wait()


def start(place: Path, name: str) -> subprocess.Popen[bytes]:
    arguments = ("--join", "federation/join.toml", "--name", name, "--data", f"{name}.npz")
    with open(place / f"{name}.out", "ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "fedtl.cli", "client", "start", *arguments],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=place,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120"},
        )


def superlinks(place: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(place / "federation").encode() in (process / "cmdline").read_bytes():
                found.append(process.name)
    return found


def test_a_run_with_real_clients_is_the_simulation(
    call: Call, place: Path, simulated: str, clients: list[subprocess.Popen[bytes]]
) -> None:
    done = call("server", "run", "real.toml", "--out", "first", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["head_sha256"] == simulated
    assert summary["num_clients"] == 2
    for line in ("waiting for", "here site-a", "ready site-b", "3 classes: cat, dog, owl"):
        assert line in done.stderr, done.stderr
    for name in NAMES:
        audited = json.loads(call("client", "audit", f"{name}.audit.jsonl", "--json").stdout)
        assert audited["messages"]["train"] == 1 + 3  # one to warm up, which learns nothing
        assert audited["messages"]["join"] == audited["messages"]["prepare"] == 1
        assert sum(audited["num_bytes"].values()) < 20_000
        said = (place / f"{name}.out").read_text()
        assert "No image, feature, label, file name or path leaves" in said
        assert re.search(r"round 2, train: \d+ B leave: .*head\.weight 1x3x6", said)
    assert superlinks(place) == []
    assert all(process.poll() is None for process in clients)


@pytest.mark.parametrize("point", ["after_train:kill:2", "before_manifest:kill:2"])
def test_2_3_a_killed_server_goes_on_with_the_same_clients(
    call: Call, place: Path, simulated: str, clients: list[subprocess.Popen[bytes]], point: str
) -> None:
    out = f"killed-{point.split(':')[0]}"
    killed = call("server", "run", "real.toml", "--out", out, FEDTL_FAIL=point)
    assert killed.returncode == -signal.SIGKILL
    end = time.monotonic() + 15
    while superlinks(place):
        assert time.monotonic() < end
        time.sleep(0.1)
    resumed = call("server", "resume", out, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["head_sha256"] == simulated


def test_8_a_killed_client_is_missed_and_comes_back(
    call: Call, place: Path, clients: list[subprocess.Popen[bytes]]
) -> None:
    clients[1].kill()
    clients[1].wait()
    lost = call(
        "server", "run", "real.toml", "--out", "lost", "--min-clients", "1", "--json",
        "--set", "engine.join_seconds=10",
    )  # fmt: skip
    assert lost.returncode == 0, lost.stderr
    assert json.loads(lost.stdout)["num_clients"] == 1
    out = place / f"{NAMES[1]}.out"
    said = out.stat().st_size
    clients[1] = start(place, NAMES[1])
    end = time.monotonic() + 60
    while out.stat().st_size == said:  # then it is ready for signals too
        assert time.monotonic() < end
        time.sleep(0.1)


def test_9_too_few_clients_stop_the_run_and_it_can_go_on(
    call: Call, place: Path, simulated: str, clients: list[subprocess.Popen[bytes]]
) -> None:
    for process in clients:
        process.send_signal(signal.SIGTERM)
    assert [process.wait(30) for process in clients] == [143, 143]
    few = call("server", "run", "real.toml", "--out", "few", "--set", "engine.join_seconds=6")
    assert few.returncode == 4
    assert "0 clients could take part, and 2 are needed" in few.stderr
    assert "Traceback" not in few.stderr
    clients[:] = [start(place, name) for name in NAMES]
    for _ in range(5):  # they may be waiting for a server for longer than it waits for them
        resumed = call("server", "resume", "few", "--json")
        if resumed.returncode != 4:
            break
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["head_sha256"] == simulated


def test_a_server_without_a_scenario_or_a_federation(call: Call, federation: None) -> None:
    assert call("server", "run", "nowhere.toml").returncode == 2
    done = call("server", "run", "real.toml", "--folder", "nowhere")
    assert done.returncode == 2
    assert "fedtl server init" in done.stderr

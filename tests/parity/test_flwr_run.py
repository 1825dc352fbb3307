"""``flwr run .`` with Flower's own tools ends with the head of ``fedtl run``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent

HOME = """[superlink]
default = "here"
[superlink.here]
address = "127.0.0.1:{port}"
insecure = true
"""


def opens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SuperLink for simulations on the loopback, with a home of its own; its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(HOME.format(port=port))
    variables = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}",  # Flower finds its programs there
    }
    command = [
        str(TOOLS / "flower-superlink"), "--simulation", "--insecure", "--port", str(port),
        "--disable-runtime-dependency-installation",
    ]  # fmt: skip
    with (tmp_path / "superlink.log").open("w") as log:
        superlink = subprocess.Popen(
            command, cwd=tmp_path, env=variables, stdout=log, stderr=log, start_new_session=True
        )
    try:
        until = time.monotonic() + 60
        while not opens(port):
            assert superlink.poll() is None, (tmp_path / "superlink.log").read_text()
            assert time.monotonic() < until
            time.sleep(0.2)
        yield variables
    finally:
        with suppress(ProcessLookupError):
            os.killpg(superlink.pid, signal.SIGTERM)
        try:
            superlink.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(superlink.pid, signal.SIGKILL)
            superlink.wait()


def test_flowers_own_tools_give_the_same_head(
    fedtl, small: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    wanted = json.loads(fedtl("run", str(small), "--out", str(tmp_path / "local"), "--json").stdout)
    settings = f'scenario="{small}" out="{tmp_path / "run"}"'
    done = subprocess.run(
        [
            str(TOOLS / "flwr"), "run", str(ROOT), "here", "--stream", "--run-config", settings,
            "--federation-config", "num-supernodes=3 client-resources-num-cpus=1",
        ],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    summary = tmp_path / "run" / "summary.json"
    assert summary.exists(), done.stdout + done.stderr
    found = json.loads(summary.read_text())
    assert found["engine"] == "flower"
    for key in ("head_sha256", "scenario_hash", "final", "rounds_completed", "bytes_up"):
        assert found[key] == wanted[key]
    assert f"head_sha256 {wanted['head_sha256']}" in done.stdout

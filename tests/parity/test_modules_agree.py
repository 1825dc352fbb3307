"""Low-rank and other modules, a warm-up: one answer whatever threads, blocks, interruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedtl.build import make_federation, open_data
from fedtl.conduct import head_hash
from fedtl.engines import LocalEngine
from fedtl.interrupts import Interrupts
from fedtl.results.runs import RunFolder
from fedtl.rounds import run_rounds
from fedtl.scenario.load import dump_scenario, validate

MODES = {
    "flora": {"mode": "lora", "rank": 2, "aggregation": "flora"},
    "adapter": {"mode": "adapter", "width": 2},
    "warm-up": {"mode": "last_blocks", "warmup_rounds": 2},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    for name in ("a", "b"):
        (folder / name).mkdir()
        for i in range(9):
            pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_every_way_has_the_same_bits(pictures: Path, tmp_path: Path, mode: str) -> None:
    raw: dict[str, Any] = {
        "name": "agree", "seed": 4, "rounds": 3,
        "data": {"source": "folder", "path": str(pictures)},
        "clients": {"num": 3},
        "backbone": {
            "name": "squeezenet1_1", "weights": "none", "image_size": 32,
            "extraction": "torch",
        },
        "transfer": {**MODES[mode], "rate_factor": 10.0},
        "training": {"local_epochs": 1, "batch_size": 4, "learning_rate": 0.05},
        "evaluation": {"references": [], "every": 3},
    }  # fmt: skip
    scenario = validate(raw, "test", {})
    built = make_federation(open_data(scenario))

    def trained(name: str, threads: int, rounds: int = 3) -> str:
        """The head after so many rounds, in a folder that may have some already."""
        short = scenario.model_copy(update={"rounds": rounds})
        path = tmp_path / name
        folder = RunFolder.reopen(path) if path.exists() else RunFolder.create(
            path, dump_scenario(scenario)
        )  # fmt: skip
        engine = LocalEngine(built.population, threads, "cpu", 1)
        federation = type(built.federation)(
            **{**vars(built.federation), "scenario": short, "engine": engine}
        )
        engine.start(federation.head)
        try:
            with Interrupts() as interrupts:
                state, _ = run_rounds(federation, folder, lambda *_: None, interrupts)
        finally:
            folder.release()
        return head_hash(state.result)

    whole = trained("one", threads=1)
    assert trained("two", threads=2) == whole
    assert trained("broken", threads=1, rounds=1) != whole
    assert trained("broken", threads=2) == whole

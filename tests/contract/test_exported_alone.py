"""An exported file in a program that knows nothing of fedtl: the one that docs/export.md shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedtl.export import export_run
from fedtl.export.opened import open_model
from fedtl.export.samples import open_source
from fedtl.interrupts import Interrupts
from fedtl.parity import Quiet
from fedtl.scenario.load import validate
from fedtl.simulation import run_scenario

ROOT = Path(__file__).parents[2]

ALONE = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in ("fedtl", "torch"), name

sys.meta_path.insert(0, Nothing())
"""


def the_documented_program() -> str:
    text = (ROOT / "docs" / "export.md").read_text()
    found = re.search(r"```python\n(.*?)```", text, re.S)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    stream, y = np.random.default_rng(2), np.arange(60) % 3
    pixels = stream.integers(0, 256, (60, 41, 57, 3))
    pixels[np.arange(60), :, :, y] //= 2
    np.savez(folder / "data.npz", x=pixels.astype(np.uint8), y=y,
             classes=np.array(["red", "green <b>", "blau & weiß"]))  # fmt: skip
    scenario = {
        "name": "alone", "seed": 1, "rounds": 2,
        "data": {"source": "arrays", "path": str(folder / "data.npz"), "test_fraction": 0.3},
        "clients": {"num": 2},
        "backbone": {"name": "timm", "model": "test_resnet", "weights": "none", "image_size": 32},
        "training": {"local_epochs": 2, "learning_rate": 0.05},
        "evaluation": {"references": []},
    }  # fmt: skip
    run_scenario(validate(scenario, "test", {}), folder / "run", Quiet(lambda *_: None),
                 Interrupts())  # fmt: skip
    return folder / "run"


def test_it_answers_as_the_run_does(run: Path, tmp_path: Path) -> None:
    model = open_model(run)
    facts = export_run(run, "onnx", Quiet(lambda *_: None), Interrupts())
    source = open_source(model)
    assert source.features is not None
    sample = source.tests()
    shifted = np.exp(sample.scores - sample.scores.max(1, keepdims=True))
    wanted = shifted / shifted.sum(1, keepdims=True)
    images, rows = source.features.examples.images, source.features.split.test.index[:4]
    assert images is not None
    program = ALONE
    for i, row in enumerate(rows.tolist()):
        Image.fromarray(images.load(row)).save(tmp_path / f"{i}.png")
        one = the_documented_program().replace("picture.jpg", f"{i}.png")
        program += one.replace("model.onnx", facts["files"][0])
        program += (
            "print(json.dumps([labels[probabilities[0].argmax()], probabilities[0].tolist()]))\n"
        )
    (tmp_path / "alone.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-I", "alone.py"], cwd=tmp_path, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(told) == len(rows) == 4
    for (label, found), right in zip(told, wanted, strict=False):
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-4)
        assert label == model.labels[int(right.argmax())]
    assert np.ptp(wanted[:4], axis=0).max() > 0.01

"""Trunks that cannot be, through the command line: one line, the right exit code, no traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

SCENARIO = """name = "bad"
rounds = 1
[data]
source = "arrays"
path = "pixels.npz"
[clients]
num = 2
[backbone]
{backbone}
[evaluation]
references = []
"""
CODE = """from torch import nn

class Raises(nn.Module):
    def forward(self, x):
        raise ValueError("not like this")

class Map(nn.Module):
    def forward(self, x):
        return x
"""
ONNX = 'name = "onnx"\nweights = "graph.onnx"'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty small pictures, a graph and a module of faults."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "pixels.npz", x=pixels, y=np.arange(20) % 2)
    np.savez(tmp_path / "rows.npz", x=np.ones((20, 3), np.float32), y=np.arange(20) % 2)
    (tmp_path / "texts.csv").write_text("text,label\n" + "good,a\nbad,b\n" * 10)
    (tmp_path / "bad_trunks_here.py").write_text(CODE)
    (tmp_path / "broken_trunks_here.py").write_text("raise RuntimeError('at once')")
    graph(tmp_path / "graph.onnx", "y")
    yield tmp_path
    for name in ("bad_trunks_here", "broken_trunks_here"):
        sys.modules.pop(name, None)


def graph(path: Path, output: str, location: str | None = None) -> None:
    """[n, 3, 16, 16] -> ``map`` -> ``y`` [n, 3]; its weight in another file where one is named."""
    weight = numpy_helper.from_array(np.ones((1, 3, 1, 1), np.float32), "weight")
    if location is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=location)
    made = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "weight"], ["map"]),
            helper.make_node("GlobalAveragePool", ["map"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [weight],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path.write_bytes(model.SerializeToString())


def refused(fedtl: Any, folder: Path, backbone: str, *says: str, code: int = 2) -> None:
    (folder / "bad.toml").write_text(SCENARIO.format(backbone=backbone))
    done = fedtl("run", "bad.toml", "--out", "out")
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr
    told = " ".join(done.stderr.split())
    assert all(word in told for word in says), told
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/passwd", "link.bin"], ids=["above", "absolute", "link"]
)
def test_data_outside_the_folder(fedtl: Any, folder: Path, location: str) -> None:
    (folder / "link.bin").symlink_to("/etc/passwd")
    graph(folder / "graph.onnx", "y", location)
    refused(fedtl, folder, ONNX, "outside its own folder", location, code=5)


@pytest.mark.parametrize("content", [b"", b"\x80\x04 a pickle", b"x" * 1000, bytes(100)])
def test_no_onnx_file(fedtl: Any, folder: Path, content: bytes) -> None:
    (folder / "graph.onnx").write_bytes(content)
    refused(fedtl, folder, ONNX, "graph.onnx", "not a readable ONNX model")


def test_an_output_that_is_no_vector(fedtl: Any, folder: Path) -> None:
    graph(folder / "graph.onnx", "map")
    refused(fedtl, folder, ONNX, "not a vector", "(2, 3, 16, 16)", "backbone.output", "'y'")
    refused(fedtl, folder, ONNX + '\noutput = "maps"', "Did you mean 'map'")


@pytest.mark.parametrize(
    ("backbone", "says"),
    [
        ('name = "onnx"', ["backbone.weights", "is a file"]),
        ('name = "onnx"\nweights = "gone.onnx"', ["no such ONNX file"]),
        (ONNX + "\nimage_size = 32", ["backbone.image_size", "16 x 16"]),
        (ONNX + '\nsha256 = "00000000"', ["SHA-256 differs"]),
        ('name = "timm"\nmodel = "resnt18"', ["no model of this name", "Did you mean"]),
        ('name = "timm"', ["backbone.model", "needs it"]),
        ('name = "hub"\npath = "."\nmodel = "net"\nimage_size = 16', ["no hubconf.py"]),
        (
            'name = "module"\nmodel = "nowhere_at_all:Net"\nimage_size = 16',
            ["nowhere_at_all cannot be imported", "ModuleNotFoundError"],
        ),
        (
            'name = "module"\nmodel = "broken_trunks_here:Net"\nimage_size = 16',
            ["cannot be imported", "RuntimeError: at once"],
        ),
        (
            'name = "module"\nmodel = "bad_trunks_here:Raises"\nimage_size = 16',
            ["fails on an image", "ValueError: not like this"],
        ),
        (
            'name = "module"\nmodel = "bad_trunks_here:Map"\nimage_size = 16',
            ["no feature vectors", "(1, 3, 16, 16)", "a tensor [n, D]"],
        ),
        ('name = "module"\nmodel = "os.path"\nimage_size = 16', ["not a dotted path"]),
        ('name = "resnet81"', ["unknown backbone", "Did you mean"]),
        (
            'name = "resnet18"\nweights = "none"\nmean = [1, 2, 3]',
            ["backbone.mean", "says nothing"],
        ),
    ],
)
def test_refused_in_one_line(fedtl: Any, folder: Path, backbone: str, says: list[str]) -> None:
    refused(fedtl, folder, backbone, *says, code=5 if "sha256" in backbone else 2)


def test_texts_and_rows_for_a_trunk_of_pictures(fedtl: Any, folder: Path) -> None:
    texts = ["--set", "data.source=texts", "--set", "data.path=texts.csv"]
    rows = ["--set", "data.path=rows.npz"]
    (folder / "bad.toml").write_text(SCENARIO.format(backbone=ONNX))
    for settings, says in ((texts, "texts"), (rows, "rows of numbers")):
        done = fedtl("run", "bad.toml", *settings, "--out", "out")
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert says in " ".join(done.stderr.split())


def test_a_package_that_is_not_installed(
    fedtl: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    refused(fedtl, folder, 'name = "timm"\nmodel = "resnet18"', "uv sync --extra timm", code=3)


def test_the_good_graph_runs(fedtl: Any, folder: Path) -> None:
    (folder / "bad.toml").write_text(SCENARIO.format(backbone=ONNX))
    done = fedtl("run", "bad.toml", "--out", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert '"weights_source": "graph.onnx"' in done.stdout
    assert '"licence": "unknown"' in done.stdout

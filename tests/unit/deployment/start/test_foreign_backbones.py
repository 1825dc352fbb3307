"""Trunks from elsewhere on their way to clients: files travel, code and folders never do."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedtl.deployment.backbone_transfer import announce, read_announcement
from fedtl.errors import InputError, SecurityRefusal
from fedtl.scenario import schema
from fedtl.transfer.backbones import open_backbone

CLASSES = {"cat": 6, "dog": 5}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """[n, 3, 16, 16] -> [n, 3]."""
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])
    made = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "weight"], ["map"]),
            helper.make_node("GlobalAveragePool", ["map"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["y"]),
        ],
        "g",
        [entry],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.arange(1, 4, dtype=np.float32).reshape(1, 3, 1, 1), "weight")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = tmp_path / "graph.onnx"
    onnx.save(model, path)
    return path


def moved_out(path: Path, location: str) -> bytes:
    """The model with its weight in another file."""
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    content = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())
    return content


def section(path: Path, **changes: Any) -> schema.Backbone:
    return schema.Backbone(name="onnx", weights=str(path), **changes)


def told(asked: schema.Backbone) -> dict[str, Any]:
    return announce(open_backbone(asked, 0), asked)


def test_an_onnx_file_travels_with_all_that_belongs_to_it(
    graph: Path, make_site: Callable[..., Any], own_cache: Any, draw: Any, tmp_path: Path
) -> None:
    own_cache("clients")
    asked = section(graph, output="map", mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], layout="nchw")
    site = make_site(backbone=asked.model_dump())
    site.add("a", draw(tmp_path / "a", CLASSES))
    gathered = site.gathering().gather()
    digest = site.gathering().backbone.weights_hash
    kept = tmp_path / "clients/weights" / f"{digest}.onnx"
    assert kept.read_bytes() == graph.read_bytes()
    assert gathered.facts["a"]["width"] == 3
    assert gathered.facts["a"]["way"] == "onnx"


@pytest.mark.parametrize(
    "own",
    [
        {"name": "efficientnet_lite0", "image_size": 40, "feature_dtype": "float16"},
        {"name": "fourier", "width": 12, "scale": 3.0},
        {"name": "windows", "window": 4, "channels": 2},
        {"name": "identity"},
    ],
    ids=lambda own: own["name"],
)
def test_every_key_that_matters_arrives(own: dict[str, Any]) -> None:
    asked = schema.Backbone(**own, licence="own")
    facts = told(asked)
    assert "licence" not in facts
    heard = read_announcement(facts)
    assert heard.located(None) == asked.model_copy(update={"licence": None})
    assert heard.open(None, 0).identity() == open_backbone(asked, 0).identity()


def test_a_model_of_timm_is_named(graph: Path) -> None:
    facts = {**told(section(graph)), "name": "timm", "model": "resnet18d", "weights": "random"}
    heard = read_announcement(facts).located(None)
    assert (heard.model, heard.weights) == ("resnet18d", "none")


def test_of_two_files_none_travels(graph: Path) -> None:
    (graph.parent / "beside.bin").write_bytes(moved_out(graph, "beside.bin"))
    with pytest.raises(InputError, match=r"does not travel to real clients.*one ONNX file"):
        told(section(graph))


def test_a_sent_graph_reads_no_other_file(graph: Path) -> None:
    """A server that lies: a graph whose weight is a file that lies beside it at the client."""
    honest = told(section(graph))
    (graph.parent / "secret.bin").write_bytes(moved_out(graph, "secret.bin"))
    lie = hashlib.sha256(graph.read_bytes()).hexdigest()
    identity = {**honest["identity"], "weights": lie}
    heard = read_announcement({**honest, "identity": identity})
    with pytest.raises(SecurityRefusal, match="SHA-256 differs"):
        heard.open(graph, 0)


@pytest.mark.parametrize("name", ["hub", "module", "forest"])
def test_no_code_and_no_data_are_announced_or_believed(name: str, graph: Path) -> None:
    identity = open_backbone(section(graph), 0)
    code = schema.Backbone(name=name, path="/tmp", model="forest", weights="x.pth")
    with pytest.raises(InputError, match="does not travel"):
        announce(identity, code)
    for kind in ("file", "packaged", "random", "identity"):
        facts = {**told(section(graph)), "name": name, "model": "os:system", "weights": kind}
        with pytest.raises(SecurityRefusal, match="would run its code"):
            read_announcement(facts)


def test_a_folder_of_transformers_is_not_announced(graph: Path) -> None:
    with pytest.raises(InputError, match="does not travel"):
        announce(open_backbone(section(graph), 0), schema.Backbone(name="hf", weights="folder"))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"weights": "packaged"}, InputError, "does not have"),
        ({"weights": "identity"}, InputError, "does not have"),
        ({"suffix": ".pth"}, SecurityRefusal, "file type"),
        ({"name": "squeezenet1_1"}, SecurityRefusal, "file type"),
        ({"mean": [1.0] * 4}, InputError, "three colours"),
        ({"std": [1.0, 0.0, 1.0]}, InputError, "does not know"),
        ({"mean": [float("nan")] * 3}, InputError, "does not know"),
        ({"image_size": 10**9}, InputError, "does not know"),
        ({"window": -1}, InputError, "does not know"),
        ({"width": 10**12}, InputError, "does not know"),
        ({"output": "x" * 10_000}, InputError, "does not know"),
        ({"layout": "nwhc"}, InputError, "does not know"),
        ({"max_tokens": 10**9}, InputError, "does not know"),
    ],
    ids=str,
)
def test_announcements_that_no_server_makes(
    graph: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    facts = told(section(graph))
    read_announcement(facts)
    with pytest.raises(error, match=says):
        read_announcement(facts | changes)

"""Small models as files, without a run, and a server of each in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def write_model(path: Path, kind: str, side: int = 8, width: int = 4) -> Path:
    """A file as ``fedtl export`` writes one: the mean of each third of the input, as scores."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    size = side * side * 3 if kind == "images" else width
    weight = np.random.default_rng(0).normal(size=(size, 3)).astype(np.float32) / size
    shape = ["n", side, side, 3] if kind == "images" else ["n", width]
    element = TensorProto.UINT8 if kind == "images" else TensorProto.FLOAT
    name = "pixels" if kind == "images" else "rows"
    nodes = [
        helper.make_node("Cast", [name], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info(one, TensorProto.FLOAT, ["n", 3])
        for one in ("scores", "probabilities")
    ]
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info(name, element, shape)], outputs,
        [numpy_helper.from_array(weight, "weight")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    steps: dict[str, Any] = {"kind": kind}
    if kind == "images":
        steps |= {"resize": side + 2, "crop": side, "interpolation": "bilinear"}
    else:
        steps |= {"width": width}
    labels = ["<b>dog</b>", "cat", "日本"]
    card = {
        "format": 1, "name": "small", "labels": labels, "preprocessing": steps,
        "metrics": {"accuracy": 0.876}, "limits": ["It knows <i>three</i> things."],
        "provenance": {"head_sha256": "ab"},
    }  # fmt: skip
    told = {"labels": labels, "preprocessing": steps, "card": card}
    helper.set_model_props(model, {key: json.dumps(value) for key, value in told.items()})
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of a kind."""
    folder = tmp_path_factory.mktemp("models")

    def find(kind: str) -> Path:
        path = folder / f"{kind}.onnx"
        return path if path.is_file() else write_model(path, kind)

    return find

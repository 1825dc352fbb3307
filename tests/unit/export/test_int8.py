"""int8: smaller, nearly the same answers, and a loss is called one."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedtl.errors import InputError
from fedtl.export import int8
from fedtl.export.build import onnx_runner
from fedtl.export.samples import Sample


def model(convolves: bool) -> bytes:
    stream = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> onnx.TensorProto:
        values = stream.normal(size=shape) / np.prod(shape[1:]) ** 0.5
        return numpy_helper.from_array(values.astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("GlobalAveragePool", ["active"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
    ]
    given = ["n", 3, 8, 8]
    if not convolves:
        nodes, given = [helper.make_node("Identity", ["x"], ["flat"])], ["n", 256]
    nodes += [
        helper.make_node("MatMul", ["flat", "weight"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4])
        for name in ("scores", "probabilities")
    ]
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)], outputs,
        [tensor("kernel", 256, 3, 3, 3), tensor("weight", 256, 4)][0 if convolves else 1 :],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    return made.SerializeToString()


def sample(content: bytes, convolves: bool) -> Sample:
    shape = (40, 3, 8, 8) if convolves else (40, 256)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    scores = onnx_runner(content)({"x": x})[0]
    return Sample({"x": x}, scores, scores.argmax(1).astype(np.int32))


@pytest.mark.parametrize(("convolves", "way"), [(True, "static"), (False, "dynamic")])
def test_it_is_smaller_and_answers_nearly_the_same(convolves: bool, way: str) -> None:
    content = model(convolves)
    tests = sample(content, convolves)
    small, told = int8.quantize(content, tests)
    assert told.startswith(way)
    kinds = {node.op_type for node in onnx.load_from_string(small).graph.node}
    assert kinds & {"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"}
    near = onnx_runner(small)({"x": tests.inputs["x"]})[0]
    assert 0 < np.abs(near - tests.scores).max() < 0.1 * np.abs(tests.scores).max()
    table = int8.table({"float32": content, "int8": small}, tests)
    plain, other = table["files"]
    assert (plain["accuracy"], plain["agreement"], plain["bytes"]) == (1.0, 1.0, len(content))
    assert other["accuracy"] == (near.argmax(1) == tests.labels).mean()
    assert plain["p50"] > 0


def test_convolutions_want_training_examples() -> None:
    with pytest.raises(InputError, match="calibrate"):
        int8.quantize(model(True), None)


@pytest.mark.parametrize(
    ("accuracy", "says"), [(0.80, "it loses 10.0 points"), (0.899, "-0.1 points"), (None, "96.0 %")]
)
def test_a_loss_is_called_one(accuracy: float | None, says: str) -> None:
    plain = {"bytes": 400, "p50": 2.0, "accuracy": accuracy and 0.9, "agreement": 1.0}
    other = {"bytes": 100, "p50": 1.0, "accuracy": accuracy, "agreement": 0.96}
    told = int8._verdict([plain, other], 200)
    assert told.startswith("int8 is 4.0 times smaller")
    assert says in told
    assert ("loses" in told) == (accuracy == 0.80)

"""The program that is exported: as a torch module, and as one ONNX graph."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedtl.errors import InputError
from fedtl.export.opened import Model
from fedtl.export.samples import Inputs, made_up_inputs
from fedtl.types import Float32

if TYPE_CHECKING:
    from fedtl.export.joined import Joined

OUTPUTS = ("scores", "probabilities")

TOKENS = ("input_ids", "attention_mask")
"""Inputs of a model that takes texts."""

OPSET = 17


def torch_model(model: Model) -> Joined | None:
    """The whole model as one torch module; None where its trunk is an ONNX graph."""
    from fedtl.export.joined import Behind, Joined, TextFront
    from fedtl.export.rows import row_front, row_graph

    behind = Behind(model.tail, model.head)
    if model.takes == "rows":
        if row_graph(model) is not None:
            return None
        front = row_front(model)  # what is features already was rounded by the run
        return Joined(front, behind, model.half and front is not None)
    if model.front.graph is not None and model.tail is None:
        return None
    trunk = model.front.trunk()
    return Joined(TextFront(trunk) if model.takes == "texts" else trunk, behind, model.half)


def onnx_model(model: Model) -> Any:
    """The whole model as one ONNX graph of any batch size.

    Inputs are ``pixels`` uint8 [n, S, S, 3], ``rows`` float32 [n, d], or ``input_ids`` and
    ``attention_mask`` int64 [n, t]; outputs ``scores`` and ``probabilities`` float32 [n, C].

    Raises:
        InputError: the network has operations that ONNX has not.
    """
    from fedtl.export.joined import Behind, Joined
    from fedtl.export.rows import row_graph

    joined = torch_model(model)
    if joined is not None:
        return _traced(joined, made_up_inputs(model, 2), model.tokens)
    name, trunk = "pixels", model.front.graph
    front = trunk() if trunk is not None else None
    if model.takes == "rows":
        name, front = "rows", row_graph(model)
    assert front is not None
    behind = Joined(None, Behind(model.tail, model.head), model.half)
    zeros = np.zeros((2, model.width), np.float32)
    return _composed(front, _traced(behind, {"activations": zeros}), name)


def _traced(module: Joined, inputs: Inputs, tokens: int | None = None) -> Any:
    import onnx
    import torch

    from fedtl.export.joined import traceable

    axes = {
        name: {0: "n", 1: "t"} if name in TOKENS and not tokens else {0: "n"} for name in inputs
    }
    buffer = io.BytesIO()
    try:
        with traceable():
            # The tracing exporter is called legacy; the new one needs a further package.
            torch.onnx.export(
                module,
                tuple(torch.from_numpy(array) for array in inputs.values()),
                cast(Any, buffer),
                input_names=list(inputs),
                output_names=list(OUTPUTS),
                dynamic_axes={**axes, **{name: {0: "n"} for name in OUTPUTS}},
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:  # tracing runs the model's own code: anything may come
        lines = str(error).strip().splitlines() or [""]
        raise InputError(
            "this network cannot be written as ONNX",
            where="backbone.name",
            got=f"{type(error).__name__}: {lines[0][:160]}",
            do="Use --to torch, or --to safetensors",
        ) from error
    return onnx.load_from_string(buffer.getvalue())


def _composed(front: bytes, behind: Any, name: str) -> Any:
    """A trunk that comes as ONNX, and what is behind it, as one graph.

    Args:
        name: what its input is called from now on.
    """
    import onnx
    from onnx import compose, version_converter

    first = onnx.load_from_string(front)
    own = [one.version for one in first.opset_import if one.domain in ("", "ai.onnx")]
    wanted = max(OPSET, *own)
    if set(own) != {wanted}:
        first = version_converter.convert_version(first, wanted)
    behind = version_converter.convert_version(behind, wanted)
    first.ir_version = behind.ir_version = max(first.ir_version, behind.ir_version)
    constants = {tensor.name for tensor in first.graph.initializer}
    del behind.graph.value_info[:]
    first = compose.add_prefix(first, "trunk/")
    given = [one for one in first.graph.input if one.name not in {f"trunk/{c}" for c in constants}]
    output, taken = first.graph.output[0].name, behind.graph.input[0].name
    whole = compose.merge_models(first, behind, io_map=[(output, taken)])
    _rename(whole, given[0].name, name)
    return whole


def _rename(graph: Any, old: str, new: str) -> None:
    for one in graph.graph.input:
        one.name = new if one.name == old else one.name
    for node in graph.graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def session(content: bytes, threads: int = 1) -> Any:
    """An ONNX Runtime session on the CPU that keeps its warnings to itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions share no public base
        lines = str(error).strip().splitlines() or [""]
        raise InputError(
            "ONNX Runtime refuses this file", got=f"{type(error).__name__}: {lines[0][:160]}"
        ) from error


def answers(opened: Any, inputs: Inputs) -> tuple[Float32, Float32]:
    """Scores and probabilities of a session, also of one that takes so many examples at a time."""
    fixed = opened.get_inputs()[0].shape[0]
    if not isinstance(fixed, int):
        return cast(tuple[Float32, Float32], tuple(opened.run(list(OUTPUTS), dict(inputs))))
    count = len(next(iter(inputs.values())))
    parts = []
    for first in range(0, count, fixed):
        rows = np.minimum(np.arange(first, first + fixed), count - 1)  # the last one again
        found = opened.run(list(OUTPUTS), {name: array[rows] for name, array in inputs.items()})
        parts.append([one[: count - first] for one in found])
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def onnx_runner(content: bytes) -> Callable[[Inputs], tuple[Float32, Float32]]:
    """An ONNX file as a function from arrays by name to scores and probabilities."""
    return partial(answers, session(content))

"""An ONNX graph between pixels and vectors: what is put in front of a model, and behind it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedtl.errors import InputError
from fedtl.scenario import schema
from fedtl.transfer.preprocessing import Preprocessing

PIXELS, FEATURES = "fedtl.pixels", "fedtl.features"
FLOATS = {1: np.float32, 10: np.float16, 11: np.float64}
UINT8 = 2
SHOWN = 6


@dataclass(frozen=True)
class Source:
    """One model and what was asked of it."""

    path: Path
    model: Any
    section: schema.Backbone

    def refuse(self, what: str, **facts: Any) -> InputError:
        """The error for this file."""
        return InputError(what, where=self.path, **facts)

    def copy(self) -> Any:
        """The model, to be changed."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return model


def form(entry: Any) -> tuple[int, tuple[int | None, ...]]:
    """Element type and shape of an input; None for an axis of any length."""
    kind = entry.type.tensor_type
    return kind.elem_type, tuple(
        int(axis.dim_value) if axis.dim_value > 0 else None for axis in kind.shape.dim
    )


def prepend(model: Any, name: str, element: int, layout: str, made: Preprocessing) -> None:
    """Put the way from uint8 pixels [n, S, S, 3] to the model's own input in front of it."""
    from onnx import TensorProto, helper, numpy_helper

    values = {"fedtl.mean": made.mean, "fedtl.std": made.std}
    nodes, last = [], PIXELS
    if element != UINT8 or any(made.mean) or made.std != (1.0,) * 3:
        for key, value in values.items():
            model.graph.initializer.append(
                numpy_helper.from_array(np.array(value, np.float32), key)
            )
        nodes = [
            helper.make_node("Cast", [PIXELS], ["fedtl.float"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["fedtl.float", "fedtl.mean"], ["fedtl.centred"]),
            helper.make_node("Div", ["fedtl.centred", "fedtl.std"], ["fedtl.scaled"]),
            helper.make_node("Cast", ["fedtl.scaled"], ["fedtl.cast"], to=element),
        ]
        last = "fedtl.cast"
    if layout == "nchw":
        nodes.append(helper.make_node("Transpose", [last], [name], perm=[0, 3, 1, 2]))
    else:
        nodes.append(helper.make_node("Identity", [last], [name]))
    own = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *own])


def append(source: Source, model: Any, output: str, found: Any) -> tuple[int, bool]:
    """Put the way from the chosen value to float32 [n, D] behind the model; its width.

    A map that was chosen by name is averaged over its rows and columns, which are as many as
    each other.
    """
    from onnx import TensorProto, helper

    del model.graph.output[:]
    cast = helper.make_node("Cast", [output], ["fedtl.value"], to=TensorProto.FLOAT)
    shape = found.shape
    if found.ndim == 2:
        model.graph.node.extend([cast, helper.make_node("Identity", ["fedtl.value"], [FEATURES])])
        return int(shape[1]), False
    averaged = found.ndim == 4 and source.section.output is not None
    if not averaged and not (found.ndim == 4 and shape[2:] == (1, 1)):
        raise no_vector(source, output, shape)
    nodes, last = [cast], "fedtl.value"
    first_rows, last_rows = shape[1] == shape[2], shape[2] == shape[3]
    if first_rows == last_rows and not last_rows:
        raise no_vector(source, output, shape)
    if not last_rows:  # [n, h, w, C]
        nodes.append(helper.make_node("Transpose", [last], ["fedtl.map"], perm=[0, 3, 1, 2]))
        last = "fedtl.map"
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["fedtl.mean_map"]),
        helper.make_node("Flatten", ["fedtl.mean_map"], [FEATURES], axis=1),
    ]
    model.graph.node.extend(nodes)
    return int(shape[1] if last_rows else shape[3]), averaged


def set_outputs(model: Any, name: str) -> None:
    """Make one value of the model its only output; the runtime leaves out what it needs not."""
    import onnx

    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=name))


def no_vector(source: Source, output: str, shape: tuple[int, ...]) -> InputError:
    """Names the values that would do, nearest to the output first."""
    import onnx

    known = onnx.shape_inference.infer_shapes(source.model).graph
    ranks: dict[int, list[str]] = {2: [], 4: []}
    for value in reversed([*known.value_info]):
        kind = value.type.tensor_type
        if kind.elem_type in FLOATS and (rank := len(kind.shape.dim)) in ranks:
            ranks[rank].append(value.name)
    told = [
        f"{what}: {', '.join(map(repr, ranks[rank][:SHOWN]))}"
        for rank, what in ((2, "vectors"), (4, "maps, which are averaged"))
        if ranks[rank]
    ]
    return InputError(
        f"the value {output[:80]!r} of this ONNX model is not a vector",
        where="backbone.output",
        got=f"shape {tuple(int(side) for side in shape)}",
        allowed="; ".join(told) or "[n, D]",
        do="Name another value of the model in backbone.output"
        if told
        else "Export the network without its last layers",
    )

"""Trunks of rows inside the exported program, where they can be written as one.

Random Fourier features and statistics of windows are; an ONNX trunk is a graph already. A forest is
not: then the program takes the trunk's features, and the card says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtl import seeding
from fedtl.data.scaling import table_rows
from fedtl.export.opened import Model
from fedtl.ready_features import ReadyFeatures
from fedtl.types import Float32

if TYPE_CHECKING:
    from torch import nn


def row_front(model: Model) -> nn.Module | None:
    """The trunk as a module; None where there is none, or it cannot be written as one."""
    section, columns = model.scenario.backbone, model.columns
    if columns is None or model.front.embed is None:
        return None
    from fedtl.export.row_modules import Fourier, Windows

    if section.name == "fourier":
        key = seeding.key(model.scenario.seed, "backbone")
        return Fourier(columns, section.width, section.scale, key)
    if section.name == "windows" and columns % section.channels == 0:
        return Windows(columns, section.channels, section.window)
    return None


def row_graph(model: Model) -> bytes | None:
    """The trunk where it comes as ONNX and takes single precision; else None."""
    from onnx import TensorProto

    from fedtl.transfer.onnx_files import read_model
    from fedtl.transfer.onnx_graph import set_outputs

    if model.front.name != "onnx" or model.columns is None:
        return None
    graph, _, _ = read_model(Path(model.scenario.backbone.weights).expanduser())
    constants = {tensor.name for tensor in graph.graph.initializer}
    given = [entry for entry in graph.graph.input if entry.name not in constants]
    if given[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        return None
    set_outputs(graph, model.front.cut)
    content: bytes = graph.SerializeToString()
    return content


def is_inside(model: Model) -> bool:
    """Whether the program takes rows as they are, without features of a trunk outside."""
    if model.front.name == "identity":
        return True
    return row_front(model) is not None or row_graph(model) is not None


def raw_rows(model: Model, features: ReadyFeatures) -> Float32:
    """Rows before any trunk, float32 [N, d]: of tables as each client has scaled them."""
    examples = features.examples
    if examples.table is None:
        return np.asarray(examples.features, np.float32)
    scaled: Any = table_rows(examples.table, model.scenario.data, features.split)
    return np.asarray(scaled.matrix, np.float32)

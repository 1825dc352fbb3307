"""Trunks that come as ONNX files: what TensorFlow, Keras, scikit-learn and detectors export.

Only ONNX Runtime runs them. A model of images gets a prefix of four operators (uint8 pixels ->
float, minus mean, by std, axes in the model's order), so that it is called like any exported trunk;
one of rows is called as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtl.errors import InputError, nearest
from fedtl.scenario import schema
from fedtl.transfer.backbones import NO_PREPROCESSING, Backbone
from fedtl.transfer.onnx_files import read_model
from fedtl.transfer.onnx_forward import Export, OnnxForward, WayRefused, one_line
from fedtl.transfer.onnx_graph import (
    FEATURES,
    FLOATS,
    PIXELS,
    SHOWN,
    UINT8,
    Source,
    append,
    form,
    no_vector,
    prepend,
    set_outputs,
)
from fedtl.transfer.preprocessing import Preprocessing, plain
from fedtl.types import Float32

if TYPE_CHECKING:
    from torch import nn

_ROWS = 64  # in one call: a row has the same bits whoever else is in it


def open_onnx(section: schema.Backbone, key: int) -> Backbone:
    """A trunk from an ONNX file, its output tried out.

    Args:
        section: the scenario's; ``weights`` is the file.
        key: not used: nothing here is random.

    Raises:
        InputError: no ONNX file, or one that does not turn images or rows into vectors.
        SecurityRefusal: another hash than stated, or data from outside the file's folder.
    """
    path = Path(section.weights).expanduser()
    model, digest, alone = read_model(path, section.sha256)
    source = Source(path, model, section)
    entry = _only_input(source)
    output = _chosen_output(source)
    open_kind = _open_rows if len(entry.type.tensor_type.shape.dim) == 2 else _open_images
    return open_kind(source, entry, output, digest, path if alone else None)


def _open_images(
    source: Source, entry: Any, output: str, digest: str, alone: Path | None
) -> Backbone:
    layout, preprocessing = _images(source, entry)
    content, dim, pooled = _composed(source, entry, output, layout, preprocessing)
    return Backbone(
        "onnx",
        output,
        preprocessing,
        digest,
        source.path.name,
        functools.partial(_image_module, content, digest),
        dim,
        alone,
        settings={"layout": layout, "averaged": pooled},
        graph=lambda: content,
    )


def _open_rows(
    source: Source, entry: Any, output: str, digest: str, alone: Path | None
) -> Backbone:
    section = source.section
    if section.mean is not None or section.image_size is not None or section.layout != "auto":
        raise source.refuse(
            "this ONNX model takes rows of numbers, not images",
            do="Leave out backbone.mean, std, image_size and layout",
        )
    model = source.copy()
    set_outputs(model, output)
    element, shape = form(entry)
    session = _session(source, model.SerializeToString())
    size = shape[0] or _ROWS

    def embed(rows: Float32) -> Float32:
        """float32 [n, D] from float32 [n, d]."""
        if shape[1] and rows.shape[1] != shape[1]:
            raise source.refuse(
                "this ONNX model takes rows of another width",
                got=f"{rows.shape[1]} columns",
                allowed=f"{shape[1]}",
            )
        done = []
        for first in range(0, len(rows), size):
            part = np.zeros((size, rows.shape[1]), FLOATS[element])
            part[: len(rows) - first] = rows[first : first + size]
            try:
                found = np.asarray(session.run(None, {entry.name: part})[0])
            except Exception as error:  # the runtime's own exceptions share no public base
                raise source.refuse(
                    "ONNX Runtime cannot run this model", got=one_line(error)
                ) from error
            if found.ndim != 2 or len(found) != size:
                raise no_vector(source, output, found.shape)
            done.append(found[: len(rows) - first].astype(np.float32))
        return np.concatenate(done)

    width = shape[1]
    return Backbone(
        "onnx",
        output,
        NO_PREPROCESSING,
        digest,
        source.path.name,
        functools.partial(_module, embed, digest),
        embed(np.zeros((1, width), np.float32)).shape[1] if width else 0,
        alone,
        takes="rows",
        embed=embed,
    )


def _only_input(source: Source) -> Any:
    """The one input that is no constant."""
    graph = source.model.graph
    constants = {tensor.name for tensor in graph.initializer}
    entries = [entry for entry in graph.input if entry.name not in constants]
    if len(entries) != 1:
        raise source.refuse(
            "this ONNX model does not have exactly one input",
            got=", ".join(repr(entry.name[:80]) for entry in entries[:SHOWN]) or "none",
            do="Export the part of the network that turns one image or row into features",
        )
    entry = entries[0]
    element, shape = form(entry)
    if element not in FLOATS and not (element == UINT8 and len(shape) == 4):
        import onnx

        known = onnx.TensorProto.DataType.values()
        kind = onnx.TensorProto.DataType.Name(element) if element in known else "no tensor"
        raise source.refuse(
            f"the input {entry.name[:80]!r} of this ONNX model is neither pixels nor numbers",
            got=kind.lower(),
            allowed="float, double, float16; uint8 for pixels",
        )
    if len(shape) not in (2, 4):
        raise source.refuse(
            "this ONNX model takes neither images nor rows",
            got=f"an input of shape {_told(shape)}",
            allowed="[n, 3, h, w], [n, h, w, 3] or [n, d]",
        )
    return entry


def _chosen_output(source: Source) -> str:
    """The name of the value that is the feature vector."""
    graph, wanted = source.model.graph, source.section.output
    values = [name for node in graph.node for name in node.output if name]
    if wanted is not None:
        if wanted not in values:
            guess = nearest(wanted, values)
            raise InputError(
                "there is no such value in this ONNX model",
                where="backbone.output",
                got=repr(wanted),
                allowed="the last ones are " + ", ".join(map(repr, values[-SHOWN:])),
                do=f"Did you mean {guess!r}?" if guess else None,
            )
        return wanted
    outputs = [value.name for value in graph.output if value.type.tensor_type.elem_type in FLOATS]
    if len(outputs) != 1:
        raise source.refuse(
            "this ONNX model does not have exactly one output of numbers",
            got=", ".join(repr(name[:80]) for name in outputs[:SHOWN]) or "none",
            do="Name the feature vector in backbone.output; any value in the model will do",
        )
    return str(outputs[0])


def _images(source: Source, entry: Any) -> tuple[str, Preprocessing]:
    """The order of the axes, and what images must be like."""
    section, (_, shape) = source.section, form(entry)
    fitting = [name for name, axis in (("nchw", 1), ("nhwc", 3)) if shape[axis] in (3, None)]
    sure = [name for name, axis in (("nchw", 1), ("nhwc", 3)) if shape[axis] == 3]
    layout = section.layout if section.layout != "auto" else (sure or [""])[0]
    if layout not in fitting or (section.layout == "auto" and len(sure) > 1):
        raise source.refuse(
            "it is not clear where the three colours of this ONNX model's input are"
            if len(fitting) == 2 else "this ONNX model does not take images of three colours so",
            got=f"shape {_told(shape)}, backbone.layout = {section.layout!r}",
            do="Set backbone.layout = 'nchw' or 'nhwc'" if fitting else None,
        )  # fmt: skip
    height, width = shape[2:] if layout == "nchw" else shape[1:3]
    fixed = {side for side in (height, width) if side}
    size = section.image_size or max(fixed, default=0)
    if not size:
        raise source.refuse(
            "this ONNX model takes images of any size", do="Set backbone.image_size"
        )
    if fixed - {size}:
        raise InputError(
            "this ONNX model takes images of another size, or not square ones",
            where="backbone.image_size",
            got=size,
            allowed=f"{height or 'any'} x {width or 'any'}",
        )
    return layout, plain(size, section.mean, section.std)


def _composed(
    source: Source, entry: Any, output: str, layout: str, preprocessing: Preprocessing
) -> tuple[bytes, int, bool]:
    """The whole trunk as ONNX, its width, and whether a map is averaged.

    A batch of two tells whether the model takes any number of images; some say so and do not.
    """
    from onnx import TensorProto, helper

    model, size = source.copy(), preprocessing.crop
    element, shape = form(entry)
    prepend(model, entry.name, element, layout, preprocessing)
    set_outputs(model, output)
    refused: InputError | None = None
    for count in [shape[0]] if shape[0] else [2, 1]:
        images = [count, size, size, 3]
        del model.graph.input[:]
        model.graph.input.append(helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, images))
        session = _session(source, model.SerializeToString())
        try:
            found = session.run(None, {PIXELS: np.zeros(images, np.uint8)})[0]
        except Exception as error:  # the runtime's own exceptions share no public base
            refused = source.refuse(
                f"ONNX Runtime cannot run this model on images of {size} pixels",
                got=one_line(error),
            )
            continue
        found = np.asarray(found)
        if found.ndim and len(found) == count:
            dim, averaged = append(source, model, output, found)
            if not shape[0] and count == 2:
                model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
            batch = count if shape[0] or count == 1 else "n"
            model.graph.output.append(
                helper.make_tensor_value_info(FEATURES, TensorProto.FLOAT, [batch, dim])
            )
            return model.SerializeToString(), dim, averaged
        refused = no_vector(source, output, found.shape)
    assert refused is not None
    raise refused


def _session(source: Source, content: bytes) -> Any:
    try:
        return OnnxForward(content, Export("", "", 0.0)).session
    except WayRefused as refusal:
        raise source.refuse(str(refusal)) from refusal


def _told(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if side is None else str(side) for side in shape)}]"


def _image_module(content: bytes, digest: str) -> nn.Module:
    return _module(OnnxForward(content, Export("", digest, 0.0)).run, digest)


def _module(run: Callable[[Any], Float32], digest: str) -> nn.Module:
    from fedtl.transfer.trunks import Elsewhere

    return Elsewhere(run, digest)

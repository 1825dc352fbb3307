"""ONNX files, read without trust: size first, then every place that outside data are asked from.

A model may keep its tensors in other files and says itself where. Only plain files beside or below
the model are read; nothing is opened before each location was looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from fedtl.errors import InputError, SecurityRefusal
from fedtl.transfer.weights import check_hash

MAX_BYTES = 2**31 - 1  # what one protobuf message may have
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Whose operators ONNX Runtime brings along."""

_OUTSIDE = 1  # TensorProto.EXTERNAL


def read_model(path: Path, expected: str | None = None) -> tuple[Any, str, bool]:
    """An ONNX model with all its tensors in memory.

    Args:
        path: the file.
        expected: a SHA-256, or at least its first 8 hex digits, which the model must have.

    Returns:
        The ``onnx.ModelProto``; its hash; whether it is this one file alone. The hash is the
        file's SHA-256, or one over the file and all tensors that it keeps in others.

    Raises:
        InputError: not there, too large, or no ONNX model that ONNX Runtime could run.
        SecurityRefusal: another hash than expected, or data from outside the model's folder.
    """
    import onnx

    content = _read(path)
    digest = hashlib.sha256(content)
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's DecodeError, whose home moves from version to version
        raise _no_model(path) from error
    if not model.graph.node or not model.graph.output or not model.opset_import:
        raise _no_model(path)
    outside = [tensor for tensor in _within(model, onnx.TensorProto) if _is_outside(tensor)]
    if outside:
        _check_locations(path, outside)
        try:
            onnx.load_external_data_for_model(model, str(path.parent))
        except (onnx.checker.ValidationError, OSError, ValueError) as error:
            raise InputError(
                "the data beside this ONNX model cannot be read",
                where=path,
                got=str(error).splitlines()[0][:200],
                do="Export it again into an empty folder, or as one file",
            ) from error
        for tensor in outside:
            if _is_outside(tensor):
                raise SecurityRefusal("an unusual tensor asks for data in another file", where=path)
            digest.update(hashlib.sha256(tensor.raw_data).digest())
    check_hash(path, digest.hexdigest(), expected)
    _check_domains(path, model)
    return model, digest.hexdigest(), not outside


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(
            "there is no such ONNX file", where=path, do="Give the file in backbone.weights"
        )
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError(
            "the ONNX file is too large",
            where=path,
            got=f"{size:,} bytes",
            allowed=f"at most {MAX_BYTES:,} bytes",
        )
    return path.read_bytes()


def _no_model(path: Path) -> InputError:
    return InputError(
        "this is not a readable ONNX model",
        where=path,
        do="Export the network again; docs/trunks.md says how for Keras, scikit-learn and torch",
    )


def _within(message: Any, kind: Any) -> Iterator[Any]:
    """Every part of a protobuf message that is of a kind, however deep."""
    if isinstance(message, kind):
        yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _within(part, kind)


def _is_outside(tensor: Any) -> bool:
    return bool(tensor.data_location == _OUTSIDE or tensor.external_data)


def _check_locations(path: Path, tensors: list[Any]) -> None:
    """Refuse every location that is not a plain file in the model's folder or below."""
    folder, claimed = path.parent.resolve(), 0
    for tensor in tensors:
        told = {entry.key: entry.value for entry in tensor.external_data}
        location = told.get("location", "")
        name = PurePosixPath(location)
        place = folder / name
        parts = [folder.joinpath(*name.parts[: i + 1]) for i in range(len(name.parts))]
        unsafe = (
            not location
            or "\0" in location
            or "\\" in location
            or name.is_absolute()
            or bool(PureWindowsPath(location).drive)
            or ".." in name.parts
            or any(part.is_symlink() for part in parts)
        )
        if unsafe:
            raise SecurityRefusal(
                "this ONNX model asks for data from outside its own folder; nothing was read",
                where=path,
                got=repr(location[:200]),
                allowed="names of plain files beside the model",
                do="Export it as one file, from a source you trust",
            )
        if not place.is_file():
            raise InputError(
                "data of this ONNX model are missing", where=path, got=repr(location[:200]),
                do="Copy the files that were exported with the model into its folder",
            )  # fmt: skip
        size = place.stat().st_size
        offset, length = _number(told, "offset", 0), _number(told, "length", size)
        if offset < 0 or length < 0 or offset + length > size:
            raise SecurityRefusal("this ONNX model asks for more data than there are", where=path)
        claimed += length
    if claimed > MAX_BYTES:
        raise InputError(
            "this ONNX model is too large",
            where=path,
            got=f"{claimed:,} bytes",
            allowed=f"at most {MAX_BYTES:,} bytes",
        )


def _number(told: dict[str, str], key: str, default: int) -> int:
    try:
        return int(told.get(key, default))
    except ValueError:
        return -1


def _check_domains(path: Path, model: Any) -> None:
    import onnx

    own = {function.domain for function in model.functions}
    used = {node.domain for node in _within(model, onnx.NodeProto)}
    if unknown := sorted(used - own - set(DOMAINS)):
        raise InputError(
            "this ONNX model has operators that ONNX Runtime does not know",
            where=path,
            got="domain " + ", ".join(repr(name[:80]) for name in unknown[:3]),
            allowed=", ".join(repr(name) for name in DOMAINS if name),
            do="Export it without custom operators",
        )

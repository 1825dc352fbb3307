"""What a strategy of Flower's remembers between rounds, as one array of bytes.

An instance's attributes are read off and written as safetensors, one tensor of which says in JSON
how they belong together: no pickle, nothing in it can run. Flower's optimisers make their moments
in the first step and a user's strategy may keep a growing history, so the array's length varies.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from safetensors.numpy import load, save

from fedtl.errors import InputError

UInt8 = npt.NDArray[np.uint8]

FIXED = (
    FunctionType, BuiltinFunctionType, MethodType, ModuleType, partial, type, PurePath,
    logging.Logger,
)  # fmt: skip
"""Attributes that a constructor sets and nobody changes: made anew with the instance, not kept."""

PLAIN = (type(None), bool, int, float, str)
SEQUENCES: dict[str, Callable[[Any], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset
}  # fmt: skip
MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "dict": dict, "ArrayRecord": ArrayRecord, "MetricRecord": MetricRecord,
    "ConfigRecord": ConfigRecord,
}  # fmt: skip
DTYPES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})
ALLOWED = (
    "None, bool, int, float, str, bytes, NumPy arrays, numbers and generators, random.Random, "
    "Flower's arrays and records, and lists, tuples, sets and dicts of these"
)


def pack_attributes(owner: str, attributes: Mapping[str, Any], made: Mapping[str, Any]) -> UInt8:
    """Attributes as bytes, uint8 [n].

    Args:
        owner: the class's name, for the error.
        attributes: of the instance now.
        made: of the instance as its constructor left it; functions and the like must be these.

    Raises:
        InputError: an attribute that cannot be kept, by name.
    """
    writer = _Writer(owner)
    tree = []
    for name, value in attributes.items():
        fixed = isinstance(value, FIXED) and made.get(name) is value
        tree.append([name, ["made"] if fixed else writer.write(value, name)])
    text = json.dumps([owner, tree])
    tensors = {**writer.tensors, "tree": np.frombuffer(text.encode(), np.uint8)}
    return np.frombuffer(save(tensors), np.uint8)


def unpack_attributes(owner: str, packed: UInt8, made: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes again, sharing nothing with those that were packed but what is fixed.

    Raises:
        InputError: they are another class's.
    """
    tensors = load(packed.tobytes())
    before, tree = json.loads(tensors["tree"].tobytes())
    if before != owner:
        raise InputError(
            "the commit is of another strategy of Flower's, nothing can go on from it",
            where="strategy.class",
            got=owner,
            allowed=before,
            do="Run the scenario anew",
        )
    return {
        name: made[name] if content == ["made"] else _read(content, tensors)
        for name, content in tree
    }


class _Writer:
    """Values as JSON that names tensors; what cannot be read back the same is refused."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self.tensors: dict[str, npt.NDArray[Any]] = {}

    def write(self, value: Any, where: str) -> list[Any]:
        kind = type(value)
        name = kind.__name__
        if where.count("[") > 100:
            raise self._refusal(value, where[:60] + "...")  # it holds itself
        if kind in PLAIN:
            return ["plain", value]
        if kind is bytes:
            return ["bytes", self._kept(np.frombuffer(value, np.uint8))]
        if kind is np.ndarray or isinstance(value, np.generic):
            if value.dtype.str[1:] in DTYPES:
                return ["array" if kind is np.ndarray else "number", self._kept(value)]
        elif SEQUENCES.get(name) is kind:
            items = [self.write(item, f"{where}[{i}]") for i, item in enumerate(value)]
            return [name, items if name in ("list", "tuple") else sorted(items, key=json.dumps)]
        elif MAPPINGS.get(name) is kind:
            key = f"a key of {where}"
            pairs = [
                (self.write(k, key), self.write(v, f"{where}[{k!r}]")) for k, v in value.items()
            ]
            return [name, pairs]
        elif kind is Array:
            data = self.write(value.data, where)
            return ["Array", value.dtype, list(value.shape), value.stype, data]
        elif kind is np.random.Generator:
            bits = value.bit_generator
            return ["Generator", type(bits).__name__, self.write(bits.state, where)]
        elif name == "Random" and kind.__module__ == "random":
            return ["Random", self.write(value.getstate(), where)]
        raise self._refusal(value, where)

    def _kept(self, value: Any) -> str:
        name = str(len(self.tensors))
        array = np.asarray(value)
        self.tensors[name] = np.array(array, array.dtype.newbyteorder("="), order="C")
        return name

    def _refusal(self, value: Any, where: str) -> InputError:
        return InputError(
            f"{self._owner} remembers something that cannot be committed and restored",
            where=f"{self._owner}.{where}",
            got=type(value).__name__,
            allowed=ALLOWED,
        )


def _read(content: list[Any], tensors: Mapping[str, npt.NDArray[Any]]) -> Any:
    kind, value = content[0], content[1]
    if kind == "plain":
        return value
    if kind == "bytes":
        return tensors[value].tobytes()
    if kind == "array":
        return tensors[value].copy()
    if kind == "number":
        return tensors[value][()]
    if kind in SEQUENCES:
        return SEQUENCES[kind](_read(item, tensors) for item in value)
    if kind in MAPPINGS:
        return MAPPINGS[kind]({_read(k, tensors): _read(v, tensors) for k, v in value})
    if kind == "Array":
        return Array(value, tuple(content[2]), content[3], _read(content[4], tensors))
    if kind == "Generator":
        bits = getattr(np.random, value)()
        bits.state = _read(content[2], tensors)
        return np.random.Generator(bits)
    assert kind == "Random"
    import random

    generator = random.Random()
    generator.setstate(_read(value, tensors))
    return generator

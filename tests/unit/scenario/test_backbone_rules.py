"""Keys of a backbone that do not fit its kind: all told at once."""

from __future__ import annotations

from typing import Any

import pytest

from fedtl.errors import InputError
from fedtl.scenario.adaptation_rules import check_real
from fedtl.scenario.compatibility import find_conflicts
from fedtl.scenario.schema import Scenario


def scenario(backbone: dict[str, Any], **tables: Any) -> Scenario:
    content = {"name": "rules", "rounds": 1, "data": {"source": "digits"}, "backbone": backbone}
    return Scenario.model_validate({**content, **tables})


def told(backbone: dict[str, Any], **tables: Any) -> dict[str, str]:
    return {p.where: p.line() for p in find_conflicts(scenario(backbone, **tables))}


ONNX = {"name": "onnx", "weights": "a.onnx"}
MODULE = {"name": "module", "model": "package.file:Class", "image_size": 32}


@pytest.mark.parametrize(
    "backbone",
    [
        {}, {"name": "resnet18"}, {"name": "timm", "model": "resnet18d"}, ONNX, MODULE,
        {**ONNX, "mean": [0.0] * 3, "std": [1.0] * 3, "layout": "nhwc", "output": "x"},
        {**MODULE, "path": "folder", "weights": "w.safetensors"},
        {"name": "hub", "path": "clone", "model": "net", "image_size": 32},
    ],
    ids=str,
)  # fmt: skip
def test_what_fits(backbone: dict[str, Any]) -> None:
    assert told(backbone) == {}


@pytest.mark.parametrize(
    ("backbone", "where", "says"),
    [
        ({"model": "resnet18d"}, "backbone.model", 'backbone.name = "timm"'),
        ({"path": "clone"}, "backbone.path", '"hub"'),
        ({"mean": [1.0] * 3, "std": [1.0] * 3}, "backbone.mean", '"onnx"'),
        ({"layout": "nchw"}, "backbone.layout", '"onnx"'),
        ({"output": "x"}, "backbone.output", '"onnx"'),
        ({"pooling": "cls"}, "backbone.pooling", '"hf"'),
        ({"max_tokens": 64}, "backbone.max_tokens", '"hf"'),
        ({"width": 64}, "backbone.width", '"fourier"'),
        ({"name": "timm"}, "backbone.model", "the model's name"),
        ({"name": "hub", "model": "net", "image_size": 32}, "backbone.path", "the local clone"),
        ({"name": "hub", "path": "c", "image_size": 32}, "backbone.model", "its entry point"),
        ({"name": "module", "model": "a:B"}, "backbone.image_size", "pixels"),
        ({**MODULE, "model": "package.Class"}, "backbone.model", "package.module:Class"),
        ({**MODULE, "model": "../x:Class"}, "backbone.model", "not a dotted path"),
        ({**MODULE, "mean": [1.0] * 3}, "backbone.std", "given together"),
        ({**MODULE, "std": [1.0] * 3}, "backbone.mean", "given together"),
        ({**MODULE, "mean": [1.0], "std": [1.0] * 3}, "backbone.mean", "one value per colour"),
        ({"name": "onnx"}, "backbone.weights", "is a file"),
        ({**ONNX, "weights": "none"}, "backbone.weights", "is a file"),
        ({**ONNX, "extraction": "torch"}, "backbone.extraction", "ONNX Runtime"),
    ],
    ids=str,
)
def test_what_does_not(backbone: dict[str, Any], where: str, says: str) -> None:
    found = told(backbone)
    assert says in found[where]


def test_an_onnx_file_is_never_trained() -> None:
    tables = {"transfer": {"mode": "full"}, "evaluation": {"references": ["from_scratch"]}}
    found = told(ONNX, **tables)
    assert {"transfer.mode", "evaluation.references"} <= set(found)


@pytest.mark.parametrize("name", ["hub", "module"])
def test_real_clients_run_no_code_of_a_server(name: str) -> None:
    backbone = {**MODULE, "name": name, "model": "a:B" if name == "module" else "b", "path": "c"}
    with pytest.raises(InputError, match="real clients run no code that a server names"):
        check_real(scenario(backbone))

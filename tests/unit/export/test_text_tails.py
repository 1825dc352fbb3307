"""A text encoder cut in two, exported: the same answers for texts longer than the exporter saw."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from fedtl.export.files import make
from fedtl.export.opened import Model
from fedtl.scenario.load import validate
from fedtl.transfer.tails import first_head, open_network
from tests.text_models import tiny_model

TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("model") / "bert")


def opened(folder: Path, activations: str) -> Model:
    raw = {
        "name": "t",
        "data": {"source": "texts", "path": "t.csv"},
        "backbone": {"name": "hf", "weights": str(folder), "max_tokens": TOKENS},
        "transfer": {"mode": "last_blocks", "cut": 1, "activations": activations},
    }
    scenario = validate(raw, "t", {})
    front, tail = open_network(scenario.backbone, scenario.transfer, 0, 10)
    assert tail is not None
    head = first_head(scenario, tail, tail.width, 2)
    rows = np.random.default_rng(0).normal(size=(2, tail.width)).astype(np.float32)
    tables = cast(Any, SimpleNamespace())
    return Model(folder, scenario, tables, {**head, "weight": rows}, front, tail, ("bad", "good"))


@pytest.mark.parametrize("activations", ["store", "recompute"])
def test_texts_of_any_length(folder: Path, activations: str) -> None:
    model = opened(folder, activations)
    trunk = open_network(model.scenario.backbone, type(model.scenario.transfer)(), 0)[0].trunk()
    formats = ["onnx", "safetensors", *(["torch"] if activations == "store" else [])]
    runs = [make(model, to)[1] for to in formats]
    for length in (2, 9, TOKENS):
        given = _tokens(length, model.tokens or length)
        masked = np.where(given["attention_mask"] > 0, given["input_ids"], -1)
        wanted = _through(trunk, masked) @ model.head["weight"].T
        for run in runs:
            np.testing.assert_allclose(run(given)[0], wanted, atol=1e-5)


def _tokens(length: int, filled: int) -> dict[str, Any]:
    ids, mask = np.zeros((2, filled), np.int64), np.zeros((2, filled), np.int64)
    ids[:, :length] = np.random.default_rng(length).integers(4, 14, (2, length))
    mask[0, :length] = mask[1, : length // 2] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _through(trunk: Any, tokens: Any) -> np.ndarray[Any, Any]:
    import torch

    with torch.inference_mode():
        return np.asarray(trunk(torch.from_numpy(tokens)).numpy())

"""The cut through a text encoder: front and tail together are the trunk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtl.errors import InputError
from fedtl.scenario import schema
from fedtl.transfer.backbones import INPUT, open_backbone
from fedtl.transfer.extraction import Exports, open_forward
from fedtl.transfer.tails import _opened, blocks_before, initial_tensors, open_network, open_tail
from fedtl.transfer.text_features import read_tokens, run, sample
from fedtl.types import TAIL, Tail
from tests.text_models import sentences, tiny_model

KINDS = ("bert", "distilbert", "roberta")
NAMES = {"bert": "encoder.layer", "roberta": "encoder.layer", "distilbert": "transformer.layer"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(kind, root / kind) for kind in (*KINDS, "gpt2", "t5")}


def section(folder: Path) -> schema.Backbone:
    return schema.Backbone(name="hf", weights=str(folder), max_tokens=12)


def cut(folder: Path, **keys: Any) -> tuple[Any, Tail]:
    transfer = schema.Transfer.model_validate({"mode": "last_blocks", **keys})
    front, tail = open_network(section(folder), transfer, 3)
    assert tail is not None
    return front, tail


def whole(folder: Path) -> np.ndarray[Any, Any]:
    backbone = open_backbone(section(folder), 3)
    tokens = read_tokens(backbone, sentences(11))
    with torch.inference_mode():
        return np.concatenate([backbone.trunk()(torch.from_numpy(t[None])) for t in tokens])


def stored(front: Any, way: str, folder: Path) -> np.ndarray[Any, Any]:
    tokens = read_tokens(front, sentences(11))
    forward = open_forward(way, front, Exports(folder), lambda: sample(front, tokens))
    rows = np.zeros((11, forward.dim), np.float32)
    run(tokens, forward, rows.__setitem__, threads=1)
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [1, 2, INPUT])
def test_front_and_tail_are_the_trunk(
    kind: str, at: int | str, folders: dict[str, Path], tmp_path: Path
) -> None:
    front, tail = cut(folders[kind], cut=at)
    assert tail.shape == ((12, 1) if at == INPUT else (12, 9))
    for way in ("onnx", "torch"):
        rows = stored(front, way, tmp_path)
        assert rows.shape == (11, front.dim)
        ready = open_tail(tail)
        with ready.running() as module, torch.inference_mode():
            found = ready.forward(module, {}, torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(found, whole(folders[kind]), atol=1e-5)


def test_a_name_and_a_number_are_the_same_cut(folders: dict[str, Path]) -> None:
    for kind in KINDS:
        by_name, _ = cut(folders[kind], cut=f"{NAMES[kind]}.1")
        by_number, tail = cut(folders[kind], cut=1)
        assert by_name.identity() == by_number.identity()
        assert by_name.cut == f"{NAMES[kind]}.1"
        assert all(f"{NAMES[kind]}.1." in name for name in tail.recipe["trained"])


def test_any_process_builds_the_tail_from_plain_values(folders: dict[str, Path]) -> None:
    _, tail = cut(folders["bert"])
    assert json.loads(json.dumps(tail.recipe)) == tail.recipe
    again = Tail(tail.recipe, tail.shape, tail.width, dict(tail.tensors))
    _opened.cache_clear()
    one = open_tail(again).module.state_dict()
    for name, tensor in tail.tensors.items():
        np.testing.assert_array_equal(one[name].numpy(), tensor)


@pytest.mark.parametrize("mode", ["last_blocks", "lora", "bitfit", "adapter", "full"])
def test_what_is_trained_has_a_gradient(mode: str, folders: dict[str, Path]) -> None:
    front, tail = cut(folders["bert"], mode=mode, rank=2)
    tokens = read_tokens(front, sentences(5))
    with torch.no_grad():
        rows = torch.cat([front.trunk()(torch.from_numpy(t[None])) for t in tokens])
    own = {name: torch.tensor(value) for name, value in initial_tensors(tail).items()}
    assert own
    assert all(name.startswith(TAIL) for name in own)
    stream = torch.Generator().manual_seed(1)
    for value in own.values():  # low-rank factors start where half of the gradients are zero
        value += 0.05 * torch.randn(value.shape, generator=stream)
        value.requires_grad_(True)
    ready = open_tail(tail)
    with ready.running(training=True) as module:
        ready.forward(module, own, rows).square().sum().backward()
    blind = "key.bias"  # softmax does not see it
    dead = [n for n, v in own.items() if v.grad is None or not v.grad.abs().sum() > 0]
    assert all(blind in name or "position" in name or "token_type" in name for name in dead), dead


def test_recompute_keeps_tokens_and_trains_the_same(folders: dict[str, Path]) -> None:
    front, tail = cut(folders["bert"], activations="recompute")
    _, plain = cut(folders["bert"], activations="store")
    assert front.cut == INPUT
    assert tail.recipe["trained"] == plain.recipe["trained"]
    rows = torch.cat(
        [front.trunk()(torch.from_numpy(t[None])) for t in read_tokens(front, sentences(11))]
    )
    ready = open_tail(tail)
    with ready.running() as module, torch.inference_mode():
        found = ready.forward(module, {}, rows).numpy()
    np.testing.assert_allclose(found, whole(folders["bert"]), atol=1e-5)


def test_blocks_unfreeze_from_the_back(folders: dict[str, Path]) -> None:
    _, tail = cut(folders["bert"], mode="full")
    blocks = tail.recipe["blocks"]
    assert [name for block in blocks for name in block]
    assert sorted(n for block in blocks for n in block) == sorted(tail.recipe["trained"])
    assert all("encoder.layer.1." in name for name in blocks[-1])
    assert all("embeddings" in name for name in blocks[0])


def test_every_layer_is_a_place_to_cut(folders: dict[str, Path]) -> None:
    points = blocks_before(section(folders["bert"]), 3)
    assert [(p.blocks, p.name, p.shape) for p in points] == [
        (2, "encoder.layer.0", (12, 9)),
        (1, "encoder.layer.1", (12, 9)),
    ]
    assert points[0].parameters == 2 * points[1].parameters
    assert points[0].flops > points[1].flops > 0


def test_cuts_that_cannot_be(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"Did you mean 'encoder\.layer\.1'"):
        cut(folders["bert"], cut="encoder.layr.1")
    with pytest.raises(InputError, match="fewer blocks"):
        cut(folders["bert"], cut=3)
    for kind in ("gpt2", "t5"):
        with pytest.raises(InputError, match="can be cut"):
            cut(folders[kind])

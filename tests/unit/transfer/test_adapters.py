"""Biases, bottlenecks and prompt vectors behind the cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from fedtl.errors import InputError
from fedtl.transfer import cuts
from fedtl.transfer.adapters import adapters, biases, prompts

RECIPE: dict[str, Any] = {"width": 3, "targets": [], "seed": 2, "mode": "adapter"}


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 5),
        )  # fmt: skip


def reached(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_modules()}


def gradients(module: nn.Module, names: list[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    own = dict(module.named_parameters())
    leaves = {name: own[name].detach().clone().requires_grad_() for name in names}
    torch.func.functional_call(module, leaves, (x,)).square().sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def test_biases_are_all_of_them_and_behind_the_cut_alone() -> None:
    module = Small().eval().requires_grad_(False)
    assert biases(module, reached(module), RECIPE) == ["1.bias", "3.bias", "5.bias"]
    assert biases(module, {"5"}, RECIPE) == ["5.bias"]
    with pytest.raises(InputError, match="has a bias"):
        biases(module, {"0"}, RECIPE)


def test_adapters_change_nothing_at_first_and_then_learn() -> None:
    torch.manual_seed(0)
    plain = Small().eval().requires_grad_(False)
    module = copy.deepcopy(plain)
    names = adapters(module, reached(module), RECIPE)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(module(x), plain(x))
    assert {name.split(".")[0] for name in names} == {"0", "5"}
    found = gradients(copy.deepcopy(module), names, x)  # hooks are copied with their modules
    assert all(bool(found[name].any()) == (".up." in name) for name in names)
    again = copy.deepcopy(plain)
    adapters(again, reached(again), RECIPE)
    assert all(map(torch.equal, module.state_dict().values(), again.state_dict().values()))


def test_adapters_where_they_are_asked_for() -> None:
    module = Small().eval()
    names = adapters(module, reached(module), {**RECIPE, "targets": ["3"]})
    assert {name.split(".")[0] for name in names} == {"3"}
    with pytest.raises(InputError, match=r"transfer\.targets"):
        adapters(Small(), reached(module), {**RECIPE, "targets": ["attention"]})
    with pytest.raises(InputError, match="followed by an adapter"):
        adapters(Small(), {"3"}, RECIPE)


@pytest.fixture(scope="module")
def vision() -> tuple[Any, Any]:
    """A small vision transformer cut before its last block."""
    torch.manual_seed(0)
    trunk = VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=6).eval().requires_grad_(False)
    nn.init.normal_(trunk.heads.head.weight)  # torchvision has zeros there
    graph = cuts.trace(trunk)
    return graph, cuts.find(trunk, graph.graph, "encoder.layers.encoder_layer_1")


def test_prompts_are_read_and_the_first_token_stays_first(vision) -> None:
    front, back = cuts.split(*vision)
    tail = copy.deepcopy(back).eval()
    tokens = front(torch.randn(3, 3, 16, 16)).reshape(3, 5, 8)
    before = tail(tokens)
    names = prompts(tail, reached(back), {**RECIPE, "mode": "prompt"})
    assert names == ["prompt.vectors"]
    with_prompt = copy.deepcopy(tail)(tokens)
    assert with_prompt.shape == before.shape
    assert not torch.allclose(with_prompt, before)
    wanted = back(torch.cat([tokens, tail.prompt.vectors.expand(3, 3, 8)], 1))
    assert torch.equal(with_prompt, wanted)
    assert gradients(tail, names, tokens)["prompt.vectors"].any()


def test_prompts_need_attention_that_takes_more_tokens(vision) -> None:
    recipe = {**RECIPE, "mode": "prompt"}
    with pytest.raises(InputError, match="no attention of"):
        prompts(Small(), reached(Small()), recipe)
    graph, _ = vision
    whole = copy.deepcopy(cuts.split(graph, None)[1])
    with pytest.raises(InputError, match="takes no further tokens"):
        prompts(whole, reached(whole), recipe)

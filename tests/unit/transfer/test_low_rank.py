"""Low-rank additions: they change nothing at first, are peft's, and stacked are the average."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtl.errors import InputError
from fedtl.transfer.factors import SUM, A, B, layers, stacked, started
from fedtl.transfer.low_rank import chosen, low_rank

RECIPE: dict[str, Any] = {
    "rank": 2, "alpha": 8.0, "aggregation": "fedit", "targets": [], "seed": 3, "mode": "lora",
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Images(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8 * 16, 10),
        )  # fmt: skip


def placed(module: nn.Module, **changes: Any) -> list[str]:
    reached = {name for name, _ in module.named_modules()}
    return low_rank(module.eval().requires_grad_(False), reached, {**RECIPE, **changes})


def filled(module: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """Factors that are not zero."""
    torch.manual_seed(1)
    own = dict(module.named_parameters())
    return {name: torch.randn_like(own[name]) for name in names}


@pytest.mark.parametrize("aggregation", ["fedit", "ffa", "flora"])
@pytest.mark.parametrize(
    ("made", "shape", "targets"),
    [(Images, (4, 3, 11, 11), ["0", "2", "4"]), (Attention, (4, 5, 8), [])],
)
def test_b_of_zero_leaves_every_bit(made, shape, targets, aggregation) -> None:
    torch.manual_seed(0)
    plain = made().eval().requires_grad_(False)
    module = copy.deepcopy(plain)
    names = placed(module, aggregation=aggregation, targets=targets)
    x = torch.randn(shape)
    assert torch.equal(module(x), plain(x))
    assert torch.equal(copy.deepcopy(module)(x), plain(x))
    changed = torch.func.functional_call(module, filled(module, names), (x,))
    assert not torch.allclose(changed, plain(x))


def test_what_travels() -> None:
    ends = {"fedit": {"A", "B"}, "ffa": {"B"}, "flora": {"A", "B", "merged"}}
    for aggregation, wanted in ends.items():
        names = placed(Images(), aggregation=aggregation)
        assert {name.rpartition(".")[2] for name in names} == wanted
        # the grouped convolution and none else is left out
        assert {name.split(".")[0] for name in names} == {"0", "4"}


def test_forward_and_gradient_are_pefts() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = Images().double()
    plain[2] = nn.Conv2d(8, 8, 3).double()  # peft groups A as well
    mine = copy.deepcopy(plain)
    names = placed(mine, targets=["0", "2", "4"])
    mine.double()
    own = {n: t.double().requires_grad_() for n, t in filled(mine, names).items()}
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0", "2", "4"])
    theirs = peft.get_peft_model(copy.deepcopy(plain), config)
    given = dict(theirs.named_parameters())
    pairs = {}
    for layer in ("0", "2", "4"):
        for end, name in (("A", "lora_A"), ("B", "lora_B")):
            key = f"base_model.model.{layer}.{name}.default.weight"
            mine_key = f"{layer}.parametrizations.weight.0.{end}"
            given[key].data = own[mine_key].detach().reshape(given[key].shape).clone()
            pairs[mine_key] = given[key]
    x = torch.randn(3, 3, 11, 11, dtype=torch.float64)
    ours, other = torch.func.functional_call(mine, own, (x,)), theirs(x)
    torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)
    ours.square().sum().backward()
    other.square().sum().backward()
    for name, parameter in pairs.items():
        gradient = parameter.grad.reshape(own[name].shape)
        torch.testing.assert_close(own[name].grad, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers in an old way
def test_a_small_bert_is_pefts() -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=12,
    )  # fmt: skip
    plain = transformers.BertModel(config).eval()
    mine = copy.deepcopy(plain)
    names = placed(mine, targets=["query", "value"])
    own = filled(mine, names)
    asked = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["query", "value"])
    theirs = peft.get_peft_model(copy.deepcopy(plain), asked).eval()
    given = dict(theirs.named_parameters())
    for layer in layers(names):
        for end, name in ((A, "lora_A"), (B, "lora_B")):
            place = layer.removesuffix(".parametrizations.weight")
            given[f"base_model.model.{place}.{name}.default.weight"].data = own[layer + end]
    tokens = torch.randint(0, 20, (2, 7))
    ours = torch.func.functional_call(mine, own, (), {"input_ids": tokens}).last_hidden_state
    torch.testing.assert_close(ours, theirs(input_ids=tokens).last_hidden_state)
    assert len(names) == 8


def test_a_is_of_its_seed_layer_and_round() -> None:
    first = started(1, "tail.a", (4, 100))
    assert np.array_equal(first, started(1, "tail.a", (4, 100)))
    others = [started(2, "tail.a", (4, 100)), started(1, "tail.b", (4, 100))]
    others.append(started(1, "tail.a", (4, 100), round=1))
    assert not any(np.array_equal(first, other) for other in others)
    assert 0.09 < np.abs(first).max() <= 0.1  # 1 / sqrt(100)
    names = placed(module := Images())
    own = dict(module.named_parameters())[names[0]].numpy()
    layer = "tail." + names[0].removesuffix(A)
    assert np.array_equal(own, started(3, layer, own.shape))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"targets": ["conf"]}, "transfer.targets"),
        ({"rank": 9, "targets": ["0"]}, "transfer.rank"),
        ({"rank": 900}, "no layer behind the cut is larger"),
    ],
)
def test_refused(changes, says) -> None:
    with pytest.raises(InputError, match=says):
        placed(Images(), **changes)


def test_an_unknown_target_is_told_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'attention'"):
        placed(Attention(), targets=["atention"])


def _clients(count: int, out: int, rank: int, width: int):
    rng = np.random.default_rng(0)
    first = [rng.normal(size=(rank, width)).astype(np.float32) for _ in range(count)]
    second = [rng.normal(size=(out, rank)).astype(np.float32) for _ in range(count)]
    return first, second


def test_stacked_factors_are_the_average_of_full_updates() -> None:
    first, second = _clients(5, 30, 4, 40)
    weights = [0.1, 0.2, 0.3, 0.15, 0.25]
    wanted = sum(
        p * 2.0 * b.astype(np.float64) @ a.astype(np.float64)
        for p, a, b in zip(weights, first, second, strict=True)
    )
    found = stacked(weights, first, second, 2.0)
    assert np.abs(found - wanted).max() <= 1e-14 * np.abs(wanted).max()


def test_averaged_factors_are_not_and_by_how_much() -> None:
    """With independent factors of K equal clients the squared error is 1 - 1/K of the square."""
    for count in (2, 4, 8):
        first, second = _clients(count, 300, 8, 300)
        exact = stacked([1 / count] * count, first, second, 1.0)
        fedit = np.mean(second, 0) @ np.mean(first, 0)
        error = np.square(fedit - exact).sum() / np.square(exact).sum()
        assert error == pytest.approx(1 - 1 / count, abs=0.03)


def test_averaged_b_is_exact_where_a_is_everybodys() -> None:
    first, second = _clients(4, 30, 4, 40)
    weights = [0.4, 0.3, 0.2, 0.1]
    exact = stacked(weights, [first[0]] * 4, second, 3.0)
    mean = sum(p * b.astype(np.float64) for p, b in zip(weights, second, strict=True))
    assert np.abs(3.0 * mean @ first[0] - exact).max() <= 1e-13 * np.abs(exact).max()


def test_names_of_factors() -> None:
    names = placed(Images(), aggregation="flora")
    assert all(layer + end in names for layer in layers(names) for end in (A, B, SUM))


@pytest.mark.parametrize(
    ("target", "hint"),
    [("querry", "Did you mean 'query'?"), ("conv", "Parts of these names: layer, query, dense")],
)
def test_a_target_of_no_layer_is_told_which_there_are(target: str, hint: str) -> None:
    found = dict.fromkeys(("layer.0.query", "layer.0.dense", "layer.1.query"), "weight")
    with pytest.raises(InputError, match="no layer behind the cut") as caught:
        chosen(found, ["dense", target])
    assert (caught.value.got, caught.value.do) == (repr(target), hint)
    assert caught.value.allowed == ", ".join(found)
    assert list(chosen(found, ["query"])) == ["layer.0.query", "layer.1.query"]

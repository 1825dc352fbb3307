"""Other small things to train behind the cut: biases, bottlenecks, prompt vectors. Imports torch.

Sources: BitFit, Ben Zaken et al. 2022 (arXiv 2106.10199); bottleneck adapters, Houlsby et al. 2019
(1902.00751), here after single layers, for convolutions of size 1 as in Rebuffi et al. 2018
(1803.10082); visual prompt tuning, Jia et al. 2022 (2203.12119), its shallow form at the cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedtl import seeding
from fedtl.errors import InputError
from fedtl.transfer.drawing import seeded
from fedtl.transfer.low_rank import chosen, weights
from fedtl.types import TAIL

BIASES = ("bias", "in_proj_bias")


def biases(module: nn.Module, reached: Set[str], recipe: Mapping[str, Any]) -> list[str]:
    """Every bias behind the cut, also of norms; nothing is added.

    Raises InputError where there is none.
    """
    names = [
        f"{name}.{own}" if name else own
        for name, part in module.named_modules()
        if name in reached
        for own, _ in part.named_parameters(recurse=False)
        if own in BIASES
    ]
    if not names:
        raise _refused(recipe, "no layer behind the cut has a bias")
    return names


class Bottleneck(nn.Module):
    """up(relu(down(x))) over channels; zero at the start, as ``up`` is."""

    def __init__(self, layer: nn.Module, width: int, key: int) -> None:
        super().__init__()
        weight = layer.get_parameter("weight")
        out = int(weight.shape[0])
        kind: Any = nn.Linear
        more: tuple[int, ...] = ()
        if not isinstance(layer, nn.Linear):
            kind, more = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.ndim - 3], (1,)
        with seeded(key):  # or torch's own start would come out of what others draw
            self.down, self.up = kind(out, width, *more), kind(width, out, *more)
        stream, bound = seeding.generator(key, "adapter"), out**-0.5
        for own in (self.down.weight, self.down.bias):
            drawn = stream.uniform(-bound, bound, tuple(own.shape)).astype("float32")
            own.data = torch.from_numpy(drawn)
        for own in (self.up.weight, self.up.bias):
            own.data = torch.zeros_like(own)

    def forward(self, x: Tensor) -> Tensor:
        """What is added to a layer's output x, of its shape."""
        return self.up(torch.relu(self.down(x)))  # type: ignore[no-any-return]


def adapters(module: nn.Module, reached: Set[str], recipe: Mapping[str, Any]) -> list[str]:
    """A bottleneck of ``recipe["width"]`` after every layer that is a target, and its tensors.

    By default after every linear layer and convolution that mixes all its channels.

    Raises InputError where no layer is left, or a target is no layer's name.
    """
    named = bool(recipe["targets"])
    inner = {
        f"{name}.{child}"
        for name, part in module.named_modules()
        if isinstance(part, nn.MultiheadAttention)
        for child, _ in part.named_children()
    }  # which are read there, and never called
    found = {
        name: kind
        for name, kind in weights(module, reached).items()
        if kind == "weight" and name not in inner
    }
    names: list[str] = []
    for layer in chosen(found, recipe["targets"]):
        part = module.get_submodule(layer)
        if not named and getattr(part, "groups", 1) > 1:
            continue
        key = int(seeding.named_keys(recipe["seed"], "adapter", [TAIL + layer])[0])
        bottleneck = Bottleneck(part, recipe["width"], key).requires_grad_(False)
        part.add_module("adapter", bottleneck)
        part.register_forward_hook(_adapted)
        names += [f"{layer}.adapter.{own}" for own, _ in bottleneck.named_parameters()]
    if not names:
        raise _refused(recipe, "no layer behind the cut can be followed by an adapter")
    return names


def _adapted(part: nn.Module, given: Any, output: Tensor) -> Tensor:
    added: Tensor = part.get_submodule("adapter")(output)
    return output + added


class Prompt(nn.Module):
    """The same vectors [count, width] behind every example's tokens [n, tokens, width]."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [n, tokens + count, width]."""
        return torch.cat([x, self.vectors.expand(len(x), *self.vectors.shape)], dim=1)


def prompts(module: nn.Module, reached: Set[str], recipe: Mapping[str, Any]) -> list[str]:
    """``recipe["width"]`` trained vectors behind the tokens that cross the cut.

    They come last, so that whatever reads the first token (a vision transformer's class) finds it
    where it was.

    Raises InputError for a network whose part behind the cut takes no further tokens.
    """
    attention = [
        part
        for name, part in module.named_modules()
        if name in reached and isinstance(part, nn.MultiheadAttention)
    ]
    if not attention or not isinstance(module, fx.GraphModule):
        raise _refused(
            recipe,
            "prompt vectors are tokens, and no attention of torchvision's form stands behind the "
            "cut to read them",
        )
    count, width = recipe["width"], attention[0].embed_dim
    key = int(seeding.named_keys(recipe["seed"], "prompt", [TAIL + "prompt"])[0])
    bound = width**-0.5
    drawn = seeding.generator(key, "prompt").uniform(-bound, bound, (count, width))
    module.add_module("prompt", Prompt(torch.from_numpy(drawn.astype("float32"))))
    given = next(node for node in module.graph.nodes if node.op == "placeholder")
    with module.graph.inserting_after(given):
        joined = module.graph.call_module("prompt", (given,))
    given.replace_all_uses_with(joined, lambda user: user is not joined)
    module.recompile()
    try:
        with torch.inference_mode():
            module(torch.zeros(2, 3, width))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise _refused(
            recipe, "what stands behind the cut takes no further tokens: it counts those it gets"
        ) from error
    return ["prompt.vectors"]


def _refused(recipe: Mapping[str, Any], what: str) -> InputError:
    return InputError(
        what,
        where="transfer.mode",
        got=repr(recipe["mode"]),
        allowed='"lora", "last_blocks", or another transfer.cut',
        do="Cut the network elsewhere (transfer.cut), or train something else behind it",
    )

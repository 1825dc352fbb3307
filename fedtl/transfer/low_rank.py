"""``transfer.mode = "lora"``: low-rank additions to layers behind the cut. This file imports torch.

The addition is put on the weight itself (``torch.nn.utils.parametrize``), so that it reaches
whatever uses the weight: linear layers, convolutions of any kind, and attention, which reads its
projections without calling them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedtl.errors import InputError, nearest
from fedtl.transfer.factors import started
from fedtl.types import TAIL

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LowRank(nn.Module):
    """weight + merged + scale * B A, in the weight's own shape."""

    def __init__(self, first: Tensor, out: int, scale: float, merged: bool) -> None:
        super().__init__()
        rank, width = first.shape
        self.scale = scale
        self.A = nn.Parameter(first, requires_grad=False)
        self.B = nn.Parameter(torch.zeros(out, rank), requires_grad=False)
        zeros = torch.zeros(out, width) if merged else None
        self.merged = None if zeros is None else nn.Parameter(zeros, requires_grad=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its addition; with B = 0 and nothing merged its very values."""
        product = self.scale * (self.B @ self.A)
        if self.merged is not None:
            product = product + self.merged
        return weight + product.reshape(weight.shape)


def low_rank(module: nn.Module, reached: Set[str], recipe: Mapping[str, Any]) -> list[str]:
    """Put an addition on every layer that ``recipe["targets"]`` names; the trained factors' names.

    By default on every layer whose factors are smaller than it, grouped convolutions left out.
    With "ffa" A stays as it was drawn and only B is trained; with "flora" the sum of what earlier
    rounds added travels too.

    Raises:
        InputError: no layer has such a name, or one is smaller than the rank.
    """
    rank, named = recipe["rank"], bool(recipe["targets"])
    names: list[str] = []
    for layer, weight in chosen(weights(module, reached), recipe["targets"]).items():
        part = module.get_submodule(layer)
        out, width = _matrix(getattr(part, weight))
        smaller = rank * (out + width) < out * width and getattr(part, "groups", 1) == 1
        if not named and not smaller:
            continue
        if rank > min(out, width):
            raise InputError(
                f"{layer} has a weight of {out} x {width}: no addition to it has such a rank",
                where="transfer.rank",
                got=rank,
                allowed=f"1 to {min(out, width)}",
                do="Lower transfer.rank, or leave this layer out of transfer.targets",
            )
        place = f"{layer}.parametrizations.{weight}"
        first = torch.from_numpy(started(recipe["seed"], TAIL + place, (rank, width)))
        merged = recipe["aggregation"] == "flora"
        addition = LowRank(first, out, recipe["alpha"] / rank, merged)
        parametrize.register_parametrization(part, weight, addition, unsafe=True)
        trained = {"fedit": "AB", "ffa": "B", "flora": ("A", "B", "merged")}[recipe["aggregation"]]
        names += [f"{place}.0.{own}" for own in trained]
    if not names:
        raise InputError(
            "no layer behind the cut is larger than low-rank factors of it",
            where="transfer.rank",
            got=rank,
            do="Lower transfer.rank, or cut the network earlier (transfer.cut)",
        )
    return names


def weights(module: nn.Module, reached: Set[str]) -> dict[str, str]:
    """Layers behind the cut that have a matrix, and what that weight is called there."""
    found = {}
    for name, part in module.named_modules():
        if name not in reached:
            continue
        if isinstance(part, LAYERS):
            found[name] = "weight"
        elif isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            found[name] = "in_proj_weight"
    return found


def chosen(found: Mapping[str, str], targets: Sequence[str]) -> dict[str, str]:
    """Of the layers those whose names have one of the ``targets`` as a part; all without targets.

    Raises InputError for a target that is part of no name.
    """
    for target in targets:
        if not any(target in name for name in found):
            parts = [part for name in found for part in name.split(".") if not part.isdigit()]
            guess = nearest(target, [*found, *parts])
            known = f"Parts of these names: {', '.join([*dict.fromkeys(parts)][:12])}"
            raise InputError(
                "no layer behind the cut has this in its name",
                where="transfer.targets",
                got=repr(target),
                allowed=", ".join(list(found)[-12:]) or "nothing: there is no such layer",
                do=f"Did you mean {guess!r}?" if guess else known if found else None,
            )
    return {n: w for n, w in found.items() if not targets or any(t in n for t in targets)}


def _matrix(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a weight seen as a matrix."""
    return weight.shape[0], weight[0].numel()

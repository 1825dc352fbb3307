"""What of the network behind the cut is trained, and what is added to it for that.

Each mode makes a module ready in place and names the tensors of it that travel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from torch import nn

from fedtl.errors import InputError
from fedtl.transfer.adapters import adapters, biases, prompts
from fedtl.transfer.low_rank import low_rank

Mode = Callable[[nn.Module, Set[str], Mapping[str, Any]], list[str]]
"""Takes the module behind the stored activations, the names of those of its modules that stand
behind the cut, and the recipe; gives the names of what is trained."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

STATISTICS = ("running_mean", "running_var")
"""Batch norm's own, which move with each batch."""

MOST_GROUPS = 32
"""Of group norm (Wu and He 2018); fewer where they do not divide the channels."""


def whole(module: nn.Module, reached: Set[str], recipe: Mapping[str, Any]) -> list[str]:
    """Everything behind the cut, batch norm as ``recipe["batch_norm"]`` has it.

    frozen: weight, bias and statistics as pretrained. local and aggregated: all four trained, the
    statistics by the batches they see (FedBN, Li et al. 2021, keeps them at the client;
    ``strategies.local_norms``). group: group norm in its place, with its weight and bias.
    """
    kind = recipe["batch_norm"]
    if kind == "group":
        for name, part in [*module.named_modules()]:
            if name in reached and isinstance(part, NORMS):
                module.set_submodule(name, _group_norm(part))
    trained = []
    for name, part in module.named_modules():
        normed = isinstance(part, NORMS)
        if name not in reached or (normed and kind == "frozen"):
            continue
        own = [tensor for tensor, _ in part.named_parameters(recurse=False)]
        if normed and part.running_mean is not None:
            _refuse_counting(name, part)
            own += STATISTICS
        trained += [f"{name}.{tensor}" if name else tensor for tensor in own]
    return trained


def _refuse_counting(name: str, norm: nn.Module) -> None:
    """Raise InputError where steps of statistics follow from how many batches a module has seen.

    That number is no tensor of a client's: whoever used the module before would have a say.
    """
    if getattr(norm, "momentum", None) is None:
        raise InputError(
            f"batch norm {name!r} averages over all batches it ever saw (momentum = None)",
            where="transfer.batch_norm",
            allowed='"frozen" or "group"',
            do="Give that layer a momentum, or set transfer.batch_norm",
        )


def _group_norm(norm: nn.Module) -> nn.GroupNorm:
    """Group norm with a batch norm's weight and bias, in eval mode and frozen like it."""
    assert isinstance(norm, NORMS)
    channels = norm.num_features
    groups = max(n for n in range(1, MOST_GROUPS + 1) if channels % n == 0)
    made = nn.GroupNorm(groups, channels, norm.eps, norm.affine)
    if norm.affine:
        made.load_state_dict({"weight": norm.weight, "bias": norm.bias})
    made.requires_grad_(requires_grad=False)
    return made.eval()


MODES: Mapping[str, Mode] = {
    **{"last_blocks": whole, "full": whole, "scratch": whole},
    **{"lora": low_rank, "bitfit": biases, "adapter": adapters, "prompt": prompts},
}
"""How each ``transfer.mode`` makes a tail ready."""

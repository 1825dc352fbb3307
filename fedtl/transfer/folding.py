"""Batch norm folded into the convolution before it: the same function with half the layers.

This file imports torch; import it only where a trunk has to be built.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def copy_channels_last(trunk: nn.Module) -> nn.Module:
    """A copy of a trunk in the memory layout that convolutions like best."""
    return copy.deepcopy(trunk).to(memory_format=torch.channels_last)


def fold_batch_norm(trunk: nn.Module, example: npt.NDArray[np.integer[Any]]) -> nn.Module:
    """A copy of a trunk, each batch norm that follows a convolution folded into it.

    Who follows whom is seen by running the example, so models that cannot be traced fold as well.
    The caller compares the result with the original: a convolution whose output is used a second
    time would show there.

    Args:
        trunk: in evaluation mode.
        example: uint8 [1, S, S, 3].
    """
    folded = copy_channels_last(trunk)
    for conv, norm in _pairs(folded, example):
        layer, batch_norm = folded.get_submodule(conv), folded.get_submodule(norm)
        fused = fuse_conv_bn_eval(cast(nn.Conv2d, layer), cast(nn.BatchNorm2d, batch_norm))
        folded.set_submodule(conv, fused)
        folded.set_submodule(norm, nn.Identity())
    return folded.eval()


def _pairs(model: nn.Module, example: npt.NDArray[np.integer[Any]]) -> list[tuple[str, str]]:
    """(convolution, batch norm) where the norm, and no other layer, takes the convolution's output.

    MaxViT's stem, for one, feeds a batch norm and a shortcut: that pair must stay.
    """
    made: dict[int, str] = {}
    alive: list[Tensor] = []  # keeps ids from being given twice
    calls: dict[str, int] = {}
    takers: dict[str, list[str]] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            for taken in inputs:
                if id(taken) in made:
                    takers.setdefault(made[id(taken)], []).append(name)
            if isinstance(module, nn.Conv2d):
                made[id(output)] = name
                alive.append(output)

        return module.register_forward_hook(hook)

    handles = [
        watch(name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) or not any(module.children())
    ]
    try:
        with torch.inference_mode():
            model(torch.from_numpy(example))
    finally:
        for handle in handles:
            handle.remove()
    pairs = [(conv, names[0]) for conv, names in takers.items() if len(names) == 1]
    return [
        (conv, norm)
        for conv, norm in pairs
        if calls[conv] == calls[norm] == 1
        and isinstance(batch_norm := model.get_submodule(norm), nn.BatchNorm2d)
        and batch_norm.running_mean is not None
    ]

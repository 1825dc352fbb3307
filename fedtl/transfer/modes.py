"""What of the network behind the cut is trained, and what is added to it for that.

Each mode makes a module ready in place and names the tensors of it that travel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

from torch import nn

Mode = Callable[[nn.Module, Set[str], Mapping[str, Any]], list[str]]
"""Takes the module behind the stored activations, the names of those of its modules that stand
behind the cut, and the recipe; gives the names of what is trained."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def whole(module: nn.Module, reached: Set[str], recipe: Mapping[str, Any]) -> list[str]:
    """Everything behind the cut, batch norm as ``recipe["batch_norm"]`` has it."""
    frozen = recipe["batch_norm"] == "frozen"
    return [
        f"{name}.{own}" if name else own
        for name, part in module.named_modules()
        if name in reached and not (frozen and isinstance(part, NORMS))
        for own, _ in part.named_parameters(recurse=False)
    ]


MODES: Mapping[str, Mode] = {"last_blocks": whole, "full": whole, "scratch": whole}
"""How each ``transfer.mode`` makes a tail ready."""

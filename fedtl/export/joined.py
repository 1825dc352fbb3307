"""Trunk, network behind the cut and head as one torch module. This file imports torch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedtl.clients.networks import scores
from fedtl.transfer.hf_trunk import PADDING
from fedtl.transfer.tails import open_tail
from fedtl.transfer.tracing import ONE_TRACE
from fedtl.types import TAIL, Head, Tail


class Behind(nn.Module):
    """What is behind the cut: activations [n, A] -> scores and probabilities, [n, C] each."""

    def __init__(self, tail: Tail | None, head: Head) -> None:
        super().__init__()
        self.shape = None if tail is None else tail.shape
        self.network: nn.Module | None = None
        if tail is not None:
            opened = open_tail(tail)
            with opened.running() as module:
                self.network = _copy(module)
            own = {n[len(TAIL) :]: torch.tensor(t) for n, t in head.items() if n.startswith(TAIL)}
            self.network.load_state_dict(own, strict=False)
        self._names = {name.replace(".", "_"): name for name in head if not name.startswith(TAIL)}
        for safe, name in self._names.items():
            self.register_buffer(f"head_{safe}", torch.tensor(head[name]))
        self.requires_grad_(False)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and their softmax."""
        if self.network is not None and self.shape is not None:
            x = self.network(x.reshape(-1, *self.shape))
        found = scores({n: getattr(self, f"head_{safe}") for safe, n in self._names.items()}, x)
        return found, torch.softmax(found, dim=1)


class Joined(nn.Module):
    """The whole model, from what the trunk takes to scores and probabilities.

    Args:
        front: the trunk as far as the cut; None where examples are its activations already.
        half: round activations at the cut to half precision, as the run stored them.
    """

    def __init__(self, front: nn.Module | None, behind: Behind, half: bool) -> None:
        super().__init__()
        self.front, self.behind, self.half_precision = front, behind, half
        self.requires_grad_(False)
        self.eval()

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and probabilities, float32 [n, C] each."""
        x: Tensor = given[0] if self.front is None else self.front(*given)
        x = x.to(torch.float16).to(torch.float32) if self.half_precision else x
        found: tuple[Tensor, Tensor] = self.behind(x)
        return found


class TextFront(nn.Module):
    """A trunk of texts from what tokenizers give: numbers, and 1 where there is a token."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """float32 [n, A] from int64 [n, t] twice."""
        found: Tensor = self.trunk(torch.where(attention_mask > 0, input_ids, PADDING))
        return found


def _copy(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module)


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Torch without its fused attention, which no exporter knows, and without its warnings.

    One thread at a time: all of this is the process's.
    """
    import io

    with ONE_TRACE:
        fused = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def runner(module: Callable[..., Any]) -> Callable[[Mapping[str, Any]], tuple[Any, Any]]:
    """A module as a function from arrays by name to arrays of scores and probabilities."""

    def run(given: Mapping[str, Any]) -> tuple[Any, Any]:
        with torch.inference_mode():
            found = module(*(torch.from_numpy(array) for array in given.values()))
        return found[0].numpy(), found[1].numpy()

    return run

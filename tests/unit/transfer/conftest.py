"""A tiny trunk, so that the store can be tested without a real network."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedtl.transfer.backbones import Backbone
from fedtl.transfer.preprocessing import Preprocessing

TINY = Preprocessing(16, 16, "bilinear", (127.0, 120.0, 110.0), (128.0, 60.0, 64.0))


def build_tiny(kind: str = "sound") -> Any:
    """Convolution, batch norm, ReLU, mean; other kinds are broken in one way each."""
    import torch
    from torch import nn

    from fedtl.transfer.trunks import Trunk

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, stride=2)
            self.norm = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.5)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Any) -> Any:
            x = self.norm(self.conv(x))
            if kind == "counts":  # a buffer that moves in evaluation mode
                self.seen += 1
            if kind == "unexportable":
                x = torch.special.airy_ai(x.double()).float()
            if kind == "nan":
                x = x / 0.0 * 0.0
            if kind == "huge":
                x = x.abs() * 1e9 + 1e9
            return self.drop(torch.relu(x).mean((2, 3)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = Pooled()
        body.norm.running_mean.uniform_(-1, 1)
        body.norm.running_var.uniform_(0.5, 2)
    return Trunk(body, TINY)


@pytest.fixture
def tiny() -> Callable[..., Backbone]:
    def make(kind: str = "sound", **changes: Any) -> Backbone:
        values: dict[str, Any] = {
            "name": "tiny",
            "cut": "penultimate",
            "preprocessing": TINY,
            "weights_hash": kind,
            "weights_source": "random",
            "builder": functools.partial(build_tiny, kind),
            "known_dim": 8,
        }
        return Backbone(**(values | changes))

    return make


@pytest.fixture
def pixels() -> np.ndarray:
    """Fifty random images, uint8 [50, 20, 24, 3]."""
    return np.random.default_rng(3).integers(0, 256, (50, 20, 24, 3), dtype=np.uint8)

"""Networks without their weights, from plain values: what any process builds a tail from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fedtl.transfer.preprocessing import Preprocessing


def _torchvision(facts: Mapping[str, Any]) -> nn.Module:
    from fedtl.transfer import trunks
    from fedtl.transfer.backbones import EMBEDDED

    preprocessing = Preprocessing(
        facts["resize"],
        facts["crop"],
        facts["interpolation"],
        tuple(facts["mean"]),
        tuple(facts["std"]),
    )
    if facts["name"] == EMBEDDED:
        return trunks.build_efficientnet_lite0(preprocessing, None, facts["key"], "")
    return trunks.build_torchvision(facts["name"], preprocessing, None, facts["key"], "")


SKELETONS: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {"torchvision": _torchvision}
"""How each kind of network is built from a backbone's ``skeleton``."""


def skeleton(facts: Mapping[str, Any]) -> nn.Module:
    """The trunk that a backbone's ``skeleton`` describes, with weights of no meaning."""
    return SKELETONS[facts["kind"]](facts)

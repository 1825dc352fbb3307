"""Networks without their weights, from plain values: what any process builds a tail from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fedtl.transfer.preprocessing import Preprocessing


def _torchvision(facts: Mapping[str, Any]) -> nn.Module:
    from fedtl.transfer import trunks
    from fedtl.transfer.backbones import EMBEDDED

    preprocessing = _preprocessing(facts)
    if facts["name"] == EMBEDDED:
        return trunks.build_efficientnet_lite0(preprocessing, None, facts["key"], "")
    return trunks.build_torchvision(facts["name"], preprocessing, None, facts["key"], "")


def _timm(facts: Mapping[str, Any]) -> nn.Module:
    from fedtl.transfer.timm_trunk import build_timm

    return build_timm(facts["name"], _preprocessing(facts), None, facts["key"], "")


def _of_code(facts: Mapping[str, Any]) -> nn.Module:
    from fedtl.transfer.hub_trunk import build_bare

    return build_bare(facts, _preprocessing(facts))


def _of_texts(facts: Mapping[str, Any]) -> nn.Module:
    from fedtl.transfer.hf_tail import bare

    return bare(facts)


def _preprocessing(facts: Mapping[str, Any]) -> Preprocessing:
    return Preprocessing(
        facts["resize"],
        facts["crop"],
        facts["interpolation"],
        tuple(facts["mean"]),
        tuple(facts["std"]),
    )


SKELETONS: Mapping[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "hf": _of_texts,
    "hub": _of_code,
    "module": _of_code,
}
"""How each kind of network is built from a backbone's ``skeleton``; hub and module run a user's own
code, so none of theirs may come from somebody else."""


def skeleton(facts: Mapping[str, Any]) -> nn.Module:
    """The trunk that a backbone's ``skeleton`` describes, with weights of no meaning."""
    return SKELETONS[facts["kind"]](facts)

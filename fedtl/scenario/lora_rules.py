"""What cannot go together with low-rank and other modules behind the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario

MODULES = ("lora", "bitfit", "adapter", "prompt")
"""Modes that train a little of what is behind the cut, or beside it."""


def _behind(scenario: Scenario) -> Iterator[Problem]:
    transfer = scenario.transfer
    if transfer.mode not in MODULES:
        return
    if transfer.cut == 0:
        yield Problem(
            "transfer.cut",
            f'"{transfer.mode}" changes what is behind the cut, and there is nothing',
            "0",
            "at least 1, or a module's name",
        )
    if transfer.batch_norm != "frozen":
        yield Problem(
            "transfer.batch_norm",
            f'"{transfer.mode}" leaves the network as it was pretrained, its statistics too',
            repr(transfer.batch_norm),
            '"frozen", or transfer.mode = "last_blocks"',
        )
    if transfer.mode == "prompt" and transfer.activations == "recompute":
        yield Problem(
            "transfer.activations",
            "prompt vectors join the tokens at the cut, so those are what is stored",
            '"recompute"',
            '"auto" or "store"',
        )


def _used(scenario: Scenario) -> Iterator[Problem]:
    transfer = scenario.transfer
    users = {
        "rank": ("lora",),
        "alpha": ("lora",),
        "aggregation": ("lora",),
        "targets": ("lora", "adapter"),
        "width": ("adapter", "prompt"),
    }
    plain = type(transfer)()
    for key, modes in users.items():
        if transfer.mode not in modes and getattr(transfer, key) != getattr(plain, key):
            yield Problem(
                f"transfer.{key}",
                f'"{transfer.mode}" makes no use of it',
                repr(getattr(transfer, key)),
                do=f'Leave it out, or set transfer.mode = "{modes[0]}"',
            )


def _stacking(scenario: Scenario) -> Iterator[Problem]:
    transfer = scenario.transfer
    if transfer.mode != "lora" or transfer.aggregation != "flora":
        return
    name, other = scenario.strategy.name, '"fedit" or "ffa"'
    if name not in ("fedavg", "fedprox"):
        yield Problem(
            "transfer.aggregation",
            f'stacking adds products of factors, and "{name}" combines the factors themselves',
            '"flora"',
            f'{other}, or strategy.name = "fedavg" or "fedprox"',
        )
    if scenario.privacy.secure_aggregation != "none":
        yield Problem(
            "privacy.secure_aggregation",
            "it gives the server a sum of factors, and stacking needs each client's own",
            repr(scenario.privacy.secure_aggregation),
            '"none", or transfer.aggregation = "ffa", which is exact in a sum',
        )
    if scenario.privacy.mechanism != "none":
        yield Problem(
            "privacy.mechanism",
            "what is clipped and noised are factors, and noise in both is multiplied in their "
            "product",
            repr(scenario.privacy.mechanism),
            '"none", or transfer.aggregation = "ffa", where noise stays as it is',
        )
    if scenario.compression.kind != "none":
        yield Problem(
            "compression.kind",
            "errors in both factors are multiplied in their product, which is exact without them",
            repr(scenario.compression.kind),
            f'"none", or transfer.aggregation = {other}',
        )


def _one_rate(scenario: Scenario) -> Iterator[Problem]:
    transfer = scenario.transfer
    if transfer.mode == "head" or transfer.rate_factor == 1:
        return
    if scenario.strategy.name == "scaffold":
        yield Problem(
            "transfer.rate_factor",
            "SCAFFOLD's variates are updates divided by one learning rate; with two they diverge",
            f"{transfer.rate_factor:g}",
            '1, or strategy.name = "fedavg"',
        )


LORA_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = (
    _behind, _used, _stacking, _one_rate,
)  # fmt: skip
"""What cannot go together with modules behind the cut."""

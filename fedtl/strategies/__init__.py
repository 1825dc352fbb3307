"""Strategies by the name a scenario gives them."""

from __future__ import annotations

from collections.abc import Callable

from fedtl.scenario import schema
from fedtl.strategies.averaging import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
from fedtl.strategies.base import ServerState, Strategy

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
}

__all__ = ["STRATEGIES", "ServerState", "Strategy", "make_strategy"]


def make_strategy(section: schema.Strategy) -> Strategy:
    """The strategy a scenario asks for; its parameters are the section's other keys."""
    return STRATEGIES[section.name](**section.model_dump(exclude={"name"}))

"""Strategies by the name a scenario gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedtl.errors import client_of
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


def make_strategy(section: schema.Strategy, names: Sequence[str], seed: int) -> Strategy:
    """The strategy a scenario asks for; its parameters are the section's other keys.

    Args:
        names: the clients', by id; a strategy that trusts one of them is told its id.
        seed: the scenario's, for strategies that draw something.

    Raises:
        InputError: a name that no client has.
    """
    given = section.model_dump(exclude={"name"})
    if "root" in given:
        given["root"] = client_of(given["root"], names, "strategy.root")
    build = STRATEGIES[section.name]
    if "seed" in getattr(build, "__dataclass_fields__", {}):
        given["seed"] = seed
    return build(**given)

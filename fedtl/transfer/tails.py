"""The network between the cut and the head: found, described as plain values, built anywhere.

A server, a simulation and every client make the same tail from the same description, so only the
tensors that are trained ever travel.
"""

from __future__ import annotations

import copy
import functools
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtl.errors import InputError
from fedtl.scenario import schema
from fedtl.transfer.backbones import INPUT, Backbone, open_backbone
from fedtl.transfer.heads import initial_head
from fedtl.types import TAIL, Float32, Head, Tail

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fedtl.transfer.cuts import Boundary

WHOLE = ("full", "scratch")
"""Modes that train the whole network."""


def open_network(
    section: schema.Backbone, transfer: schema.Transfer, seed: int
) -> tuple[Backbone, Tail | None]:
    """The trunk up to the cut, and what is trained behind it; None where only the head is.

    Args:
        section, transfer: the scenario's ``[backbone]`` and ``[transfer]``.
        seed: the scenario's.

    Raises:
        InputError: unknown model or weights, no such cut, or a network that cannot be cut.
        SecurityRefusal: the weights file has not the stated hash.
    """
    if transfer.mode == "scratch":
        section = section.model_copy(update={"weights": "none", "sha256": None})
    backbone = open_backbone(section, seed)
    cut = transfer.cut
    if cut is None:
        cut = "input" if transfer.mode in WHOLE else 1
    if transfer.mode == "head" or cut == 0:
        return backbone, None
    if not backbone.skeleton:
        raise InputError(
            f"{backbone.name} cannot be cut: only its output is known",
            where="transfer.mode",
            got=repr(transfer.mode),
            allowed='"head"',
            do='Set transfer.mode = "head", or use a backbone that comes as torch modules',
        )
    return _cut(backbone, transfer, cut)


def initial_tensors(tail: Tail | None) -> dict[str, Float32]:
    """The tensors behind the cut that are trained, by the names a head has them under."""
    if tail is None:
        return {}
    return {TAIL + name: tail.tensors[name].astype(np.float32) for name in tail.recipe["trained"]}


def first_head(scenario: schema.Scenario, tail: Tail | None, width: int, num_classes: int) -> Head:
    """What every client starts from in round 1: what is trained behind the cut, and the head.

    Args:
        width: D of what the head stands on.
    """
    return {
        **initial_tensors(tail),
        **initial_head(scenario.head, width, num_classes, scenario.seed),
    }


def _cut(
    backbone: Backbone, transfer: schema.Transfer, cut: str | int
) -> tuple[Backbone, Tail | None]:
    from fedtl.transfer import cuts

    trunk = backbone.trunk()
    graph = cuts.trace(trunk)
    place = None if cut == INPUT else cuts.find(trunk, graph.graph, cut)
    where = INPUT if place is None else place.names[0]
    recipe = {
        "skeleton": dict(backbone.skeleton),
        "cut": where,
        "mode": transfer.mode,
        "batch_norm": transfer.batch_norm,
        "recompute": transfer.activations == "recompute",
        "rank": transfer.rank,
        "alpha": transfer.alpha,
        "aggregation": transfer.aggregation,
        "targets": list(transfer.targets),
        "width": transfer.width,
    }
    stored = None if recipe["recompute"] else place
    module, trained = _behind(graph, stored, place, recipe)
    shape = _shape(backbone, graph, stored)
    tensors = {name: own.detach().cpu().numpy() for name, own in module.state_dict().items()}
    tail = Tail({**recipe, "trained": trained}, shape, backbone.dim, tensors)
    front = replace(
        backbone,
        cut=INPUT if stored is None else where,
        builder=functools.partial(_front, backbone, where if stored is not None else INPUT),
        known_dim=prod(shape),
    )
    return front, tail


def _front(backbone: Backbone, cut: str) -> nn.Module:
    """The part before the cut, frozen."""
    from fedtl.transfer import cuts

    trunk = backbone.trunk()
    graph = cuts.trace(trunk)
    place = None if cut == INPUT else cuts.find(trunk, graph.graph, cut)
    return cuts.split(graph, place)[0].eval().requires_grad_(False)


def _behind(
    graph: Any, stored: Boundary | None, place: Boundary | None, recipe: Mapping[str, Any]
) -> tuple[nn.Module, list[str]]:
    """What stands behind the stored activations, made ready for its mode; what of it is trained."""
    from fedtl.transfer import cuts
    from fedtl.transfer.modes import MODES

    module = cuts.split(graph, stored)[1].eval().requires_grad_(False)
    within = module if stored is place else cuts.split(graph, place)[1]
    reached = {name for name, _ in within.named_modules()}
    return module, MODES[recipe["mode"]](module, reached, recipe)


def _shape(backbone: Backbone, graph: Any, place: Boundary | None) -> tuple[int, ...]:
    """The shape of one example's activations at a boundary."""
    import torch

    from fedtl.transfer import cuts

    size = backbone.image_size
    example = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    if place is None:
        return tuple(example.shape[1:])
    return cuts.value_shape(graph, place, example)


@dataclass
class OpenTail:
    """A tail ready to run; several threads may, each with a copy of the module."""

    tail: Tail
    module: nn.Module
    _idle: queue.SimpleQueue[nn.Module] = field(default_factory=queue.SimpleQueue)

    @contextmanager
    def running(self, training: bool = False) -> Iterator[nn.Module]:
        """A module that nobody else runs meanwhile.

        Args:
            training: batch norm whose statistics are trained takes them from each batch, and moves
                the running ones that it is given.
        """
        try:
            module = self._idle.get_nowait()
        except queue.Empty:
            module = copy.deepcopy(self.module)
        for name, part in module.named_modules():
            part.training = training and f"{name}.running_mean" in self._moving
        try:
            yield module
        finally:
            self._idle.put(module)

    @functools.cached_property
    def _moving(self) -> frozenset[str]:
        return frozenset(self.tail.recipe["trained"])

    def forward(
        self, module: nn.Module, own: Mapping[str, torch.Tensor], x: torch.Tensor
    ) -> torch.Tensor:
        """What the head stands on, [n, D], from activations [n, prod(shape)].

        Args:
            module: from ``running``.
            own: tensors by a head's names; those behind the cut are used in place of the module's.
        """
        import torch

        mine = {name[len(TAIL) :]: own for name, own in own.items() if name.startswith(TAIL)}
        given = x.reshape(-1, *self.tail.shape)
        result: torch.Tensor = torch.func.functional_call(module, mine, (given,))
        return result


_ONE_AT_A_TIME = threading.Lock()


def open_tail(tail: Tail) -> OpenTail:
    """The tail ready to run; built once per process, whoever asks first."""
    with _ONE_AT_A_TIME:
        return _opened(tail)


@functools.lru_cache(maxsize=4)
def _opened(tail: Tail) -> OpenTail:
    import torch

    from fedtl.transfer import cuts
    from fedtl.transfer.skeletons import skeleton

    facts = tail.recipe
    trunk = skeleton(facts["skeleton"])
    graph = cuts.trace(trunk)
    place = None if facts["cut"] == INPUT else cuts.find(trunk, graph.graph, facts["cut"])
    module, _ = _behind(graph, None if facts["recompute"] else place, place, facts)
    module.load_state_dict({name: torch.tensor(own) for name, own in tail.tensors.items()})
    return OpenTail(tail, module)

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
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedtl.errors import InputError
from fedtl.scenario import schema
from fedtl.transfer.backbones import INPUT, Backbone, open_backbone
from fedtl.transfer.heads import initial_head
from fedtl.types import TAIL, Float32, Head, Tail

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fedtl.transfer.cuts import Boundary, CutPoint
    from fedtl.transfer.hf_modules import TextTrunk

WHOLE = ("full", "scratch")
"""Modes that train the whole network."""

STORED_BYTES = 4 * 2**30
"""Activations up to this size are stored where that is left open. No free space is looked at: a run
that is resumed must decide as it did before."""


def open_network(
    section: schema.Backbone, transfer: schema.Transfer, seed: int, examples: int = 0
) -> tuple[Backbone, Tail | None]:
    """The trunk up to the cut, and what is trained behind it; None where only the head is.

    Args:
        section, transfer: the scenario's ``[backbone]`` and ``[transfer]``.
        seed: the scenario's.
        examples: that there are, for ``transfer.activations = "auto"``; clients with data of their
            own may decide otherwise than each other, as what is trained is the same.

    Raises:
        InputError: unknown model or weights, no such cut, or a network that cannot be cut.
        SecurityRefusal: the weights file has not the stated hash.
    """
    backbone = open_backbone(trunk_section(section, transfer), seed)
    cut = transfer.cut
    if cut is None:
        cut = "input" if transfer.mode in WHOLE else 1
    if transfer.mode == "head" or cut == 0:
        return backbone, None
    _refuse_uncut(backbone, "transfer.mode", transfer.mode)
    return _cut(backbone, transfer, cut, seed, section.feature_dtype, examples)


def trunk_section(section: schema.Backbone, transfer: schema.Transfer) -> schema.Backbone:
    """The scenario's ``[backbone]`` as the whole trunk is opened: from scratch, nobody needs (or is
    sent) pretrained weights."""
    if transfer.mode != "scratch":
        return section
    return section.model_copy(update={"weights": "none", "sha256": None})


def before_training(scenario: schema.Scenario) -> schema.Scenario:
    """The scenario with the network as it was pretrained, uncut: what gaps are measured on."""
    return scenario.model_copy(update={"transfer": schema.Transfer()})


def _refuse_uncut(backbone: Backbone, where: str, got: str) -> None:
    if backbone.skeleton:
        return
    of_rows = backbone.takes == "rows"
    raise InputError(
        f"{backbone.name} cannot be cut: "
        + ("it has no layers to be trained" if of_rows else "only its output is known"),
        where=where,
        got=repr(got),
        allowed='"head"' if where == "transfer.mode" else None,
        do='Keep transfer.mode = "head"'
        + (
            '; head.kind = "mlp" trains more than one layer'
            if of_rows
            else ", or use a network that comes as torch modules"
        ),
    )


def blocks_before(section: schema.Backbone, seed: int) -> list[CutPoint]:
    """Every block that a scenario's network can be cut before, from the input on.

    Raises:
        InputError: unknown model or weights, or a network that cannot be cut.
    """
    import torch

    from fedtl.transfer import cuts

    backbone = open_backbone(section, seed)
    _refuse_uncut(backbone, "backbone.name", section.name)
    if backbone.takes == "texts":
        from fedtl.transfer.hf_tail import text_points

        return text_points(backbone)
    size = backbone.image_size
    example = torch.zeros(1, size, size, 3, dtype=torch.uint8)
    return cuts.cut_points(backbone.trunk(), example)


def initial_tensors(tail: Tail | None) -> dict[str, Float32]:
    """The tensors behind the cut that are trained, by the names a head has them under."""
    if tail is None:
        return {}
    return {TAIL + name: tail.tensors[name].astype(np.float32) for name in tail.recipe["trained"]}


def still_in(tail: Tail | None, unfrozen: int) -> tuple[str, ...]:
    """Names of what is not trained while so many blocks from the back are; 0 is for all of them."""
    if tail is None or not unfrozen:
        return ()
    blocks: list[list[str]] = tail.recipe["blocks"]
    return tuple(TAIL + name for block in blocks[:-unfrozen] for name in block)


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
    backbone: Backbone,
    transfer: schema.Transfer,
    cut: str | int,
    seed: int,
    dtype: str,
    examples: int,
) -> tuple[Backbone, Tail | None]:
    from fedtl.transfer import cuts

    if backbone.takes == "texts":
        from fedtl.transfer.hf_tail import cut_text

        most = STORED_BYTES // max(1, examples)
        return cut_text(backbone, transfer, cut, _plain_recipe(backbone, transfer, seed), most)
    trunk = backbone.trunk()
    graph = cuts.trace(trunk)
    place = None if cut == INPUT else cuts.find(trunk, graph.graph, cut)
    where = INPUT if place is None else place.names[0]
    shape = _shape(backbone, graph, place)
    again = transfer.activations == "recompute" or (
        transfer.activations == "auto"
        and examples * stored_bytes(prod(shape), dtype) > STORED_BYTES
        and stored_bytes(prod(shape), dtype) > pixel_bytes(backbone)
    )
    recipe = _plain_recipe(backbone, transfer, seed)
    recipe |= {"cut": where, "recompute": again and place is not None}
    stored = None if recipe["recompute"] else place
    module, trained = _behind(graph, stored, place, recipe)
    _refuse_asleep(module, recipe)
    parts = {name.removeprefix("body."): part for name, part in trunk.named_modules()}
    recipe["blocks"] = cuts.blocks_of(graph, cuts.blocks(graph.graph, parts), trained)
    tensors = {name: own.detach().cpu().numpy() for name, own in module.state_dict().items()}
    if stored is not place:
        shape = _shape(backbone, graph, stored)
    tail = Tail({**recipe, "trained": trained}, shape, backbone.dim, tensors)
    front = replace(
        backbone,
        cut=INPUT if stored is None else where,
        builder=functools.partial(_front, backbone, where if stored is not None else INPUT),
        known_dim=prod(shape),
    )
    return front, tail


def _plain_recipe(backbone: Backbone, transfer: schema.Transfer, seed: int) -> dict[str, Any]:
    """What a tail is made from, but for where it begins."""
    return {
        "skeleton": dict(backbone.skeleton),
        "mode": transfer.mode,
        "batch_norm": transfer.batch_norm,
        "rank": transfer.rank,
        "alpha": transfer.alpha,
        "aggregation": transfer.aggregation,
        "targets": list(transfer.targets),
        "width": transfer.width,
        "seed": seed,
    }


def stored_bytes(width: int, dtype: str) -> int:
    """Bytes of one example's activations of so many numbers in the feature store."""
    return width * np.dtype(dtype).itemsize


def pixel_bytes(backbone: Backbone) -> int:
    """Bytes of one example that is stored as the trunk takes it."""
    return 3 * backbone.image_size**2 * np.dtype(np.float16).itemsize


def _refuse_asleep(module: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Random weights have no statistics of their own yet.

    Raises:
        InputError: batch norm of a network from scratch is to stay as it is.
    """
    from fedtl.transfer.modes import NORMS

    normed = any(isinstance(part, NORMS) for part in module.modules())
    if recipe["mode"] == "scratch" and recipe["batch_norm"] == "frozen" and normed:
        raise InputError(
            "random weights have no statistics that batch norm could be frozen at",
            where="transfer.batch_norm",
            got='"frozen"',
            allowed='"aggregated", "local", "group"',
            do='Set transfer.batch_norm = "group", or "aggregated"',
        )


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

    # a copy: what a mode puts into it is no part of the trunk
    module = copy.deepcopy(cuts.split(graph, stored)[1]).eval().requires_grad_(False)
    within = module if stored is place else cuts.split(graph, place)[1]
    reached = {name for name, _ in within.named_modules()}
    return module, MODES[recipe["mode"]](module, reached, recipe)


def _shape(backbone: Backbone, graph: Any, place: Boundary | None) -> tuple[int, ...]:
    """The shape of one example's activations at a boundary."""
    import torch

    from fedtl.transfer import cuts

    size = backbone.image_size
    example = torch.zeros(2, size, size, 3, dtype=torch.uint8)
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
    def running(self, training: bool = False, still: tuple[str, ...] = ()) -> Iterator[nn.Module]:
        """A module that nobody else runs meanwhile; in eval mode but for what is said here.

        Args:
            training: batch norm whose statistics are trained takes them from each batch, and moves
                the running ones that it is given.
            still: of a head's tensors, those whose names begin so are not trained.
        """
        try:
            module = self._idle.get_nowait()
        except queue.Empty:
            module = copy.deepcopy(self.module)
        for name, part in module.named_modules():
            mean = f"{name}.running_mean"
            asleep = not training or (still and (TAIL + mean).startswith(still))
            part.training = mean in self._moving and not asleep
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
        awake = [part for part in module.modules() if part.training] if len(x) == 1 else []
        for part in awake:  # one example has no statistics
            part.training = False
        result: torch.Tensor = torch.func.functional_call(module, mine, (given,))
        for part in awake:
            part.training = True
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
    if facts["skeleton"]["kind"] == "hf":
        from fedtl.transfer.hf_tail import behind

        module, _ = behind(cast("TextTrunk", trunk), facts)
    else:
        graph = cuts.trace(trunk)
        place = None if facts["cut"] == INPUT else cuts.find(trunk, graph.graph, facts["cut"])
        module, _ = _behind(graph, None if facts["recompute"] else place, place, facts)
    module.load_state_dict({name: torch.tensor(own) for name, own in tail.tensors.items()})
    return OpenTail(tail, module)

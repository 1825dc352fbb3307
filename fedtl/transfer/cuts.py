"""Where a network can be cut in two, and the cutting: torch.fx finds what crosses each boundary.

A boundary lies before a module and is passed by one single tensor. What lies in front of it runs
once per example; what lies behind it is trained. This file imports torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedtl.errors import InputError, nearest

_WRAPPED = "body."


@dataclass(frozen=True)
class Boundary:
    """One place where a network can be cut.

    Attributes:
        names: modules that begin here, outermost first, e.g. layer4, layer4.0, layer4.0.conv1.
        position: of the first node behind it, in the traced graph.
        crossing: name of the node whose value passes.
    """

    names: tuple[str, ...]
    position: int
    crossing: str


class _Pixels(nn.Module):
    """Nothing but the examples themselves, one after the other."""

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [n, S * S * 3] from uint8 [n, S, S, 3]."""
        return pixels.flatten(1).to(torch.float32)


class _Tracer(fx.Tracer):
    """Traces what its own thread does: while it looks, every module's call comes to it."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Another thread's module runs as it would have."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def trace(trunk: nn.Module) -> fx.GraphModule:
    """The trunk as a graph. Raises InputError where it cannot be traced."""
    try:
        tracer = _Tracer()
        return fx.GraphModule(trunk, tracer.trace(trunk))
    except Exception as error:  # whatever a model's own code raises when it meets no real tensor
        raise InputError(
            "this network cannot be cut: its code depends on its data",
            where="transfer.cut",
            got=f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}",
            do='Use transfer.mode = "head", or "full"',
        ) from error


def boundaries(graph: fx.Graph) -> tuple[Boundary, ...]:
    """Every place where one single tensor passes from in front of a module to it, in order."""
    nodes = [node for node in graph.nodes if node.op not in ("get_attr", "output")]
    place = {node: i for i, node in enumerate(nodes)}
    last = {
        node: max((place.get(user, len(nodes)) for user in node.users), default=-1)
        for node in nodes
    }
    found, seen = [], set()
    for i, node in enumerate(nodes):
        names = [name for name in _modules(node) if name not in seen]
        seen.update(names)
        crossing = [other for other in nodes[:i] if last[other] >= i]
        if names and len(crossing) == 1:
            found.append(Boundary(tuple(names), i, crossing[0].name))
    return tuple(found)


def _modules(node: fx.Node) -> list[str]:
    """The modules that a node is part of, outermost first, without the wrapper."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    names = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack]
    if node.op == "call_module" and (not names or names[-1] != str(node.target)):
        names.append(str(node.target))
    return [n for name in names if (n := name.removeprefix(_WRAPPED)) not in ("", "body")]


def blocks(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> tuple[Boundary, ...]:
    """The boundaries before what people call blocks, from the input on.

    A block is an element of a list of modules and itself made of modules, and has no block inside;
    in a network without such (VGG) every layer with weights is one.

    Args:
        graph: as traced.
        modules: of the network, by name without the wrapper.
    """
    places = boundaries(graph)
    containers = {
        name for name, part in modules.items()
        if isinstance(part, nn.Sequential | nn.ModuleList | nn.ModuleDict) and len(part) > 1
    }  # fmt: skip

    whole = {
        name for name, part in modules.items()
        if name.rpartition(".")[0] in containers
        and any(True for _ in part.children())
        and any(True for _ in part.parameters())
    }  # fmt: skip

    def is_block(name: str) -> bool:
        parts = name.split(".")
        outer = {".".join(parts[:i]) for i in range(1, len(parts))}
        return name in whole and not outer & (whole - containers)

    found = [place for place in places if any(is_block(name) for name in place.names)]
    if found:
        return tuple(found)
    weighted = [
        place for place in places
        if (own := modules.get(place.names[-1])) is not None
        and any(True for _ in own.parameters(recurse=False))
    ]  # fmt: skip
    return tuple(weighted)


def find(trunk: nn.Module, graph: fx.Graph, cut: str | int) -> Boundary | None:
    """The boundary that a scenario names; None for the cut behind the last module.

    Args:
        cut: a module's name, or how many of the last blocks stand behind the cut.

    Raises:
        InputError: no such boundary; names the nearest ones.
    """
    if isinstance(cut, int):
        modules = {n.removeprefix(_WRAPPED): part for n, part in trunk.named_modules()}
        found = blocks(graph, modules)
        if cut == 0:
            return None
        if cut <= len(found):
            return found[-cut]
        raise InputError(
            "this network has fewer blocks that it can be cut before",
            where="transfer.cut",
            got=cut,
            allowed=f"0 to {len(found)}",
            do="'transfer.mode = \"full\"' trains the whole network",
        )
    places = boundaries(graph)
    for place in places:
        if cut in place.names:
            return place
    known = [place.names[0] for place in places]
    every = [name for place in places for name in place.names]
    raise InputError(
        "the network cannot be cut there: no such module, or more than one tensor passes before it",
        where="transfer.cut",
        got=repr(cut),
        allowed=_some(known),
        do=f"Did you mean {guess!r}?" if (guess := nearest(cut, every)) else None,
    )


def _some(names: Sequence[str]) -> str:
    """The last names, where the cut usually is."""
    more = f"{len(names) - 12} more, " if len(names) > 12 else ""
    return more + ", ".join(names[-12:])


def split(graph: fx.GraphModule, place: Boundary | None) -> tuple[nn.Module, nn.Module]:
    """The network in two: examples -> activations [n, A] flat, and activations as they were -> D.

    Args:
        graph: the traced trunk.
        place: the boundary; None for the one before everything.
    """
    if place is None:
        return _Pixels(), graph
    nodes = [node for node in graph.graph.nodes if node.op not in ("get_attr", "output")]
    behind = set(nodes[place.position :])
    front, back = fx.Graph(), fx.Graph()
    ahead: dict[fx.Node, fx.Node] = {}
    after: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op == "output":
            back.output(after[node.args[0]])
        elif node in behind:
            after[node] = back.node_copy(node, after.__getitem__)
        elif node.op == "get_attr":
            ahead[node] = front.node_copy(node)
            after[node] = back.node_copy(node)
        else:
            ahead[node] = front.node_copy(node, ahead.__getitem__)
            if node.name == place.crossing:
                after[node] = back.placeholder("activations")
    crossing = next(copied for node, copied in ahead.items() if node.name == place.crossing)
    front.output(front.call_method("flatten", (crossing, 1)))
    return _module(graph, front), _module(graph, back)


def _module(graph: fx.GraphModule, part: fx.Graph) -> fx.GraphModule:
    """One of the two graphs as a module, with the submodules that it uses."""
    module = fx.GraphModule(graph, part)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def value_shape(graph: fx.GraphModule, place: Boundary, examples: Tensor) -> tuple[int, ...]:
    """The shape of one example's value at a boundary, found by running ``examples`` [1, ...]."""

    class Watcher(fx.Interpreter):
        shape: tuple[int, ...] = ()

        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name == place.crossing:
                self.shape = tuple(value.shape[1:])
            return value

    watcher = Watcher(graph)
    with torch.inference_mode():
        watcher.run(examples)
    return watcher.shape

"""Where a network can be cut in two, and the cutting: torch.fx finds what crosses each boundary.

A boundary lies before a module and is passed by one single tensor. What lies in front of it runs
once per example; what lies behind it is trained. This file imports torch.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedtl.errors import InputError, nearest
from fedtl.transfer.tracing import ONE_TRACE

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
    """Traces what its own thread does: while it looks, every module's call comes to it.

    Attributes:
        opaque: kinds of modules whose code cannot be followed; each stays whole.
        stuck: the kind of the innermost module that could not be followed this time.
    """

    def __init__(self, opaque: Set[type[nn.Module]]) -> None:
        super().__init__()
        self._thread = threading.get_ident()
        self.opaque = opaque
        self.stuck: type[nn.Module] | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Also what cannot be followed."""
        return type(m) in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Another thread's module runs as it would have."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.stuck = self.stuck or type(m)
            raise


def trace(trunk: nn.Module) -> fx.GraphModule:
    """The trunk as a graph; modules whose code depends on their data stay whole in it.

    Raises:
        InputError: it is the network's own code that does, so that there is nothing to cut between.
    """
    opaque: set[type[nn.Module]] = set()
    while True:
        tracer = _Tracer(opaque)
        try:
            with ONE_TRACE:
                return fx.GraphModule(trunk, tracer.trace(trunk))
        except Exception as error:  # whatever a model's own code raises when it meets no tensor
            body = getattr(trunk, "body", trunk)
            if tracer.stuck in (None, type(trunk), type(body)) or tracer.stuck in opaque:
                raise _untraceable(error) from error
            assert tracer.stuck is not None
            opaque.add(tracer.stuck)


def _untraceable(error: Exception) -> InputError:
    said = str(error).splitlines()
    return InputError(
        "this network cannot be cut: the way its code goes depends on its data",
        where="transfer.cut",
        got=f"{type(error).__name__}: {said[0][:200] if said else ''}",
        do='Use transfer.mode = "head"',
    )


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
            do='Set transfer.mode = "full" to train the whole network',
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
        do=(f"Did you mean {guess!r}? " if (guess := nearest(cut, every)) else "")
        + "'fedtl cuts' shows where blocks begin",
    )


def _some(names: Sequence[str]) -> str:
    """The last names, where the cut usually is."""
    more = f", and {len(names) - 12} before these" if len(names) > 12 else ""
    return ", ".join(names[-12:]) + more


def split(graph: fx.GraphModule, place: Boundary | None) -> tuple[nn.Module, nn.Module]:
    """The network in two: examples -> activations [n, A] flat, and activations as they were -> D.

    Args:
        graph: the traced trunk.
        place: the boundary; None for the one before everything.
    """
    if place is None:
        every = fx.Graph()
        every.output(every.graph_copy(graph.graph, {}))
        return _Pixels(), _module(graph, every)
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
    """One of the two graphs as a module, with what it uses under the model's own names."""
    for node in reversed(part.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            part.erase_node(node)
    root = nn.Module()
    for node in part.nodes:
        if node.op in ("call_module", "get_attr"):
            own = _attribute(graph, node.target)
            node.target = node.target.removeprefix(_WRAPPED)
            _place(root, node.target, own)
    return fx.GraphModule(root, part)


def _attribute(module: nn.Module, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), module)


def _place(root: nn.Module, name: str, own: Any) -> None:
    """Puts a module, a parameter or a buffer where its name says."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    if isinstance(own, Tensor) and not isinstance(own, nn.Parameter):
        root.register_buffer(last, own)
    else:
        setattr(root, last, own)


def blocks_of(
    graph: fx.GraphModule, places: Sequence[Boundary], names: Sequence[str]
) -> list[list[str]]:
    """The names of tensors behind a cut by the block that they are in, from the front on.

    Args:
        graph: as ``split`` gave it, or the traced trunk.
        places: ``blocks`` of the network.
        names: of tensors, without the wrapper.
    """
    nodes = [n for n in graph.graph.nodes if n.op not in ("get_attr", "output")]
    where: dict[str, int] = {}
    for i, node in enumerate(nodes):
        for source in (node, *node.all_input_nodes):  # a parameter stands where it is used
            if source.op in ("call_module", "get_attr"):
                where.setdefault(str(source.target).removeprefix(_WRAPPED), i)
    found: dict[int, list[str]] = {}
    for name in names:
        parts = name.split(".")
        prefixes = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
        place = next((where[prefix] for prefix in prefixes if prefix in where), 0)
        found.setdefault(sum(b.position <= place for b in places), []).append(name)
    return [found[block] for block in sorted(found)]


def value_shape(graph: fx.GraphModule, place: Boundary, examples: Tensor) -> tuple[int, ...]:
    """The shape of one example's value at a boundary, found by running ``examples`` [n, ...].

    Raises:
        InputError: what passes there is not one value per example.
    """

    class Watcher(fx.Interpreter):
        value: object = None

        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name == place.crossing:
                self.value = value
            return value

    watcher = Watcher(graph)
    with torch.inference_mode():
        watcher.run(examples)
    value = watcher.value
    if not (isinstance(value, Tensor) and value.ndim > 1 and len(value) == len(examples)):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            "the network cannot be cut there: what passes is not one array for each example",
            where="transfer.cut",
            got=f"{place.names[0]!r}: {shape} for {len(examples)} examples",
            do="Cut before a whole block: 'fedtl cuts' shows them",
        )
    return tuple(value.shape[1:])


@dataclass(frozen=True)
class CutPoint:
    """What it takes to cut before a block.

    Attributes:
        blocks: that stand behind it; what ``transfer.cut`` may say instead of the name.
        name: of the first module behind it.
        shape: of one example's activations there.
        parameters: behind it.
        flops: of one example's way from there to the end (a multiply-add counts as two).
    """

    blocks: int
    name: str
    shape: tuple[int, ...]
    parameters: int
    flops: int


def cut_points(trunk: nn.Module, example: Tensor) -> list[CutPoint]:
    """Every block that a network can be cut before, from the input on.

    Args:
        example: one of them, [1, ...].
    """
    from torch.utils.flop_counter import FlopCounterMode

    graph = trace(trunk)
    modules = {name.removeprefix(_WRAPPED): part for name, part in trunk.named_modules()}
    places = blocks(graph.graph, modules)
    crossing = {place.crossing for place in places}
    shapes: dict[str, tuple[int, ...]] = {}
    spent: dict[str, int] = {}

    class Meter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name in crossing and isinstance(value, Tensor):
                shapes[n.name], spent[n.name] = tuple(value.shape[1:]), counter.get_total_flops()
            return value

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        Meter(graph).run(example)
    found = []
    for i, place in enumerate(places):
        behind = split(graph, place)[1]
        parameters = sum(own.numel() for own in behind.parameters())
        left = counter.get_total_flops() - spent[place.crossing]
        name = place.names[0]
        found.append(CutPoint(len(places) - i, name, shapes[place.crossing], parameters, left))
    return found

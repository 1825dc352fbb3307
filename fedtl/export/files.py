"""The artefacts: one file with everything in it, and its card beside it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from fedtl.errors import InputError, SecurityRefusal
from fedtl.export.build import onnx_model, onnx_runner, torch_model
from fedtl.export.card_text import card_text
from fedtl.export.opened import Model
from fedtl.export.parity import Run
from fedtl.export.samples import made_up_inputs
from fedtl.results.files import write_atomic
from fedtl.types import Tail

SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torch": ".pt2"}
"""Formats and how their files end."""

FRONT, BEHIND, HEAD = "front.", "behind.", "head."
"""Before the names of tensors in a safetensors file."""

Artefact = tuple[bytes, Run]
"""A file without its card, and a way to run it."""


def make(model: Model, to: str) -> Artefact:
    """The program in a format. Raises InputError where the trunk does not go into it."""
    if to == "onnx":
        content = onnx_model(model).SerializeToString()
        return content, onnx_runner(content)
    if to == "torch":
        return _torch(model)
    return _safetensors(model)


def with_card(content: bytes, to: str, card: Mapping[str, Any]) -> bytes:
    """The file with its card, labels and preprocessing inside, as JSON under these names."""
    told = {name: json.dumps(card[name]) for name in ("labels", "preprocessing", "inputs")}
    told["card"] = json.dumps(card)
    if to == "onnx":
        import onnx

        graph = onnx.load_from_string(content)
        del graph.metadata_props[:]
        onnx.helper.set_model_props(graph, told)
        graph.producer_name, graph.doc_string = "fedtl", f"{card['name']}: see the metadata"
        written: bytes = graph.SerializeToString()
        return written
    if to == "torch":
        import torch

        program = torch.export.load(io.BytesIO(content))
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={f"{n}.json": v for n, v in told.items()})
        return buffer.getvalue()
    from safetensors.numpy import load, save

    return save(load(content), metadata={**_metadata_of(content), **told})


def write(path: Path, content: bytes, card: Mapping[str, Any]) -> list[Path]:
    """The file and its card as JSON and as Markdown; what was written."""
    beside = path.with_name(f"{path.name}.card.json"), path.with_name(f"{path.name}.card.md")
    write_atomic(path, content)
    write_atomic(beside[0], (json.dumps(card, indent=2, allow_nan=False) + "\n").encode())
    write_atomic(beside[1], card_text(card, path.name).encode())
    return [path, *beside]


def _torch(model: Model) -> Artefact:
    import torch

    from fedtl.export.joined import runner, traceable

    joined = torch_model(model)
    if joined is None:
        raise _graph_only(model, "torch")
    inputs = made_up_inputs(model, 2)
    n = torch.export.Dim("n", min=1, max=4096)
    shapes = {name: {0: n} for name in inputs}
    if model.takes == "texts":
        t: Any = torch.export.Dim("t", min=2, max=max(3, model.scenario.backbone.max_tokens))
        shapes = {name: {0: n} if model.tokens else {0: n, 1: t} for name in inputs}
    buffer = io.BytesIO()
    try:
        with traceable(), torch.no_grad():
            program = torch.export.export(
                joined,
                tuple(torch.from_numpy(array) for array in inputs.values()),
                dynamic_shapes={"given": tuple(shapes.values())},
            )
            torch.export.save(program, buffer)
    except Exception as error:  # exporting runs the model's own code: anything may come
        lines = str(error).strip().splitlines() or [""]
        raise InputError(
            "this network cannot be written as a program of torch's",
            where="backbone.name",
            got=f"{type(error).__name__}: {lines[0][:160]}",
            do="Use --to onnx",
        ) from error
    content = buffer.getvalue()
    return content, runner(torch.export.load(io.BytesIO(content)).module())


def _safetensors(model: Model) -> Artefact:
    from safetensors.numpy import save

    from fedtl.export.joined import runner
    from fedtl.transfer.skeletons import SKELETONS

    tensors: dict[str, Any] = {HEAD + name: tensor for name, tensor in model.head.items()}
    if model.takes == "rows":
        if model.front.name != "identity":
            raise _graph_only(model, "safetensors")
    else:
        if model.front.skeleton.get("kind") not in SKELETONS:
            raise _graph_only(model, "safetensors")
        state = model.front.trunk().state_dict()
        tensors |= {FRONT + name: t.detach().cpu().numpy() for name, t in state.items()}
    tail = model.tail
    if tail is not None:
        tensors |= {BEHIND + name: np.asarray(tensor) for name, tensor in tail.tensors.items()}
    network = {
        "skeleton": dict(model.front.skeleton),
        "recipe": None if tail is None else dict(tail.recipe),
        "shape": None if tail is None else list(tail.shape),
        "width": None if tail is None else tail.width,
        "cut": model.front.cut,
        "half": model.half,
        "takes": model.takes,
    }
    content = save(
        {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()},
        metadata={"network": json.dumps(network)},
    )
    return content, runner(rebuilt(content, own_code=True))


OWN_CODE = ("hub", "module")
"""Trunks whose network is code on this machine that the file only names."""


def rebuilt(content: bytes, own_code: bool = False) -> Callable[..., Any]:
    """The program that a safetensors file holds, as a torch module; needs fedtl.

    Args:
        own_code: whether code of this machine may be run that the file names.

    Raises:
        InputError: not such a file, or a damaged one.
        SecurityRefusal: it names code to run, and that was not allowed.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from fedtl.export.joined import Behind, Joined, TextFront
    from fedtl.transfer import cuts
    from fedtl.transfer.backbones import INPUT
    from fedtl.transfer.skeletons import skeleton

    try:
        tensors = load(content)
        facts = json.loads(_metadata_of(content)["network"])

        def under(prefix: str) -> dict[str, Any]:
            return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}

        kind = facts["skeleton"].get("kind")
        if kind in OWN_CODE and not own_code:
            raise SecurityRefusal(
                "this file names code of this machine that would have to be run",
                got=f"a {kind} trunk",
                do="Where you trust it, say load_model(path, own_code=True)",
            )
        tail = None
        if facts["recipe"] is not None:
            shape = tuple(facts["shape"])
            tail = Tail(facts["recipe"], shape, facts["width"], under(BEHIND))
        front = given = None
        if facts["takes"] != "rows":
            front = skeleton(facts["skeleton"])
            if tail is not None and kind == "hf":
                from fedtl.transfer import hf_tail

                before = hf_tail.find_layer(front.get_submodule("body"), facts["cut"])
                front = hf_tail.TextFront(cast(Any, front), before, tail.shape[0]).eval()
            elif tail is not None:
                graph = cuts.trace(front)
                where = facts["cut"]
                place = None if where == INPUT else cuts.find(front, graph.graph, where)
                front = cuts.split(graph, place)[0].eval()
            given = TextFront(front) if facts["takes"] == "texts" else front
            state = {name: torch.tensor(tensor) for name, tensor in under(FRONT).items()}
            front.load_state_dict(state)
        return Joined(given, Behind(tail, under(HEAD)), facts["half"] and front is not None)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            "not a model that 'fedtl export --to safetensors' wrote, or a damaged one",
            do="Export the run again",
        ) from error


def _metadata_of(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return found


def _graph_only(model: Model, to: str) -> InputError:
    return InputError(
        f"the {model.front.name} trunk does not come as modules, so it does not go into {to}",
        where="--to",
        got=to,
        allowed="onnx",
        do="Use --to onnx",
    )

"""The cut through a text encoder: hidden states before one of its layers, and what stands behind.

torch.fx does not trace transformers, so the cut is made by their structure: embeddings, then a list
of layers. What is stored of a text are the hidden states of its tokens, [T, H + 1] with T the
trunk's ``max_tokens``; the last number is 1 where a token is, and 0 behind the text's end. Layers
keep their names on both sides. This file imports torch.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedtl.errors import InputError, nearest
from fedtl.scenario import schema
from fedtl.transfer.backbones import INPUT, Backbone
from fedtl.transfer.cuts import CutPoint
from fedtl.transfer.flops import count_flops
from fedtl.transfer.hf_modules import TextTrunk, encoder
from fedtl.transfer.hf_trunk import PADDING
from fedtl.types import Tail

_BODY = "body."


class TextFront(nn.Module):
    """Tokens [n, t] -> what is stored of each text, flat.

    Args:
        trunk: a copy of it, whose layers behind the cut and pooling are not run.
        before: how many layers stand before the cut; None stores the tokens themselves.
        places: T, of every text.
    """

    def __init__(self, trunk: TextTrunk, before: int | None, places: int) -> None:
        super().__init__()
        self.places, self.padding = places, trunk.padding
        self.body, self.width = None, 1
        if before is not None:
            self.width += trunk.width
            self.body = copy.deepcopy(trunk.body)
            _, layers = layers_of(self.body)
            for i in range(before, len(layers)):
                layers[i] = _Passed()

    def forward(self, tokens: Tensor) -> Tensor:
        """float32 [n, T * (H + 1)]; [n, T] of tokens, -1 behind their end, where those are kept."""
        tokens = tokens[:, : self.places]  # a sample may have padding beyond
        real = tokens >= 0
        if self.body is None:
            kept = tokens.to(torch.float32).unsqueeze(-1)
        else:
            states = self.body(
                input_ids=torch.where(real, tokens, self.padding),
                attention_mask=real.to(torch.int64),
            ).last_hidden_state
            mask = real.unsqueeze(-1).to(states.dtype)
            kept = torch.cat([states * mask, mask], dim=-1)
        empty = float(PADDING) if self.body is None else 0.0
        # more than is missing, cut off again: sizes are symbols while exporters trace, and they
        # would not know whether something is missing at all
        filler = kept.new_full((kept.shape[0], self.places, self.width), empty)
        filled = torch.cat([kept, filler], dim=1)[:, : self.places]
        return filled.reshape(-1, self.places * self.width)


class TextTail(nn.Module):
    """What is stored of texts -> one vector each: the layers behind the cut, and the pooling."""

    def __init__(self, trunk: TextTrunk, before: int | None) -> None:
        super().__init__()
        self.body, self.pool, self.padding = copy.deepcopy(trunk.body), trunk.pool, trunk.padding
        self.from_tokens = before is None
        if before is not None:
            self.body.embeddings = _Given()
            _, layers = layers_of(self.body)
            for i in range(before):
                layers[i] = _Passed()

    def forward(self, stored: Tensor) -> Tensor:
        """float32 [n, D] from float32 [n, T, H + 1], or [n, T, 1] of tokens."""
        if self.from_tokens:
            tokens = stored[..., 0].to(torch.int64)
            real = tokens >= 0
            given = {"input_ids": torch.where(real, tokens, self.padding)}
        else:
            real = stored[..., -1] > 0.5
            given = {"inputs_embeds": stored[..., :-1]}
        longest = real.shape[1]
        # nobody needs the padding of all; an exporter would keep the number it sees for good
        traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not (traced or torch.compiler.is_compiling()):
            longest = int(real.sum(1).max()) or longest
        real = real[:, :longest]
        given = {name: value[:, :longest] for name, value in given.items()}
        states = self.body(**given, attention_mask=real.to(torch.int64)).last_hidden_state
        return cast(Tensor, self.pool(states, real))


class _Passed(nn.Module):
    """A layer that stands on the other side of the cut."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states


class _Given(nn.Module):
    """Embeddings that are there already."""

    def forward(self, *given: object, **named: object) -> Tensor:
        every = [*given, *named.values()]
        return next(v for v in every if isinstance(v, Tensor) and v.dim() == 3)


def layers_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of an encoder's layers and its name.

    Raises:
        InputError: the model is no embeddings with a list of layers behind.
    """
    lists = [(n, part) for n, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    if len(lists) != 1 or not isinstance(getattr(model, "embeddings", None), nn.Module):
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise InputError(
            "only text encoders with one list of layers can be cut (BERT, RoBERTa, DistilBERT and "
            "their like)",
            where="transfer.mode",
            got=kind,
            do='Set transfer.mode = "head"',
        )
    return lists[0]


def find_layer(model: nn.Module, cut: str | int) -> int | None:
    """How many layers stand before the cut; None where everything stands behind it.

    Args:
        cut: a layer's name, e.g. ``encoder.layer.4``, "input", or how many of the last layers.

    Raises:
        InputError: no such layer; says the nearest.
    """
    name, layers = layers_of(model)
    names = [f"{name}.{i}" for i in range(len(layers))]
    if isinstance(cut, int):
        if cut <= len(layers):
            return len(layers) - cut
        raise InputError(
            "this network has fewer blocks that it can be cut before",
            where="transfer.cut",
            got=cut,
            allowed=f"0 to {len(layers)}",
            do="'transfer.mode = \"full\"' trains the whole network",
        )
    if cut == INPUT:
        return None
    if cut in names:
        return names.index(cut)
    guess = nearest(cut, names)
    raise InputError(
        "the network cannot be cut there: no such layer",
        where="transfer.cut",
        got=repr(cut),
        allowed=f"{names[0]} to {names[-1]}",
        do=f"Did you mean {guess!r}?" if guess else None,
    )


def cut_text(
    backbone: Backbone, transfer: schema.Transfer, cut: str | int, recipe: dict[str, Any], most: int
) -> tuple[Backbone, Tail]:
    """The trunk up to the cut, and the tail behind it.

    Args:
        recipe: what modes need of the scenario; where it is cut is added here.
        most: texts whose hidden states may be stored where that is left open.
    """
    trunk = cast(TextTrunk, backbone.trunk())
    before = find_layer(trunk.body, cut)
    places = int(backbone.settings["max_tokens"])
    shape = (places, backbone.dim + 1)
    again = transfer.activations == "recompute"
    again = again or (transfer.activations == "auto" and 4 * prod(shape) > most)
    stored = None if again else before
    where = INPUT if before is None else f"{layers_of(trunk.body)[0]}.{before}"
    recipe = {**recipe, "cut": where, "recompute": again and before is not None}
    module, trained = behind(trunk, recipe)
    recipe["blocks"] = _blocks(trunk.body, trained)
    tensors = {name: own.detach().cpu().numpy() for name, own in module.state_dict().items()}
    shape = shape if stored is not None else (places, 1)
    tail = Tail({**recipe, "trained": trained}, shape, backbone.dim, tensors)
    front = replace(
        backbone,
        cut=INPUT if stored is None else where,
        builder=functools.partial(_front, backbone, stored, places),
        known_dim=prod(shape),
    )
    return front, tail


def behind(trunk: TextTrunk, recipe: Mapping[str, Any]) -> tuple[nn.Module, list[str]]:
    """The tail's module, made ready for its mode, and the names of what is trained."""
    from fedtl.transfer.modes import MODES

    before = find_layer(trunk.body, recipe["cut"])
    stored = None if recipe["recompute"] else before
    module = TextTail(trunk, stored).eval().requires_grad_(False)
    name, layers = layers_of(module.body)
    if before is None:
        reached = {n for n, _ in module.named_modules()}
    else:
        begin = tuple(f"{_BODY}{name}.{i}" for i in range(before, len(layers)))
        inside = tuple(f"{layer}." for layer in begin)
        reached = {n for n, _ in module.named_modules() if n in begin or n.startswith(inside)}
    return module, MODES[recipe["mode"]](module, reached, recipe)


def bare(facts: Mapping[str, Any]) -> TextTrunk:
    """The trunk of a backbone's ``skeleton``, with weights of no meaning."""
    model = encoder(facts["config"], 0)
    trunk = TextTrunk(model, facts["pooling"], facts["normalize"])
    return trunk.eval().requires_grad_(False)


def text_points(backbone: Backbone) -> list[CutPoint]:
    """Every layer that the trunk can be cut before, for texts of ``max_tokens``."""
    trunk, places = cast(TextTrunk, backbone.trunk()), int(backbone.settings["max_tokens"])
    name, layers = layers_of(trunk.body)
    shape, found = (places, backbone.dim + 1), []
    for before in range(len(layers)):
        parameters = sum(own.numel() for layer in layers[before:] for own in layer.parameters())
        flops = count_flops(TextTail(trunk, before).eval(), np.zeros((1, *shape), np.float32))
        place = f"{name}.{before}"
        found.append(CutPoint(len(layers) - before, place, shape, parameters, int(flops)))
    return found


def _front(backbone: Backbone, before: int | None, places: int) -> nn.Module:
    trunk = cast(TextTrunk, backbone.trunk())
    return TextFront(trunk, before, places).eval().requires_grad_(False)


def _blocks(model: nn.Module, trained: list[str]) -> list[list[str]]:
    """The trained tensors' names layer by layer, from the front on."""
    name, _ = layers_of(model)
    found: dict[int, list[str]] = {}
    for tensor in trained:
        rest = tensor.removeprefix(f"{_BODY}{name}.")
        layer = int(rest.split(".")[0]) if rest != tensor else -1
        found.setdefault(layer, []).append(tensor)
    return [found[layer] for layer in sorted(found)]

"""Heads: what is trained on the frozen features. Tensors by name, as ``types.Head`` has them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fedtl import seeding
from fedtl.errors import InputError
from fedtl.scenario import schema
from fedtl.types import Float32, Head

COSINE = 16.0
"""Where a cosine head's scale begins, if nothing else is said."""


def initial_head(section: schema.Head, num_features: int, num_classes: int, seed: int) -> Head:
    """The head every client starts from in round 1.

    A linear head starts at zero: its problem is convex, so the start decides nothing and zero
    favours no class. An MLP's layers start uniform in +-1/sqrt(fan_in) (torch.nn.Linear's own
    range) from the seeded stream; its last layer starts at zero like the linear head. A prototype
    head's points start at zero too, where the gradient already tells classes apart; a cosine head's
    weights start as random directions from the seeded stream, as zero has none.

    Args:
        section: kind; for "mlp" hidden widths, for "cosine" and "prototype" the scale.
        num_features: D, width of the features.
        num_classes: C, at least 2.
        seed: the scenario's seed.

    Returns:
        float32 tensors; their order is the order in which they travel.
    """
    if num_classes < 2:
        raise InputError("a classifier needs two classes", got=num_classes, allowed="at least 2")
    widths = [num_features, *(section.hidden if section.kind == "mlp" else [])]
    head: dict[str, Float32] = {}
    stream = seeding.generator(seed, "head")
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        bound = fan_in**-0.5
        for name, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
            values = stream.uniform(-bound, bound, shape)
            head[f"hidden.{layer}.{name}"] = values.astype(np.float32)
    head["weight"] = np.zeros((num_classes, widths[-1]), np.float32)
    head["bias"] = np.zeros(num_classes, np.float32)
    if section.kind == "cosine":
        drawn = stream.standard_normal(head["weight"].shape)
        directions = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        head["weight"] = directions.astype(np.float32)
    if section.kind in ("cosine", "prototype"):
        scale = section.scale or (COSINE if section.kind == "cosine" else num_features / 2)
        head[f"{section.kind}.scale"] = np.array([scale], np.float32)
    return head

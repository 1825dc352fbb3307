"""``head.initial = "names"``: a head of the classes' names, embedded by the trunk of the examples.

Radford et al. 2021 (arXiv 2103.00020, section 3.1.2) for images and texts; here both are texts, so
the trunk embeds the names itself. An example goes to the class whose name lies nearest in angle.
"""

from __future__ import annotations

import numpy as np

from fedtl.errors import InputError
from fedtl.scenario import schema
from fedtl.transfer.backbones import Backbone
from fedtl.transfer.features import FeatureStore
from fedtl.transfer.text_features import embed
from fedtl.types import Head

SCALE = 16.0
"""Of a linear head's unit rows: what a cosine head's scale begins with."""


def with_names(
    head: Head,
    scenario: schema.Scenario,
    backbone: Backbone,
    classes: tuple[str, ...],
    way: str,
) -> Head:
    """The starting head with names for rows, where ``head.initial`` is ``"names"``.

    A linear head has ``SCALE`` times the unit embeddings as rows and no bias; a cosine head has
    the embeddings, and its scale as it starts anyway.

    Args:
        head: as the scenario's kind starts.
        classes: the C classes; ``head.names`` says in words what they are, in this order.
        way: how the trunk ran on the examples.

    Raises:
        InputError: not as many names as classes, or two classes whose names are embedded alike.
    """
    section = scenario.head
    if section.initial != "names":
        return head
    names = section.names or list(classes)
    if len(names) != len(classes):
        raise InputError(
            "not as many names as classes",
            where="head.names",
            got=len(names),
            allowed=f"{len(classes)}, for {', '.join(classes[:8])}",
        )
    texts = [section.prompt.replace("{}", name) for name in names]  # no other fields
    rows = embed(FeatureStore(), backbone, texts, way).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    likeness = rows @ rows.T - np.eye(len(rows))
    if (place := np.argwhere(likeness > 1 - 1e-6)).size:
        first, second = place[0].tolist()
        raise InputError(
            "two classes have names that the trunk cannot tell apart",
            where="head.names",
            got=f"{names[first]!r} and {names[second]!r}",
        )
    scale = SCALE if section.kind == "linear" else 1.0
    return {**head, "weight": (scale * rows).astype(np.float32)}

"""What a backbone's own classifier says about stored features: the layer that was cut off.

A trunk is cut in front of its last linear layer, so that layer applied to the features gives the
scores of the classes that the weights were trained for, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.transfer.backbones import EMBEDDED, OPENERS, Backbone
from fedtl.types import Float32

NO_SOURCE = "NCE and LEEP are undefined: "


@dataclass(frozen=True)
class SourceClassifier:
    """``weight`` float32 [Z, D] and ``bias`` [Z] of the layer behind the features."""

    weight: Float32
    bias: Float32

    def probabilities(self, features: npt.NDArray[np.floating[Any]]) -> Float32:
        """Of the Z source classes for each row, float32 [n, Z]."""
        scores = features.astype(np.float32) @ self.weight.T
        scores += self.bias
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=1, keepdims=True)
        return scores


def source_classifier(backbone: Backbone, width: int) -> SourceClassifier | str:
    """The classifier that the weights file holds, or why there is none, in a sentence.

    Args:
        backbone: opened; its weights file is read again.
        width: D, of the features.
    """
    if backbone.weights_path is None or backbone.takes != "images":
        return NO_SOURCE + "there are no weights that were trained on source classes."
    if backbone.name in OPENERS and backbone.name != EMBEDDED:
        return NO_SOURCE + "the source classes of a trunk from elsewhere are not known."
    from fedtl.transfer.weights import load_weights

    state = load_weights(backbone.weights_path, backbone.weights_hash)
    name = _last_layer(backbone.name)
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
    if weight is None or bias is None or tuple(weight.shape) != (len(bias), width):
        return NO_SOURCE + "the weights file has no linear layer for these features."
    return SourceClassifier(weight.float().numpy(), bias.float().numpy())


def _last_layer(name: str) -> str:
    if name == EMBEDDED:
        return "_fc"
    import torch
    from torchvision import models

    from fedtl.transfer.trunks import last_layer

    plain = name in ("googlenet", "inception_v3")  # else they warn and take seconds
    options = {"init_weights": False} if plain else {}
    with torch.device("meta"):
        return last_layer(models.get_model(name, weights=None, **options))

"""Text encoders as modules: tokens [n, T] with -1 as padding -> one vector a text.

This file imports torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from fedtl.transfer.drawing import seeded


class TextTrunk(nn.Module):
    """A transformer, and how its last hidden states become one vector.

    Args:
        model: of transformers; takes ``input_ids`` and ``attention_mask``.
        pooling: "cls" (the first token), "mean", or "last" (the last token of each text).
        normalize: scale to Euclidean length 1, as sentence encoders want.
    """

    def __init__(self, model: Any, pooling: str, normalize: bool) -> None:
        super().__init__()
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # of pretraining, and no part of an embedding
        self.body: nn.Module = model
        self.pool = Pool(pooling, normalize)
        self.width = int(model.config.hidden_size)
        self.padding = int(getattr(model.config, "pad_token_id", None) or 0)

    def forward(self, tokens: Tensor) -> Tensor:
        """float32 [n, D] from int64 [n, T]; what stands behind a text's end has no say."""
        real = tokens >= 0
        states = self.body(
            input_ids=torch.where(real, tokens, self.padding),
            attention_mask=real.to(torch.int64),
        ).last_hidden_state
        return cast(Tensor, self.pool(states, real)).reshape(-1, self.width)  # known to ONNX too


class Pool(nn.Module):
    """Hidden states [n, T, D] and which of the tokens are real [n, T] -> [n, D]."""

    def __init__(self, kind: str, normalize: bool) -> None:
        super().__init__()
        self.kind, self.normalize = kind, normalize

    def forward(self, states: Tensor, real: Tensor) -> Tensor:
        """One vector per text."""
        weights = real.unsqueeze(-1).to(states.dtype)
        if self.kind == "cls":
            pooled = states[:, 0]
        elif self.kind == "mean":
            pooled = (states * weights).sum(1) / weights.sum(1)
        else:
            last = (real.sum(1) - 1)[:, None, None].expand(-1, 1, states.shape[2])
            pooled = states.gather(1, last)[:, 0]
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


def encoder(config: Mapping[str, Any], key: int) -> nn.Module:
    """The model of a configuration with random weights from a stream of their own."""
    facts = {name: value for name, value in config.items() if name != "model_type"}
    made: Any = transformers.AutoConfig.for_model(config["model_type"], **facts)
    made._attn_implementation = "eager"
    known = type(made) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    loader: Any = transformers.AutoModelForTextEncoding if known else transformers.AutoModel
    with seeded(key):
        return cast(nn.Module, loader.from_config(made, trust_remote_code=False))

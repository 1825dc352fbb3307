"""Tiny random text models with tokenizers, as a hub would have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

KINDS = ("bert", "distilbert", "roberta", "gpt2", "t5")

WORDS = ("good", "bad", "film", "phone", "food", "was", "not", "the", "very", "never")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class Rows:
    """Texts by row."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, i: int) -> str:
        return self._texts[i]

    def where(self, i: int) -> str:
        return f"row {i}"


def sentences(count: int) -> list[str]:
    """Different texts of 1 to 9 words."""
    stream = np.random.default_rng(5)
    return [
        " ".join(stream.choice(WORDS, 1 + i % 9).tolist()) + f" {WORDS[i % 10]}"
        for i in range(count)
    ]


def tiny_model(kind: str, folder: Path) -> Path:
    """A model of two layers and its tokenizer, saved in ``folder``."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    sizes: dict[str, Any] = {
        "bert": {
            "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 16, "max_position_embeddings": 40,
        },
        "roberta": {
            "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 16, "max_position_embeddings": 42, "pad_token_id": 0,
        },
        "distilbert": {
            "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 40,
        },
        "gpt2": {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 40},
        "t5": {"d_model": 8, "d_kv": 4, "num_layers": 2, "num_heads": 2, "d_ff": 16},
    }[kind]  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, vocab_size=len(_SPECIAL) + len(WORDS), **sizes)
    loader: Any = transformers.T5EncoderModel if kind == "t5" else transformers.AutoModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = loader.from_config(config) if kind != "t5" else loader(config)
        for tensor in model.parameters():
            torch.nn.init.normal_(tensor, std=0.3)  # so that every part matters
    model.save_pretrained(folder)
    numbers = {word: i for i, word in enumerate((*_SPECIAL, *WORDS))}
    found = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind != "gpt2":
        found.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder

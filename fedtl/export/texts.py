"""Texts for an exported program: numbers of tokens, and the tokenizer as a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedtl.errors import EnvironmentFault, InputError
from fedtl.results.files import write_atomic
from fedtl.transfer.backbones import Backbone
from fedtl.types import Int64

TOKENIZER = "tokenizer.json"

MAX_BYTES = 64 * 2**20
"""Of a tokenizer's file."""


def encode(front: Backbone, texts: Sequence[str], length: int | None = None) -> Mapping[str, Int64]:
    """Texts as the program takes them.

    Args:
        length: to which all are filled up; default: the longest.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 [n, t].
    """
    from fedtl.transfer.text_features import read_tokens

    tokens = read_tokens(front, texts)
    longest = length or max(len(one) for one in tokens)
    ids = np.zeros((len(tokens), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, one in enumerate(tokens):
        ids[row, : len(one)], mask[row, : len(one)] = one, 1
    return {"input_ids": ids, "attention_mask": mask}


def write_tokenizer(front: Backbone, folder: Path) -> Path:
    """``tokenizer.json`` beside the program, as the library tokenizers reads it."""
    assert front.weights_path is not None
    source, target = front.weights_path / TOKENIZER, folder / TOKENIZER
    if source.is_file():
        content = source.read_bytes()
    else:
        import transformers

        found: Any = transformers.AutoTokenizer.from_pretrained(
            str(front.weights_path), local_files_only=True, trust_remote_code=False
        )
        content = found.backend_tokenizer.to_str().encode()
    write_atomic(target, content)
    return target


def read_tokenizer(path: Path, max_tokens: int, length: int | None = None) -> Any:
    """The tokenizer of an exported program.

    Args:
        length: to which all texts are filled up; default: the longest of those beside them.

    Raises:
        InputError: not there, or none.
        EnvironmentFault: the library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise EnvironmentFault(
            "the library that makes tokens of texts is not installed", do="uv sync --extra text"
        ) from error
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise InputError(
            "the tokenizer must lie beside the program", where=path, do="Export the run again"
        )
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise InputError("this is not a readable tokenizer", where=path) from error
    found.enable_truncation(max_tokens)
    found.enable_padding(length=length)
    return found

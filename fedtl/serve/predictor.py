"""An exported ONNX file that answers pictures, texts or rows; it needs nothing of the run.

Everything that a request can get wrong is an InputError here, told without what was sent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.data.examples import BadImage
from fedtl.data.images import EXTENSIONS, decode_image
from fedtl.errors import InputError
from fedtl.export.build import OUTPUTS, answers, session
from fedtl.transfer.onnx_files import read_model
from fedtl.transfer.preprocessing import Preprocessing
from fedtl.types import Float32

MAX_PIXELS = 40_000_000
"""A picture that claims more is refused before it is decoded: 120 MB each once it is."""

MAX_ALL_PIXELS = 4 * MAX_PIXELS
"""All pictures of a request together: a small file may claim many pixels, and each costs time."""

MAX_EXAMPLES = 64
"""In one request."""

MAX_CHARACTERS = 100_000
"""Of one text."""


@dataclass(frozen=True)
class Predictor:
    """One file, ready to answer from any thread.

    Attributes:
        labels: C class names.
        kind: images, texts or rows.
        card: the model's.
        preprocessing: what the file says of its own.
        path: the file.
    """

    labels: tuple[str, ...]
    kind: str
    card: dict[str, Any]
    preprocessing: dict[str, Any]
    path: Path
    _session: Any
    _crop: Preprocessing | None = None
    _tokenizer: Any = None

    def answer(self, examples: Sequence[Any]) -> list[dict[str, Any]]:
        """Label and probabilities of each example.

        Args:
            examples: bytes of picture files, texts, or rows of numbers.

        Raises:
            InputError: one that cannot be used; says which.
        """
        if not 1 <= len(examples) <= MAX_EXAMPLES:
            raise InputError(
                "a request has too many examples, or none",
                got=len(examples),
                allowed=f"1 to {MAX_EXAMPLES}",
            )
        inputs = {"images": self._pixels, "texts": self._tokens, "rows": self._rows}
        _, probabilities = answers(self._session, inputs[self.kind](examples))
        if not np.isfinite(probabilities).all():
            raise InputError(
                "the model has no answer to this: its values are too far from all it was trained on"
            )
        return [self._told(row) for row in probabilities]

    def _told(self, probabilities: Float32) -> dict[str, Any]:
        values = [round(float(p), 6) for p in probabilities]
        best = int(np.argmax(probabilities))
        return {
            "label": self.labels[best],
            "probability": values[best],
            "probabilities": dict(zip(self.labels, values, strict=True)),
        }

    def _pixels(self, examples: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
        assert self._crop is not None
        crops, left = [], MAX_ALL_PIXELS
        for i, data in enumerate(examples):
            _refuse_other(data, bytes, i, "the bytes of a picture")
            try:
                picture = decode_image(data, min(left, MAX_PIXELS), f"picture {i + 1}")
                left -= picture.shape[0] * picture.shape[1]
                crops.append(self._crop.apply(picture))
            except BadImage as error:
                reason = error.reason.replace("data.max_pixels", "the limit")
                raise InputError(
                    f"this picture cannot be used: {reason}",
                    where=f"picture {i + 1}",
                    allowed=", ".join(EXTENSIONS),
                ) from error
        return {"pixels": np.ascontiguousarray(np.stack(crops))}

    def _rows(self, examples: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
        width = int(self.preprocessing["width"])
        rows = np.zeros((len(examples), width), np.float32)
        for i, row in enumerate(examples):
            _refuse_other(row, list, i, "a list of numbers")
            if len(row) != width:
                raise InputError(
                    "a row of another width", where=f"row {i + 1}", got=len(row), allowed=width
                )
            if not all(type(value) in (int, float) for value in row):
                raise InputError(
                    "a row has something in it that is no number",
                    where=f"row {i + 1}",
                    allowed="finite numbers",
                )
            if not all(abs(value) <= _LARGEST for value in row):  # NaN is not
                raise InputError(
                    "a row has a value that is missing or infinite",
                    where=f"row {i + 1}",
                    allowed="finite numbers",
                    do="Fill in what is missing as it was filled in for training",
                )
            rows[i] = row
        return {"rows": rows}

    def _tokens(self, examples: Sequence[Any]) -> dict[str, npt.NDArray[Any]]:
        for i, text in enumerate(examples):
            _refuse_other(text, str, i, "a text")
            if not text.strip():
                raise InputError("an empty text", where=f"text {i + 1}", allowed="some words")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(
                    "a text has half a character in it (a lone surrogate)",
                    where=f"text {i + 1}",
                    allowed="Unicode",
                )
            if len(text) > MAX_CHARACTERS:
                raise InputError(
                    "a text is too long",
                    where=f"text {i + 1}",
                    got=f"{len(text):,} characters",
                    allowed=f"at most {MAX_CHARACTERS:,}",
                )
        found = self._tokenizer.encode_batch(list(examples))
        return {
            "input_ids": np.array([one.ids for one in found], np.int64),
            "attention_mask": np.array([one.attention_mask for one in found], np.int64),
        }


_LARGEST = float(np.finfo(np.float32).max)


def _refuse_other(value: Any, kind: type, i: int, what: str) -> None:
    if not isinstance(value, kind):
        raise InputError(
            "an example of another kind", where=f"example {i + 1}", got=type(value).__name__,
            allowed=what,
        )  # fmt: skip


def open_predictor(path: Path, threads: int = 1) -> Predictor:
    """Read an exported file.

    Args:
        threads: of one call.

    Raises:
        InputError: no ONNX file, or not one that 'fedtl export' wrote.
        SecurityRefusal: it asks for data from elsewhere.
    """
    model, _, _ = read_model(path)
    told = {one.key: one.value for one in model.metadata_props}
    try:
        labels = tuple(str(label) for label in json.loads(told["labels"]))
        card, preprocessing = json.loads(told["card"]), json.loads(told["preprocessing"])
        kind = str(preprocessing["kind"])
        crop = _crop_of(preprocessing) if kind == "images" else None
        if kind == "rows":
            int(preprocessing["width"])
        whole = isinstance(card, dict) and kind in ("images", "texts", "rows") and labels
        if not whole or [one.name for one in model.graph.output] != list(OUTPUTS):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "not a file that 'fedtl export' wrote: labels and preprocessing are not in it",
            where=path,
            do="Give a run, or a file that 'fedtl export RUN --to onnx' wrote",
        ) from error
    opened = session(model.SerializeToString(), threads)
    tokenizer = _tokenizer(path, preprocessing) if kind == "texts" else None
    return Predictor(labels, kind, card, preprocessing, path, opened, crop, tokenizer)


def _crop_of(told: dict[str, Any]) -> Preprocessing:
    resize, crop, filter = int(told["resize"]), int(told["crop"]), told["interpolation"]
    names = ("nearest", "bilinear", "bicubic", "lanczos")
    if not (1 <= crop <= resize <= 4096 and filter in names):
        raise ValueError
    return Preprocessing(resize, crop, filter, (0.0,) * 3, (1.0,) * 3)


def _tokenizer(path: Path, told: dict[str, Any]) -> Any:
    from fedtl.export.texts import TOKENIZER, read_tokenizer

    length = told.get("length")
    most = int(told["max_tokens"])
    return read_tokenizer(path.with_name(TOKENIZER), most, None if length is None else int(length))

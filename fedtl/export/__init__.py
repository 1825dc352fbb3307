"""``fedtl export``: a run as one artefact that leaves the house, and its card.

Nothing is kept that does not answer as the run does: see ``parity``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fedtl.errors import InputError, unknown_name
from fedtl.export.card import card_facts
from fedtl.export.files import SUFFIXES, make, rebuilt, with_card, write
from fedtl.export.int8 import CALIBRATION, quantize, table
from fedtl.export.opened import Model, open_model
from fedtl.export.parity import compare, refuse_different
from fedtl.export.samples import open_source
from fedtl.interrupts import Interrupts
from fedtl.results.files import refuse_unwritable

__all__ = ["FOLDER", "Observer", "export_run", "load_model"]

FOLDER = "export"
"""Of a run's folder, where artefacts go unless told otherwise."""


class Observer(Protocol):
    """Is told what happens."""

    def extracting(self, done: int, total: int) -> None:
        """Examples through the trunk so far."""


def export_run(
    path: Path,
    to: str,
    observer: Observer,
    interrupts: Interrupts,
    *,
    out: Path | None = None,
    int8: bool = False,
) -> dict[str, Any]:
    """Write a finished run as one file.

    Args:
        path: the run's folder.
        to: "onnx", "safetensors" or "torch".
        out: the file; default ``export/<scenario>.<to>`` in the run's folder.
        int8: write an 8-bit file beside it, and say what it costs; only of ONNX.

    Returns:
        ``files`` written, ``parity``, and where it was asked for ``quantized``.

    Raises:
        InputError: no finished run, its parts are not at hand, or it does not go into the format.
        PolicyStop: the file does not answer as the run does; it is not kept.
        Interrupted: by a signal; nothing is written.
    """
    if to not in SUFFIXES:
        raise unknown_name("format", to, SUFFIXES, "--to")
    if int8 and to != "onnx":
        raise InputError("only an ONNX file is quantized", where="--quantize", do="Use --to onnx")
    if out is not None and out.suffix != SUFFIXES[to]:
        raise InputError(
            f"a file of this format ends with {SUFFIXES[to]}", where="--out", got=out.name
        )
    refuse_unwritable(out)
    model = open_model(path, interrupts.check)

    def progress(done: int, total: int) -> None:
        observer.extracting(done, total)
        interrupts.check("interrupted; nothing was written")

    source = open_source(model, progress)
    model = source.model  # which knows the columns of its rows now
    sample = source.tests()
    interrupts.check("interrupted; nothing was written")
    content, run = make(model, to)
    parity = compare(run, sample)
    refuse_different(parity, to)
    card = card_facts(model, parity.facts())
    small: bytes | None = None
    if int8:
        interrupts.check("interrupted; nothing was written")
        small, way = quantize(content, source.training(CALIBRATION))
        files = {"float32": content, "int8": small}
        card["quantized"] = {"way": way, **table(files, sample, interrupts.check)}
    interrupts.check("interrupted; nothing was written")
    target = out or path / FOLDER / f"{model.scenario.name}{SUFFIXES[to]}"
    target.parent.mkdir(exist_ok=True)
    written = write(target, with_card(content, to, card), card)
    if small is not None:
        beside = target.with_name(f"{target.stem}-int8{target.suffix}")
        written += write(beside, with_card(small, to, card), card)
    written += _tokenizer(model, target.parent)
    return {"files": [str(one) for one in written], "card": card}


def load_model(
    path: str | Path, own_code: bool = False
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The program of a safetensors file as a torch module, and its card.

    Args:
        own_code: whether code of this machine may be run that the file names (hub, module).

    Raises:
        InputError: not such a file.
        SecurityRefusal: it names code to run, and that was not allowed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "np") as file:
            card = json.loads((file.metadata() or {})["card"])
        return rebuilt(Path(path).read_bytes(), own_code), card
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError("not a model that fedtl exported", where=path) from error


def _tokenizer(model: Model, folder: Path) -> list[Path]:
    """What texts are cut into tokens with, beside the file."""
    if model.takes != "texts":
        return []
    from fedtl.export.texts import write_tokenizer

    return [write_tokenizer(model.front, folder)]

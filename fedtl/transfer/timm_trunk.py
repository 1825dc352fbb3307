"""Models of timm: global pooling, no classifier, the preprocessing that timm states for them."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Mapping
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fedtl.errors import EnvironmentFault, InputError, nearest
from fedtl.scenario import schema
from fedtl.transfer import weights
from fedtl.transfer.backbones import Backbone
from fedtl.transfer.drawing import seeded
from fedtl.transfer.preprocessing import Interpolation, Preprocessing

if TYPE_CHECKING:
    from torch import Tensor, nn

_FILE = "model.safetensors"
_FILTERS = ("nearest", "bilinear", "bicubic", "lanczos")


def open_timm(section: schema.Backbone, key: int) -> Backbone:
    """A model of timm's by name, its weights located and hashed.

    Args:
        section: the scenario's; ``model`` is timm's name, with a tag or without.
        key: 64-bit, of the random weights.

    Raises:
        InputError: no such model, or no such weights file.
        SecurityRefusal: the weights file has not the stated hash.
        EnvironmentFault: timm is not installed, or its weights cannot be downloaded.
    """
    timm = import_timm()
    name = section.model or ""
    if not timm.is_model(name) or not (facts := timm.get_pretrained_cfg(name)):
        known = timm.list_models()
        guess = nearest(name, known)
        raise InputError(
            "timm has no model of this name",
            where="backbone.model",
            got=repr(name),
            allowed=f"one of {len(known)} names; timm.list_models() shows them",
            do=f"Did you mean {guess!r}?" if guess else None,
        )
    preprocessing = _preprocessing(timm, facts.to_dict()).at(section.image_size)
    if section.weights == "default":
        path: Path | None = _published(name, facts)
    else:
        path = None if section.weights == "none" else Path(section.weights).expanduser()
    digest = weights.identify(section, path, key)
    skeleton = {"kind": "timm", "name": name, "key": key, **preprocessing.identity()}
    return Backbone(
        "timm",
        "penultimate",
        preprocessing,
        digest,
        path.name if path else "random",
        functools.partial(_build, name, preprocessing, path, digest, key),
        weights_path=path,
        skeleton=skeleton,
        settings={"model": name},
        licence=str(facts.license or "") if section.weights == "default" else "",
    )


def import_timm() -> Any:
    """The package. Raises EnvironmentFault where it is not installed."""
    try:
        import timm
    except ImportError as error:
        raise EnvironmentFault(
            "timm is not installed", where="backbone.name", do="Type 'uv sync --extra timm'"
        ) from error
    return timm


def build_timm(
    name: str,
    preprocessing: Preprocessing,
    state: Mapping[str, Tensor] | None,
    key: int,
    where: Path | str,
) -> nn.Module:
    """The trunk with the weights ``state``, or random ones from ``key``.

    Raises:
        InputError: the weights are another model's, or it cannot take images of this size.
    """
    from fedtl.transfer import trunks

    timm = import_timm()
    facts = timm.get_pretrained_cfg(name)
    # Only these are built for one size of image: what they learnt belongs to its places.
    sized = {"img_size": preprocessing.crop} if facts.fixed_input_size else {}
    with seeded(key), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # timm's own, on names that moved
        try:
            model = timm.create_model(name, pretrained=False, num_classes=0, **sized)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{name} cannot be built for images of this size",
                where="backbone.image_size",
                got=preprocessing.crop,
                do="Leave out backbone.image_size",
            ) from error
    if state is not None:
        _load(timm, model, state, facts, where)
    return trunks.Trunk(model, preprocessing)


def _build(
    name: str, preprocessing: Preprocessing, path: Path | None, digest: str, key: int
) -> nn.Module:
    # The file must still be the one that was hashed when the backbone was opened.
    state = weights.load_weights(path, digest) if path else None
    return build_timm(name, preprocessing, state, key, path or "backbone.weights")


def _load(
    timm: Any, model: nn.Module, state: Mapping[str, Tensor], facts: Any, where: Path | str
) -> None:
    from fedtl.transfer import trunks

    name = facts.architecture
    heads = facts.classifier if isinstance(facts.classifier, tuple) else (facts.classifier,)
    parts = tuple(f"{head}." for head in heads if head)
    file = sys.modules[timm.models.model_entrypoint(name).__module__]
    renamed = getattr(file, "checkpoint_filter_fn", None)
    if renamed is not None and not set(model.state_dict()) <= set(state):
        state = renamed(dict(state), model)  # the names of the paper's own code
    state = {key: tensor for key, tensor in state.items() if not key.startswith(parts)}
    trunks.load_strictly(model, state, (parts or ("head.",))[0], name, timm.list_models(), where)


def _preprocessing(timm: Any, facts: dict[str, Any]) -> Preprocessing:
    """What timm's own evaluation does to images, with the centre cut out."""
    told = timm.data.resolve_data_config({}, pretrained_cfg=facts)
    size = int(told["input_size"][-1])
    filter = told["interpolation"] if told["interpolation"] in _FILTERS else "bicubic"
    red, green, blue = (255.0 * float(value) for value in told["mean"])
    stds = [255.0 * float(value) for value in told["std"]]
    return Preprocessing(
        max(size, floor(size / float(told["crop_pct"]))),
        size,
        cast(Interpolation, filter),
        (red, green, blue),
        (stds[0], stds[1], stds[2]),
    )


def _published(name: str, facts: Any) -> Path:
    """The file that timm publishes for a model, from its cache or downloaded into it."""
    if not facts.hf_hub_id:
        raise InputError(
            "timm publishes no weights for this model",
            where="backbone.model",
            got=repr(name),
            do="Set backbone.weights to a file you have, or to 'none'",
        )
    file = facts.hf_hub_filename or _FILE
    try:
        import huggingface_hub as hub

        kept = hub.try_to_load_from_cache(facts.hf_hub_id, file)
        if isinstance(kept, str):
            return Path(kept)
        hub.get_hf_file_metadata(hub.hf_hub_url(facts.hf_hub_id, file))  # asks once, not six times
        return Path(hub.hf_hub_download(facts.hf_hub_id, file))
    except Exception as error:  # offline, refused or gone: every layer below raises its own
        raise EnvironmentFault(
            f"the weights of {name} are not on this machine and could not be downloaded",
            where="backbone.weights",
            got=type(error).__name__,
            do=f"Get {_FILE} of {facts.hf_hub_id} elsewhere and set backbone.weights to it",
        ) from error

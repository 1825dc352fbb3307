"""Frozen trunks as torch modules: a model without its last layer, normalisation inside.

This file imports torch; import it only where a trunk has to be built.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedtl.errors import InputError, nearest
from fedtl.transfer.drawing import seeded
from fedtl.transfer.preprocessing import Preprocessing

_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # training-time heads of GoogLeNet and Inception
_OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)$")


class Frozen(nn.Module):
    """Stays in evaluation mode: a parent's ``train()`` would wake batch statistics."""

    def train(self, mode: bool = True) -> Self:
        """Changes nothing."""
        del mode
        return super().train(False)


class Trunk(Frozen):
    """A frozen model from pixels to features: uint8 [n, S, S, 3] -> float32 [n, D]."""

    offset: Tensor
    scale: Tensor

    def __init__(self, body: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("offset", torch.tensor(preprocessing.mean).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(preprocessing.std).view(1, 3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [n, D] from uint8 [n, S, S, 3]."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32)
        features: Tensor = self.body((images - self.offset) / self.scale)
        return features


class PooledFeatures(nn.Module):
    """EfficientNet-lite up to its pooled features, [n, 3, S, S] -> [n, 1280]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """The spatial mean of the last convolution."""
        maps: Tensor = self.model.extract_features(images)  # type: ignore[operator]
        return maps.mean((2, 3))


class Elsewhere(Frozen):
    """A trunk that another runtime runs; its state is the hash of what that was given."""

    digest: Tensor

    def __init__(self, run: Callable[[Any], Any], digest: str) -> None:
        super().__init__()
        self._run = run
        self.register_buffer("digest", torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))
        self.eval()

    def forward(self, examples: Tensor) -> Tensor:
        """float32 [n, D] from what the runtime takes."""
        return torch.from_numpy(self._run(examples.numpy()))


def hash_state(module: nn.Module) -> str:
    """SHA-256 over every parameter and buffer by name, type, shape and bytes."""
    digest = hashlib.sha256()
    tensors = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refuse_training_mode(module: nn.Module) -> None:
    """Raise InputError where any part of a trunk is in training mode (METHODS: frozen-eval)."""
    awake = next((name for name, part in module.named_modules() if part.training), None)
    if awake is not None:
        raise InputError(
            "the trunk is in training mode: batch norm would change and dropout would draw",
            where=awake or "trunk",
            do="Call trunk.eval() before extracting features",
        )


def build_efficientnet_lite0(
    preprocessing: Preprocessing,
    state: Mapping[str, Tensor] | None,
    seed: int,
    where: Path | str,
) -> Trunk:
    """EfficientNet-lite0 with the weights ``state``, or random ones from ``seed``."""
    from efficientnet_lite_pytorch import EfficientNet

    with seeded(seed):
        # The image size fixes the padding, so that the model can be exported.
        model = EfficientNet.from_name("efficientnet-lite0", image_size=preprocessing.crop)
    if state is not None:
        load_strictly(model, state, "_fc.", "efficientnet_lite0", (), where)
    return Trunk(PooledFeatures(model), preprocessing)


def build_torchvision(
    name: str,
    preprocessing: Preprocessing,
    state: Mapping[str, Tensor] | None,
    seed: int,
    where: Path | str,
) -> Trunk:
    """A torchvision classification model cut before its last layer.

    Args:
        name: torchvision's name of the model.
        preprocessing: what its images are like.
        state: its weights, or None for random ones from ``seed``.
        seed: 64-bit key.
        where: the weights file, for the error.

    Raises:
        InputError: the weights are another model's, or the model cannot take this image size.
    """
    from torchvision import models

    special = {"transform_input": True, "aux_logits": False, "init_weights": state is None}
    options = special if name in ("googlenet", "inception_v3") else {}
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # GoogLeNet on its own initialisation
        model = models.get_model(name, weights=None, **options)
    head = last_layer(model)
    if state is not None:
        load_strictly(model, state, f"{head}.", name, models.list_models(module=models), where)
    if name.startswith("squeezenet"):  # its classifier is a convolution in front of the pooling
        model.set_submodule("classifier", nn.Sequential(nn.AdaptiveAvgPool2d(1)))
    else:
        model.set_submodule(head, nn.Identity())
    return Trunk(model, preprocessing)


def last_layer(model: nn.Module) -> str:
    """The name of the layer that makes the classes: the last Linear, else the last Conv2d."""
    for kind in (nn.Linear, nn.Conv2d):
        names = [name for name, part in model.named_modules() if isinstance(part, kind)]
        if names:
            return str(names[-1])
    raise InputError("this model has no layer to cut at", where="backbone.name")


_PARALLEL = "module."


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    head: str,
    name: str,
    names: Sequence[str],
    where: Path | str,
) -> None:
    """Copy ``state`` into ``model``: every tensor outside the head must match, the head may not.

    Args:
        model: changed in place.
        state: tensors by name.
        head: prefix of the head's names; a head of any number of classes is left out.
        name: the model's name, for the error.
        names: all models, for the guess in the error.
        where: the file, for the error.

    Raises:
        InputError: with the first missing, unexpected and differently shaped names.
    """
    wanted: Any = model.state_dict()  # an OrderedDict that carries layer versions
    body: Any = type(wanted)(
        (_OLD_DENSENET.sub(r"\1\2", key), tensor)
        for key, tensor in state.items()
        if not key.startswith((head, *_AUXILIARY))
    )
    if all(key.startswith(_PARALLEL) for key in body):  # saved from a DataParallel wrapper
        body = type(wanted)((key.removeprefix(_PARALLEL), body[key]) for key in body)
    shapes = [
        f"{key} {_form(body[key])} instead of {_form(wanted[key])}"
        for key in body.keys() & wanted.keys()
        if body[key].shape != wanted[key].shape
        or body[key].is_floating_point() != wanted[key].is_floating_point()
    ]
    missing: list[str] = []
    unexpected: list[str] = []
    if not shapes:
        # Files without layer versions (.safetensors) are read as the installed layers write them.
        body._metadata = getattr(state, "_metadata", wanted._metadata)
        result = model.load_state_dict(body, strict=False)
        missing = [key for key in result.missing_keys if not key.startswith(head)]
        unexpected = list(result.unexpected_keys)
    faults = {"missing": missing, "unexpected": unexpected, "shape": sorted(shapes)}
    if any(faults.values()):
        told = "; ".join(
            f"{len(keys)} {kind}: {', '.join(keys[:3])}" for kind, keys in faults.items() if keys
        )
        stem = Path(where).stem.split("-")[0]
        guess = nearest(stem, [other for other in names if other != name])
        raise InputError(
            f"the weights do not fit the model {name}",
            where=where,
            got=told,
            do=f"Did you mean backbone.name = {guess!r}?" if guess else "Check backbone.name",
        )

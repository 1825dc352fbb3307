"""What cannot go together with where a trunk comes from (``scenario.backbone``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Backbone, Scenario

OWN_CODE = ("hub", "module")
"""Backbones whose opening runs somebody's own code."""

KEYS = {
    "model": ("timm", "hub", "module", "forest"),
    "path": ("hub", "module", "forest"),
    "mean": ("onnx", "hub", "module"),
    "std": ("onnx", "hub", "module"),
    "layout": ("onnx",),
    "output": ("onnx",),
    "pooling": ("hf",),
    "max_tokens": ("hf",),
    "width": ("fourier", "forest"),
}
"""Keys that say something to some kinds of backbones only."""

_NEEDED = {
    "timm": (("model", "the model's name"),),
    "hub": (("path", "the local clone"), ("model", "its entry point"), ("image_size", "pixels")),
    "module": (("model", '"package.module:Class"'), ("image_size", "pixels")),
}
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def _keys(scenario: Scenario) -> Iterator[Problem]:
    """Each key belongs to some kinds of backbones, and some need theirs."""
    backbone, usual = scenario.backbone, Backbone()
    for key, kinds in KEYS.items():
        value = getattr(backbone, key)
        if backbone.name not in kinds and value != getattr(usual, key):
            yield Problem(
                f"backbone.{key}",
                f'says nothing to backbone "{backbone.name}"',
                repr(value),
                do="Remove it, or set backbone.name = "
                + " or ".join(f'"{kind}"' for kind in kinds),
            )
    for key, what in _NEEDED.get(backbone.name, ()):
        if getattr(backbone, key) is None:
            yield Problem(f"backbone.{key}", f'backbone "{backbone.name}" needs it', None, what)


def _arithmetic(scenario: Scenario) -> Iterator[Problem]:
    """Mean and standard deviation belong together, one of each per colour."""
    backbone = scenario.backbone
    for key, value, other in (
        ("mean", backbone.mean, backbone.std),
        ("std", backbone.std, backbone.mean),
    ):
        if value is not None and len(value) != 3:
            yield Problem(f"backbone.{key}", "not one value per colour", repr(value), "3 values")
        if value is None and other is not None:
            yield Problem(f"backbone.{key}", "mean and std are given together", None, "3 values")


def _source(scenario: Scenario) -> Iterator[Problem]:
    """A file is a file, and a dotted path is one."""
    backbone = scenario.backbone
    if backbone.name == "onnx" and backbone.weights in ("default", "none"):
        yield Problem(
            "backbone.weights", 'backbone "onnx" is a file', repr(backbone.weights), "its path"
        )
    if backbone.name == "onnx" and backbone.extraction == "torch":
        yield Problem(
            "backbone.extraction",
            "an ONNX file is run by ONNX Runtime",
            '"torch"',
            '"auto", "onnx"',
        )
    if backbone.name == "module" and backbone.model and not _DOTTED.fullmatch(backbone.model):
        yield Problem(
            "backbone.model", "not a dotted path", repr(backbone.model), '"package.module:Class"'
        )


def _whole(scenario: Scenario) -> Iterator[Problem]:
    """Of an ONNX file only the output is known: nothing behind a cut in it can be trained."""
    if scenario.backbone.name != "onnx":
        return
    if scenario.transfer.mode != "head":
        yield Problem(
            "transfer.mode",
            'backbone "onnx" cannot be cut: only torch modules can',
            repr(scenario.transfer.mode),
            '"head"',
        )
    if "from_scratch" in scenario.evaluation.references:
        yield Problem(
            "evaluation.references",
            'backbone "onnx" cannot be trained from random weights',
            '"from_scratch"',
        )


BACKBONE_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = (
    _keys,
    _arithmetic,
    _source,
    _whole,
)


def real_backbone_problems(scenario: Scenario) -> Iterator[Problem]:
    """What real clients can never be asked to do: run code that a server names."""
    if scenario.backbone.name in OWN_CODE:
        yield Problem(
            "backbone.name",
            "real clients run no code that a server names",
            repr(scenario.backbone.name),
            'a torchvision model, "timm", or the network exported for "onnx"',
        )

"""What cannot go together with texts and the trunks that read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario

SOURCES = ("texts", "datasets")
"""Data that are texts."""

TRUNK = "hf"
"""The backbone that reads them."""


def source(scenario: Scenario) -> Iterator[Problem]:
    """Texts need a trunk that reads them, a place, and rows."""
    data, name = scenario.data, scenario.backbone.name
    if data.source in SOURCES and name != TRUNK:
        yield Problem(
            "backbone.name",
            f'source "{data.source}" is texts, which this backbone does not read',
            repr(name),
            f'"{TRUNK}"',
        )
    if data.source == "texts" and data.path is None:
        yield Problem("data.path", 'source "texts" needs a file', None, "a .csv or .parquet file")
    if data.source == "datasets" and (data.path is None) == (data.name is None):
        yield Problem(
            "data.path",
            'source "datasets" needs one place: a folder or a name',
            None if data.path is None else "both",
            "data.path (written by save_to_disk) or data.name",
        )
    if name == TRUNK and data.source not in SOURCES:
        yield Problem(
            "data.source",
            f'backbone "{TRUNK}" reads texts, and source "{data.source}" has none',
            repr(data.source),
            ", ".join(f'"{source}"' for source in SOURCES),
        )


def pictures(scenario: Scenario) -> Iterator[Problem]:
    """What is done to images cannot be done to texts."""
    if scenario.data.source not in SOURCES:
        return
    views, image_size = scenario.augmentation.views, scenario.backbone.image_size
    given = (
        ("shift.kinds", scenario.shift.kinds, "pictures are shifted", "[]"),
        (
            "adaptation.input",
            _unless(scenario.adaptation.input, "none"),
            "pictures are matched",
            '"none"',
        ),
        ("augmentation.views", _unless(views, 1), "pictures have views", "1"),
        (
            "evaluation.references",
            "from_scratch" in scenario.evaluation.references and "from_scratch",
            "pictures are trained on",
            "the other references",
        ),
        ("backbone.image_size", image_size, "a picture has this side", "no such key"),
    )
    for where, value, why, allowed in given:
        if value:
            yield Problem(where, f"{why}, and these data are texts", repr(value), allowed)


def mixed(scenario: Scenario) -> Iterator[Problem]:
    """What is stored before a cut says which of a text's places are tokens; nothing may blur it."""
    if scenario.data.source not in SOURCES:
        return
    if scenario.transfer.mode == "head" or scenario.transfer.cut == 0:
        return
    given = {
        "training.mixup": scenario.training.mixup,
        "augmentation.noise": scenario.augmentation.noise,
    }
    for where, value in given.items():
        if value:
            yield Problem(
                where,
                "what crosses the cut says which places are tokens, and these would be no more",
                f"{value:g}",
                "0",
                'Set transfer.mode = "head" to have it on vectors of whole texts',
            )


def zero_shot(scenario: Scenario) -> Iterator[Problem]:
    """A start from the classes' names needs a trunk that embeds them like the examples."""
    head, prompt = scenario.head, scenario.head.prompt
    if head.initial != "names":
        return
    if scenario.backbone.name != TRUNK:
        yield Problem(
            "head.initial",
            '"names" embeds the names of the classes, and only a trunk that reads texts can',
            '"names"',
            f'"zeros", "fed3r", "class_means", or backbone.name = "{TRUNK}"',
        )
    if head.kind not in ("linear", "cosine"):
        yield Problem(
            "head.kind", '"names" gives one vector per class', repr(head.kind), '"linear", "cosine"'
        )
    if scenario.transfer.mode != "head":
        yield Problem(
            "head.initial",
            "what stands behind the cut would move away from the names' embeddings",
            '"names"',
            'transfer.mode = "head"',
        )
    if "{}" not in prompt:
        yield Problem("head.prompt", "has no place for a name", repr(prompt), 'e.g. "about {}"')


def _unless(value: object, default: object) -> object:
    return None if value == default else value


TEXT_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = (
    source,
    pictures,
    mixed,
    zero_shot,
)

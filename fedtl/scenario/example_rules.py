"""What cannot go together with how many examples there are: views, few shots, a source task."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.privacy import unit_of
from fedtl.scenario.schema import Scenario

NO_IMAGES = ("texts", "datasets", "table")
"""Sources without images."""


def views(scenario: Scenario) -> Iterator[Problem]:
    """Several rows for one example: where one row has to be one example, they are out."""
    section, got = scenario.augmentation, f"augmentation.views = {scenario.augmentation.views}"
    if section.views == 1:
        return
    if scenario.data.source in NO_IMAGES:
        yield Problem(
            "augmentation.views",
            f'views are of images, and source "{scenario.data.source}" has none',
            str(section.views),
            do="Set augmentation.views = 1; augmentation.noise goes with every kind of example",
        )
    if not section.kinds:
        yield Problem(
            "augmentation.kinds",
            "without any kind all views are the same",
            "[]",
            "flip, crop, colour, randaugment",
        )
    privacy = scenario.privacy
    if privacy.mechanism in ("example", "release"):
        yield Problem(
            "privacy.mechanism",
            "an example with several views is several rows, and noise would hide one of them only",
            f'"{privacy.mechanism}" with {got}',
            do="Set augmentation.views = 1; augmentation.noise draws anew from the same row",
        )
    elif privacy.canaries:
        yield Problem(
            "privacy.canaries",
            "a canary is one row, and an example with several views is several",
            got,
            do="Set augmentation.views = 1",
        )
    if privacy.min_class_examples > 1:
        yield Problem(
            "privacy.min_class_examples",
            "views of one example would be counted as examples",
            got,
            do="Set augmentation.views = 1",
        )
    if scenario.training.validation_fraction:
        yield Problem(
            "training.validation_fraction",
            "views of one image would be on both sides: trained on, and validated on",
            got,
            do="Set augmentation.views = 1 or training.validation_fraction = 0",
        )


def shots(scenario: Scenario) -> Iterator[Problem]:
    """Which examples are drawn follows from which others there are."""
    if scenario.data.shots is not None and unit_of(scenario.privacy) == "example":
        yield Problem(
            "data.shots",
            "one example more or less would change which of the client's others are drawn",
            str(scenario.data.shots),
            "no such key",
            "Protect whole clients, or draw the few examples before",
        )


def source_task(scenario: Scenario) -> Iterator[Problem]:
    """What is forgotten is measured on images, of weights that were trained for them."""
    if scenario.evaluation.source_path is None:
        return
    if scenario.data.source in NO_IMAGES:
        yield Problem(
            "evaluation.source_path",
            f'the source task is one of images, and source "{scenario.data.source}" has none',
            do="Remove it",
        )
    if scenario.transfer.mode == "scratch":
        yield Problem(
            "evaluation.source_path",
            "a network from random weights has no source task to forget",
            do='Remove it, or set transfer.mode = "full"',
        )


EXAMPLE_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = (views, shots, source_task)

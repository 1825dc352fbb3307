"""Every example as one row of numbers: from the store, through the trunk, or as it came.

What kind of examples there are decides the way; whoever trains on the rows need not know it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl import machine
from fedtl.data.clients import ClientSplit, split_clients
from fedtl.data.examples import Examples, Images
from fedtl.data.leakage import content_hashes
from fedtl.data.partitions import assign_clients
from fedtl.data.shifts import unshifted
from fedtl.scenario.schema import Scenario
from fedtl.transfer.backbones import INPUT, Backbone
from fedtl.transfer.entries import stored_as
from fedtl.transfer.features import FeatureStore, StoredFeatures
from fedtl.transfer.matching import match_examples
from fedtl.transfer.pipeline import hash_pixels
from fedtl.types import Int64, Tail

ExtractionProgress = Callable[[int, int], None]
"""Called with images done and images in all."""


@dataclass(frozen=True)
class OpenedData:
    """A scenario's data before the trunk has seen them."""

    scenario: Scenario
    examples: Examples
    split: ClientSplit
    backbone: Backbone
    tail: Tail | None = None


@dataclass(frozen=True)
class ReadyFeatures:
    """Features of all examples in use, and what is worth telling about them.

    Attributes:
        matrix: [n, A], activations at the cut.
        tail: what stands between the cut and the head, where that is trained too.
    """

    matrix: npt.NDArray[np.floating[Any]]
    content: npt.NDArray[np.uint8]
    examples: Examples
    split: ClientSplit
    facts: Mapping[str, Any]
    seconds: float
    notes: tuple[str, ...]
    tail: Tail | None = None


def allowed_threads(scenario: Scenario) -> int:
    """Threads to use: what the scenario asks for, else all cores the machine allows."""
    return scenario.engine.threads or machine.allowed_cores()


def dealt(scenario: Scenario, examples: Examples) -> ClientSplit:
    """Who holds which of the examples, and tests on which."""
    assignment = assign_clients(examples, scenario.clients, scenario.seed)
    return split_clients(
        assignment, examples, scenario.clients, scenario.data.test_fraction, scenario.seed
    )


def without(opened: OpenedData, keep: Int64) -> OpenedData:
    """The data with only the rows ``keep``, dealt anew: the others could not be decoded."""
    examples = opened.examples.subset(keep)
    return replace(opened, examples=examples, split=dealt(opened.scenario, examples))


def make_features(opened: OpenedData, progress: ExtractionProgress | None = None) -> ReadyFeatures:
    """Every example's row, and who holds which."""
    examples = opened.examples
    if examples.table is not None or opened.backbone.takes == "rows":
        return _of_rows(opened)
    threads, matches = allowed_threads(opened.scenario), _matches(opened)
    stored = _stored(opened, examples, threads, progress)
    if len(stored.kept) < len(examples):
        opened = without(opened, stored.kept)
        if matches:  # dealt anew, an image may have another client, and so another map
            return make_features(_noted(opened, stored.notes), progress)
        examples = opened.examples
    facts = {"cached": stored.cached, "way": stored.way, "num_bytes": stored.num_bytes}
    notes = (*examples.notes, *stored.notes)
    content = stored.content
    if opened.scenario.shift.kinds or matches:  # which hides copies of an image from each other
        assert examples.images is not None
        content = _content(unshifted(examples.images), threads)
    return ReadyFeatures(
        stored.matrix, content, examples, opened.split, facts, stored.seconds, notes, opened.tail
    )


def _stored(
    opened: OpenedData,
    examples: Examples,
    threads: int,
    progress: ExtractionProgress | None,
) -> StoredFeatures:
    """What the trunk makes of images or texts, from the store or made now."""
    scenario, section = opened.scenario, opened.scenario.backbone
    if _matches(opened):
        preprocessing = opened.backbone.preprocessing
        examples = match_examples(examples, opened.split, preprocessing, scenario.seed, threads)
    assert examples.images is not None
    return FeatureStore().features(
        opened.backbone,
        examples.images,
        examples.fingerprint,
        # whole numbers up to 2048 are exact in half a float
        dtype="float16" if opened.backbone.cut == INPUT else section.feature_dtype,
        way=section.extraction,
        device=scenario.engine.device,
        on_bad_file=scenario.data.on_bad_file,
        threads=threads,
        progress=progress,
    )


def _matches(opened: OpenedData) -> bool:
    return opened.scenario.adaptation.input == "match"


def _of_rows(opened: OpenedData) -> ReadyFeatures:
    """What comes as rows of numbers."""
    examples, section = opened.examples, opened.scenario.backbone
    matrix = stored_as(np.asarray(examples.features), section.feature_dtype)
    facts = {"cached": True, "way": "identity", "num_bytes": int(matrix.nbytes)}
    content = content_hashes(np.asarray(examples.features))
    return ReadyFeatures(matrix, content, examples, opened.split, facts, 0.0, examples.notes)


def _noted(opened: OpenedData, notes: tuple[str, ...]) -> OpenedData:
    examples = replace(opened.examples, notes=(*opened.examples.notes, *notes))
    return replace(opened, examples=examples)


def _content(images: Images, threads: int) -> npt.NDArray[np.uint8]:
    with ThreadPoolExecutor(threads) as pool:
        hashes = pool.map(lambda i: hash_pixels(images.load(i)), range(len(images)))
        return np.stack(list(hashes))

"""Every example as one row of numbers: from the store, through the trunk, or as it came.

What kind of examples there are decides the way; whoever trains on the rows need not know it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl import machine
from fedtl.data.clients import ClientSplit, on_rows, split_clients
from fedtl.data.examples import Examples, Images, Texts
from fedtl.data.leakage import row_hashes
from fedtl.data.partitions import assign_clients
from fedtl.data.scaling import table_rows
from fedtl.data.shifts import unshifted
from fedtl.scenario.schema import Scenario
from fedtl.transfer.backbones import INPUT, Backbone
from fedtl.transfer.entries import stored_as
from fedtl.transfer.features import FeatureStore, StoredFeatures
from fedtl.transfer.matching import match_examples
from fedtl.transfer.pipeline import hash_pixels
from fedtl.transfer.row_trunks import rows_through
from fedtl.transfer.views import Extended, extend
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
        views: so many rows at the end are further views of training images.
    """

    matrix: npt.NDArray[np.floating[Any]]
    content: npt.NDArray[np.uint8]
    examples: Examples
    split: ClientSplit
    facts: Mapping[str, Any]
    seconds: float
    notes: tuple[str, ...]
    tail: Tail | None = None
    views: int = 0


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
    """The data with only the rows ``keep``: the others could not be decoded.

    They are dealt anew, but for few shots, which only lose what they have.
    """
    examples, scenario = opened.examples.subset(keep), opened.scenario
    if scenario.data.shots is not None:  # few are left of what was dealt
        return replace(opened, examples=examples, split=on_rows(opened.split, keep))
    return replace(opened, examples=examples, split=dealt(scenario, examples))


def make_features(opened: OpenedData, progress: ExtractionProgress | None = None) -> ReadyFeatures:
    """Every example's row, and who holds which."""
    examples = opened.examples
    if examples.kind == "rows":
        return _of_rows(opened)
    threads, matches = allowed_threads(opened.scenario), _matches(opened)
    stored = _stored(opened, examples, threads, progress)
    if len(stored.kept) < len(examples):
        opened = without(opened, stored.kept)
        if matches:  # dealt anew, an image may have another client, and so another map
            return make_features(_noted(opened, stored.notes), progress)
        examples = opened.examples
    facts = {
        "cached": stored.cached,
        "way": stored.way,
        "num_bytes": stored.num_bytes,
        "through_trunk": _run_now(stored),
        "flops": stored.flops,
    }
    notes = (*examples.notes, *stored.notes)
    content = stored.content
    if opened.scenario.shift.kinds or matches:  # which hides copies of an image from each other
        assert examples.images is not None
        content = _content(unshifted(examples.images), threads)
    ready = ReadyFeatures(
        stored.matrix, content, examples, opened.split, facts, stored.seconds, notes, opened.tail
    )
    return ready if opened.scenario.augmentation.views == 1 else _viewed(opened, ready, progress)


def _viewed(
    opened: OpenedData, ready: ReadyFeatures, progress: ExtractionProgress | None
) -> ReadyFeatures:
    """The same with further views of each training image."""
    scenario, threads = opened.scenario, allowed_threads(opened.scenario)

    def features(images: Images, fingerprint: str) -> StoredFeatures:
        return _through_trunk(opened, images, fingerprint, threads, progress)

    base = Extended(ready.matrix, ready.content, ready.examples, ready.split, ())
    seen = _seen(opened, ready.examples, threads)
    found = extend(base, seen, scenario.augmentation, scenario.seed, features)
    facts = {
        **ready.facts,
        "cached": ready.facts["cached"] and all(part.cached for part in found.stored),
        "num_bytes": ready.facts["num_bytes"] + sum(part.num_bytes for part in found.stored),
        "through_trunk": ready.facts["through_trunk"] + sum(map(_run_now, found.stored)),
    }
    return replace(
        ready,
        matrix=found.matrix,
        content=found.content,
        examples=found.examples,
        split=found.split,
        facts=facts,
        seconds=ready.seconds + sum(part.seconds for part in found.stored),
        views=len(found.examples) - len(ready.examples),
    )


def _run_now(stored: StoredFeatures) -> int:
    """Examples that went through the trunk in this call."""
    return 0 if stored.cached else len(stored.kept)


def _stored(
    opened: OpenedData,
    examples: Examples,
    threads: int,
    progress: ExtractionProgress | None,
) -> StoredFeatures:
    """What the trunk makes of images or texts, from the store or made now."""
    if examples.texts is not None:
        return _of_texts(opened, examples.texts, examples.fingerprint, threads, progress)
    examples = _seen(opened, examples, threads)
    assert examples.images is not None
    return _through_trunk(opened, examples.images, examples.fingerprint, threads, progress)


def _seen(opened: OpenedData, examples: Examples, threads: int) -> Examples:
    """The examples as the trunk sees them."""
    if not _matches(opened):
        return examples
    preprocessing, seed = opened.backbone.preprocessing, opened.scenario.seed
    return match_examples(examples, opened.split, preprocessing, seed, threads)


def _through_trunk(
    opened: OpenedData,
    images: Images,
    fingerprint: str,
    threads: int,
    progress: ExtractionProgress | None,
) -> StoredFeatures:
    scenario, section = opened.scenario, opened.scenario.backbone
    return FeatureStore().features(
        opened.backbone,
        images,
        fingerprint,
        # whole numbers up to 2048 are exact in half a float
        dtype="float16" if opened.backbone.cut == INPUT else section.feature_dtype,
        way=section.extraction,
        device=scenario.engine.device,
        on_bad_file=scenario.data.on_bad_file,
        threads=threads,
        progress=progress,
    )


def _of_texts(
    opened: OpenedData,
    texts: Texts,
    fingerprint: str,
    threads: int,
    progress: ExtractionProgress | None,
) -> StoredFeatures:
    from fedtl.transfer.text_features import text_features

    scenario, section = opened.scenario, opened.scenario.backbone
    return text_features(
        FeatureStore(),
        opened.backbone,
        texts,
        fingerprint,
        # numbers of tokens are exact in whole floats only
        dtype="float32" if opened.backbone.cut == INPUT else section.feature_dtype,
        way=section.extraction,
        device=scenario.engine.device,
        threads=threads,
        progress=progress,
    )


def _matches(opened: OpenedData) -> bool:
    return opened.scenario.adaptation.input == "match"


def _of_rows(opened: OpenedData) -> ReadyFeatures:
    """What comes as rows of numbers, or as a table that becomes such rows."""
    examples, scenario, started = opened.examples, opened.scenario, time.perf_counter()
    notes, shared = examples.notes, ""
    if examples.table is None:
        rows = np.asarray(examples.features)
    else:
        scaled = table_rows(examples.table, scenario.data, opened.split)
        rows, shared = scaled.matrix, scaled.shared
        notes = (*notes, *scaled.notes, *([shared] if shared else []))
    made = rows_through(opened.backbone, rows, scenario.data, examples.channels)
    matrix = stored_as(made, scenario.backbone.feature_dtype)
    facts = {
        "cached": True,
        "way": opened.backbone.name,
        "num_bytes": int(matrix.nbytes),
        **({"shared": shared} if shared else {}),
    }
    seconds = time.perf_counter() - started
    content = row_hashes(examples)
    return ReadyFeatures(
        matrix, content, examples, opened.split, facts, seconds, notes, tail=opened.tail
    )


def _noted(opened: OpenedData, notes: tuple[str, ...]) -> OpenedData:
    examples = replace(opened.examples, notes=(*opened.examples.notes, *notes))
    return replace(opened, examples=examples)


def _content(images: Images, threads: int) -> npt.NDArray[np.uint8]:
    with ThreadPoolExecutor(threads) as pool:
        hashes = pool.map(lambda i: hash_pixels(images.load(i)), range(len(images)))
        return np.stack(list(hashes))

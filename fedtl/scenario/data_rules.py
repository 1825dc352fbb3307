"""Combinations of keys about data and clients that cannot work together, each with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Data, Scenario

ROWS = ("identity", "fourier", "forest", "windows")
"""Backbones that take rows of numbers and nothing else."""

NEEDS_PATH = {
    "folder": "a folder of images",
    "arrays": "an .npz or .csv file",
    "table": "a .csv or .parquet file",
    "sound": "a folder or .zip file of wav files",
}


def source(scenario: Scenario) -> Iterator[Problem]:
    """Which keys go with which source."""
    data = scenario.data
    if data.source in NEEDS_PATH and data.path is None:
        what = NEEDS_PATH[data.source]
        yield Problem("data.path", f'source "{data.source}" needs {what}', None, "a path")
    if data.source == "digits" and data.path is not None:
        yield Problem(
            "data.path",
            'source "digits" is embedded and reads no path',
            repr(data.path),
            do='Remove it, or set data.source = "folder" or "arrays"',
        )
    if data.source == "torchvision" and data.name is None:
        yield Problem("data.name", 'source "torchvision" needs a data set', None, 'e.g. "CIFAR10"')
    if data.source not in ("torchvision", "datasets") and data.name is not None:
        yield Problem(
            "data.name",
            f'source "{data.source}" has no named sets',
            repr(data.name),
            do='Remove it, or set data.source = "torchvision"',
        )
    if data.domains and data.source not in ("folder", "sound"):
        yield Problem(
            "data.domains",
            f'only sources "folder" and "sound" have a domain level, not "{data.source}"',
            "true",
            do="Remove it: arrays and tables carry a `domain` column, digits have domains of "
            "their own",
        )


def partition(scenario: Scenario) -> Iterator[Problem]:
    """Which partitions these data can have."""
    clients, data = scenario.clients, scenario.data
    wants_domains = clients.partition == "domain" or clients.within_domains
    by_path = data.source in ("folder", "sound") and not (data.domains or data.domain_pattern)
    if wants_domains and (data.source == "torchvision" or by_path):
        yield Problem(
            "clients.partition",
            f'a split by domain needs domains, and source "{data.source}" has none here',
            do="Set data.domains = true for a <domain>/<class>/<image> folder",
        )
    if (
        clients.partition == "natural"
        and data.source in ("digits", "folder", "torchvision", "sound")
        and not data.client_pattern
    ):
        yield Problem(
            "clients.partition",
            f'"natural" needs to know whose each example is, and source "{data.source}" does not',
            do='Use data.source = "arrays" with `client`, data.client_pattern for a folder, '
            "or another partition",
        )
    if clients.within_domains and clients.partition in ("natural", "file", "flwr_datasets"):
        yield Problem(
            "clients.within_domains",
            f'"{clients.partition}" decides itself who holds what',
            "true",
            "false",
        )
    if (clients.partition == "flwr_datasets") != (clients.partitioner is not None):
        yield Problem(
            "clients.partitioner",
            'goes with partition "flwr_datasets", and with no other',
            repr(clients.partitioner),
            do='e.g. partition = "flwr_datasets", partitioner = "LinearPartitioner"',
        )
    if (clients.partition == "file") != (clients.split_file is not None):
        yield Problem(
            "clients.split_file",
            'goes with partition "file", and with no other',
            repr(clients.split_file),
            do="Write one with 'fedtl split SCENARIO --write FILE'",
        )


def folder(scenario: Scenario) -> Iterator[Problem]:
    """What is read off the paths of a folder's images."""
    data = scenario.data
    if data.classes == "path" and not data.domains:
        yield Problem(
            "data.classes",
            '"path" tells classes of one name in several domains apart, and there are no domains',
            '"path"',
            '"folder", or data.domains = true',
        )
    yield from _pattern(data, "client_pattern", "client", ("folder", "sound"))
    yield from _pattern(data, "label_pattern", "class", ("sound",))
    yield from _pattern(data, "domain_pattern", "domain", ("sound",))
    for key in ("label_pattern", "domain_pattern"):
        if getattr(data, key) is not None and data.domains:
            what = "data.domains says that folders tell it"
            yield Problem(f"data.{key}", what, repr(getattr(data, key)), do="Remove one of them")


def _pattern(data: Data, key: str, what: str, sources: tuple[str, ...]) -> Iterator[Problem]:
    """A regular expression that is looked for in paths."""
    pattern: str | None = getattr(data, key)
    if pattern is None:
        return
    where = f"data.{key}"
    if data.source not in sources:
        why = f'is looked for in paths of files, and source "{data.source}" has none'
        if data.source == "folder":
            why = "is for recordings; images lie in folders of their class and domain"
        yield Problem(where, why, repr(pattern))
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as error:
        yield Problem(where, f"no regular expression: {error}", repr(pattern))
    else:
        if not groups:
            yield Problem(
                where, f"has no group for the {what}'s name", repr(pattern), r"e.g. _(\d+)\.png$"
            )


def shift(scenario: Scenario) -> Iterator[Problem]:
    """What can be shifted."""
    shift = scenario.shift
    if len(set(shift.kinds)) < len(shift.kinds):
        yield Problem("shift.kinds", "names one twice", repr(shift.kinds))
    if shift.kinds and scenario.backbone.name in ROWS:
        yield Problem(
            "shift.kinds",
            f'shifts are made to images, and backbone "{scenario.backbone.name}" takes ready '
            "features or rows",
            repr(shift.kinds),
            "[], or a pretrained backbone over images",
        )
    if (shift.kinds or shift.concept_fraction) and scenario.data.on_bad_file == "skip":
        yield Problem(
            "data.on_bad_file",
            "who is shifted and how follows from who holds what, which skipped images would change",
            '"skip"',
            '"stop"',
        )


DATA_RULES = (source, partition, folder, shift)

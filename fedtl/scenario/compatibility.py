"""Combinations of keys that cannot work together, each with the reason.

A rule is a function from a valid scenario to the problems it sees. Rules look at the scenario
alone; what only the data can tell (clients without a domain, say) is refused where it is met.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedtl.errors import Problem
from fedtl.scenario.schema import Scenario


def find_conflicts(scenario: Scenario) -> list[Problem]:
    """Every impossible combination in ``scenario``, empty where there is none."""
    return [problem for rule in RULES for problem in rule(scenario)]


def _source(scenario: Scenario) -> Iterator[Problem]:
    data = scenario.data
    if data.source in ("folder", "arrays") and data.path is None:
        what = "a folder of images" if data.source == "folder" else "an .npz or .csv file"
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
    if data.source != "torchvision" and data.name is not None:
        yield Problem(
            "data.name",
            f'source "{data.source}" has no named sets',
            repr(data.name),
            do='Remove it, or set data.source = "torchvision"',
        )
    if data.domains and data.source != "folder":
        yield Problem(
            "data.domains",
            f'only source "folder" has a domain level, not "{data.source}"',
            "true",
            do="Remove it: arrays carry a `domain` column, digits have domains of their own",
        )


def _partition(scenario: Scenario) -> Iterator[Problem]:
    clients, data = scenario.clients, scenario.data
    wants_domains = clients.partition == "domain" or clients.within_domains
    if wants_domains and (
        data.source == "torchvision" or (data.source == "folder" and not data.domains)
    ):
        yield Problem(
            "clients.partition",
            f'a split by domain needs domains, and source "{data.source}" has none here',
            do="Set data.domains = true for a <domain>/<class>/<image> folder",
        )
    if clients.partition == "natural" and data.source != "arrays":
        yield Problem(
            "clients.partition",
            f'"natural" needs a `client` column, and source "{data.source}" has none',
            do='Use data.source = "arrays" with `client`, or another partition',
        )
    if clients.within_domains and clients.partition in ("natural", "flwr_datasets"):
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


def _backbone(scenario: Scenario) -> Iterator[Problem]:
    backbone = scenario.backbone
    if backbone.name == "identity":
        if scenario.data.source != "arrays":
            yield Problem(
                "backbone.name",
                f'"identity" takes features, and source "{scenario.data.source}" gives images',
                do='Use a pretrained backbone, or data.source = "arrays" with float features',
            )
        for key in ("image_size", "sha256"):
            if getattr(backbone, key) is not None:
                yield Problem(f"backbone.{key}", '"identity" has no trunk to apply it to')
        if backbone.weights != "default":
            yield Problem("backbone.weights", '"identity" has no weights', repr(backbone.weights))
    if backbone.weights == "none" and backbone.sha256 is not None:
        yield Problem("backbone.sha256", 'weights "none" are random and have no file to check')


def _references(scenario: Scenario) -> Iterator[Problem]:
    names = scenario.evaluation.references
    if len(set(names)) < len(names):
        yield Problem("evaluation.references", "names one twice", repr(names))


def _participation(scenario: Scenario) -> Iterator[Problem]:
    for absence in scenario.participation.absent:
        if absence.round > scenario.rounds:
            yield Problem(
                "participation.absent",
                "names a round that the scenario does not have",
                str(absence.round),
                f"1 to {scenario.rounds}",
            )


RULES = (_source, _partition, _backbone, _references, _participation)

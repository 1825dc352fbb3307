"""Everything a scenario can name, for ``fedtl list``."""

from __future__ import annotations

from typing import get_args

from fedtl.scenario import schema
from fedtl.scenario.load import list_scenarios, strategy_names
from fedtl.scenario.sections import Section


def choices() -> dict[str, list[str]]:
    """Names by kind. Backbones and data sets of torchvision are read from torchvision itself."""
    from fedtl.data.torchvision_sets import SETS
    from fedtl.transfer.backbones import OPENERS, TAKES
    from fedtl.transfer.backbones import names as backbone_names

    return {
        "scenarios": list(list_scenarios()),
        "data sources": _literal(schema.Data, "source"),
        "torchvision data sets": list(SETS),
        "partitions": _literal(schema.Clients, "partition"),
        "backbones": list(backbone_names()),
        "backbones take": [f"{name}: {TAKES.get(name, 'images')}" for name in OPENERS],
        "heads": _literal(schema.Head, "kind"),
        "schedules": _literal(schema.Training, "schedule"),
        "strategies": strategy_names(),
        "engines": _literal(schema.Engine, "kind"),
        "transfer modes": _literal(schema.Transfer, "mode"),
        "references": _items(schema.Evaluation, "references"),
    }


def _items(section: type[Section], key: str) -> list[str]:
    """Of a key whose value is a list of names."""
    (names,) = get_args(section.model_fields[key].annotation)
    return [str(name) for name in get_args(names)]


def _literal(section: type[Section], key: str) -> list[str]:
    return [str(name) for name in get_args(section.model_fields[key].annotation)]

"""What cannot go together with tables, series and sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedtl.errors import Problem
from fedtl.scenario.data_rules import ROWS
from fedtl.scenario.privacy import unit_of
from fedtl.scenario.schema import Backbone, Data, Scenario

COLUMNS = ("numeric", "categorical", "categories", "ignore", "scaling")
SOUND = ("rate", "seconds", "mel_bands")
FORESTS = ("forest", "extra_trees", "quantiles")


def _other_source(scenario: Scenario) -> Iterator[Problem]:
    """Keys of tables and of sound say something only there."""
    data, usual = scenario.data, Data()
    for source, keys in (("table", COLUMNS), ("sound", SOUND)):
        for key in keys:
            if data.source != source and getattr(data, key) != getattr(usual, key):
                yield Problem(
                    f"data.{key}",
                    f'is for source "{source}", not "{data.source}"',
                    repr(getattr(data, key)),
                    do=f'Remove it, or set data.source = "{source}"',
                )


def _columns(scenario: Scenario) -> Iterator[Problem]:
    """Every column has one role."""
    data = scenario.data
    if data.source != "table":
        return
    roles: dict[str, str] = {}
    named = [(name, "label") for name in [data.label]]
    named += [(name, key) for key in ("domain", "client") if (name := getattr(data, key))]
    lists = (("numeric", data.numeric or []), ("categorical", data.categorical))
    named += [(name, key) for key, names in (*lists, ("ignore", data.ignore)) for name in names]
    for name, key in named:
        # one column may say both who a client is and where it stands
        if name in roles and {key, roles[name]} != {"domain", "client"}:
            other = "twice" if roles[name] == key else f"in data.{roles[name]} too"
            yield Problem(f"data.{key}", f"{name!r} is named {other}", do="Name each column once")
        roles[name] = key
    for name, values in data.categories.items():
        if name not in data.categorical:
            yield Problem(
                f"data.categories.{name}",
                "states the values of a column that is not in data.categorical",
                do=f"Add {name!r} to data.categorical",
            )
        if len(set(values)) < len(values) or not values:
            what = "names a value twice" if values else "has no value"
            yield Problem(f"data.categories.{name}", what)


def _trunks(scenario: Scenario) -> Iterator[Problem]:
    """What trunks of rows need, and what only they use."""
    backbone, source = scenario.backbone, scenario.data.source
    if backbone.name == "windows" and source == "table":
        yield Problem(
            "backbone.name",
            "a series comes as an array of steps, and the columns of a table are none",
            '"windows"',
            do='Use data.source = "arrays" with x of [n, steps] or [n, steps, channels]',
        )
    if backbone.name == "forest":
        if backbone.path is None:
            yield Problem(
                "backbone.path", "a forest is fitted on a public source set", None, "its file"
            )
        if backbone.model not in (None, *FORESTS):
            yield Problem(
                "backbone.model", "no such forest", repr(backbone.model), ", ".join(FORESTS)
            )
    if backbone.name in ROWS and backbone.name != "identity":  # which is refused elsewhere
        if scenario.adaptation.input == "match":
            yield Problem("adaptation.input", "it changes pixels, and there are rows", '"match"')
        if "from_scratch" in scenario.evaluation.references:
            yield Problem(
                "evaluation.references",
                '"from_scratch" trains a network on images, and there are only rows',
                '"from_scratch"',
            )
    usual = Backbone()
    for name, keys in (("fourier", ("scale",)), ("windows", ("window", "channels"))):
        for key in keys:
            if backbone.name != name and getattr(backbone, key) != getattr(usual, key):
                yield Problem(
                    f"backbone.{key}",
                    f'is for backbone "{name}", not "{backbone.name}"',
                    repr(getattr(backbone, key)),
                )


def _private(scenario: Scenario) -> Iterator[Problem]:
    """Where scaling makes one member's rows depend on what others have."""
    unit, scaling = unit_of(scenario.privacy), scenario.data.scaling
    if unit is None or scenario.data.source != "table":
        return
    if scaling == "federated":
        yield Problem(
            "data.scaling",
            "everybody's means are taken from sums that no noise covers",
            '"federated"',
            '"client", "none"' if unit == "client" else '"none"',
        )
    elif scaling == "client" and unit == "example":
        yield Problem(
            "data.scaling",
            "one example would change what is made of the client's others",
            '"client"',
            '"none"',
            'Protect whole clients, or scale columns by figures that are public and use "none"',
        )


TABLE_RULES: tuple[Callable[[Scenario], Iterator[Problem]], ...] = (
    _other_source,
    _columns,
    _trunks,
    _private,
)


def real_table_problems(scenario: Scenario) -> Iterator[Problem]:
    """What clients who cannot look at each other's tables must be told."""
    data = scenario.data
    if data.source == "table":
        if data.scaling == "federated":
            yield Problem(
                "data.scaling",
                "real clients do not send the sums that everybody's means are taken from",
                '"federated"',
                '"client", "none"',
            )
        if data.numeric is None:
            yield Problem(
                "data.numeric",
                "real clients must be told which columns hold numbers, and in which order",
                None,
                "a list, perhaps []",
            )
        for name in data.categorical:
            if name not in data.categories:
                yield Problem(
                    f"data.categories.{name}",
                    "real clients must be told which values there are",
                    None,
                    f'e.g. categories.{name} = ["0", "1"]',
                )
    if scenario.backbone.name == "forest":
        yield Problem(
            "backbone.name",
            "a public source set does not travel to real clients yet",
            '"forest"',
            '"identity", "fourier", "windows"',
        )

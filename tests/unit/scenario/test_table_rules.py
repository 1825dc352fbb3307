"""Keys of tables, series and sound that cannot go together are refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest

from fedtl.errors import InputError
from fedtl.scenario.adaptation_rules import check_real
from fedtl.scenario.compatibility import find_conflicts
from fedtl.scenario.schema import Scenario

TABLE = {"source": "table", "path": "a.csv"}
SOUND = {"source": "sound", "path": "a.zip"}
IDENTITY = {"name": "identity"}


def scenario(**tables: Any) -> Scenario:
    return Scenario.model_validate({"name": "x", **tables})


def conflicts(**tables: Any) -> dict[str, str]:
    return {problem.where: problem.line() for problem in find_conflicts(scenario(**tables))}


@pytest.mark.parametrize(
    "tables",
    [
        {"data": TABLE, "backbone": IDENTITY},
        {"data": TABLE, "backbone": {"name": "fourier", "scale": 2.0}},
        {"data": TABLE, "backbone": {"name": "forest", "path": "p.csv", "model": "quantiles"}},
        {"data": TABLE, "backbone": IDENTITY, "clients": {"partition": "natural"}},
        {"data": TABLE, "backbone": IDENTITY, "clients": {"partition": "domain"}},
        {"data": TABLE | {"domain": "who", "client": "who"}, "backbone": IDENTITY},
        {
            "data": {"source": "arrays", "path": "a.npz"},
            "backbone": {"name": "windows", "window": 8, "channels": 3},
        },
        {"data": SOUND},
        {
            "data": SOUND
            | {"client_pattern": "(a)", "domain_pattern": "(b)", "label_pattern": "(c)"},
            "clients": {"partition": "domain"},
        },
        {"data": SOUND | {"domains": True, "rate": 16_000, "mel_bands": 40}},
    ],
)
def test_what_goes_together(tables: dict[str, Any]) -> None:
    assert conflicts(**tables) == {}


@pytest.mark.parametrize(
    ("tables", "where", "says"),
    [
        ({"data": {"source": "table"}, "backbone": IDENTITY}, "data.path", ".csv or .parquet"),
        ({"data": {"source": "sound"}}, "data.path", "wav"),
        ({"data": SOUND, "backbone": IDENTITY}, "backbone.name", "gives images"),
        ({"data": {"scaling": "none"}}, "data.scaling", 'is for source "table"'),
        ({"data": SOUND | {"numeric": ["a"]}}, "data.numeric", 'is for source "table"'),
        ({"data": {"rate": 16_000}}, "data.rate", 'is for source "sound"'),
        (
            {"data": TABLE | {"numeric": ["a", "a"]}, "backbone": IDENTITY},
            "data.numeric",
            "'a' is named twice",
        ),
        (
            {"data": TABLE | {"numeric": ["a"], "categorical": ["a"]}, "backbone": IDENTITY},
            "data.categorical",
            "'a' is named in data.numeric too",
        ),
        (
            {"data": TABLE | {"ignore": ["label"]}, "backbone": IDENTITY},
            "data.ignore",
            "in data.label too",
        ),
        (
            {"data": TABLE | {"categories": {"k": ["a"]}}, "backbone": IDENTITY},
            "data.categories.k",
            "not in data.categorical",
        ),
        (
            {
                "data": TABLE | {"categorical": ["k"], "categories": {"k": ["a", "a"]}},
                "backbone": IDENTITY,
            },
            "data.categories.k",
            "twice",
        ),
        (
            {
                "data": TABLE | {"categorical": ["k"], "categories": {"k": []}},
                "backbone": IDENTITY,
            },
            "data.categories.k",
            "no value",
        ),
        ({"data": TABLE, "backbone": {"name": "windows"}}, "backbone.name", "comes as an array"),
        ({"data": TABLE, "backbone": {"name": "forest"}}, "backbone.path", "public source set"),
        (
            {"data": TABLE, "backbone": {"name": "forest", "path": "p.csv", "model": "oak"}},
            "backbone.model",
            "extra_trees",
        ),
        (
            {
                "data": TABLE,
                "backbone": {"name": "fourier"},
                "evaluation": {"references": ["from_scratch"]},
            },
            "evaluation.references",
            "there are only rows",
        ),
        (
            {"data": TABLE, "backbone": {"name": "fourier"}, "adaptation": {"input": "match"}},
            "adaptation.input",
            "changes pixels",
        ),
        (
            {"data": TABLE, "backbone": {"name": "fourier"}, "shift": {"kinds": ["noise"]}},
            "shift.kinds",
            "made to images",
        ),
        (
            {"data": TABLE, "backbone": {"name": "identity", "window": 9}},
            "backbone.window",
            'is for backbone "windows"',
        ),
        ({"data": SOUND | {"label_pattern": "(ab"}}, "data.label_pattern", "no regular expression"),
        ({"data": SOUND | {"label_pattern": "abc"}}, "data.label_pattern", "has no group"),
        (
            {"data": TABLE | {"label_pattern": "(a)"}, "backbone": IDENTITY},
            "data.label_pattern",
            "",
        ),
        (
            {"data": {"source": "folder", "path": "a", "label_pattern": "(a)"}},
            "data.label_pattern",
            "is for recordings",
        ),
        (
            {"data": SOUND | {"domains": True, "domain_pattern": "(a)"}},
            "data.domain_pattern",
            "Remove one",
        ),
        ({"data": SOUND, "clients": {"partition": "natural"}}, "clients.partition", "whose"),
        ({"data": SOUND, "clients": {"partition": "domain"}}, "clients.partition", "needs domains"),
    ],
)
def test_what_does_not(tables: dict[str, Any], where: str, says: str) -> None:
    found = conflicts(**tables)
    assert where in found, found
    assert says in found[where]


@pytest.mark.parametrize(
    ("mechanism", "scaling", "refused"),
    [
        ("none", "federated", False),
        ("central", "client", False),
        ("central", "federated", True),
        ("local", "federated", True),
        ("example", "client", True),
        ("example", "federated", True),
        ("example", "none", False),
    ],
)
def test_scaling_that_noise_does_not_cover(mechanism: str, scaling: str, refused: bool) -> None:
    found = conflicts(
        data=TABLE | {"scaling": scaling}, backbone=IDENTITY, privacy={"mechanism": mechanism}
    )
    assert ("data.scaling" in found) == refused


STATED = TABLE | {"numeric": ["a"], "categorical": ["k"], "categories": {"k": ["u", "v"]}}


def test_real_clients_are_told_the_columns() -> None:
    check_real(scenario(data=STATED, backbone=IDENTITY))
    for change, where in (
        ({"scaling": "federated"}, "data.scaling"),
        ({"numeric": None}, "data.numeric"),
        ({"categories": {}}, "data.categories.k"),
    ):
        with pytest.raises(InputError) as caught:
            check_real(scenario(data=STATED | change, backbone=IDENTITY))
        assert caught.value.where == where
    with pytest.raises(InputError, match="does not travel"):
        check_real(scenario(data=STATED, backbone={"name": "forest", "path": "p.csv"}))

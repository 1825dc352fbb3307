"""Keys about data and clients that cannot go together, each refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from fedtl.errors import ScenarioError
from fedtl.scenario.load import validate
from fedtl.scenario.schema import Scenario

FOLDER = {"source": "folder", "path": "x"}
DRAWERS = {**FOLDER, "client_pattern": r"_(\d+)\.png$"}


def judged(**tables: Any) -> Scenario:
    return validate({"name": "a", **tables}, "a.toml", {})


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"clients": {"partition": "file"}}, "clients.split_file"),
        ({"clients": {"split_file": "a.csv"}}, "clients.split_file"),
        (
            {"clients": {"partition": "file", "split_file": "a.csv", "within_domains": True}},
            "decides itself",
        ),
        ({"data": FOLDER, "clients": {"partition": "natural"}}, "data.client_pattern"),
        ({"data": {"client_pattern": "_(a)"}}, "paths of files"),
        ({"data": {**FOLDER, "client_pattern": "_(a"}}, "no regular expression"),
        ({"data": {**FOLDER, "client_pattern": "_a+"}}, "has no group"),
        ({"data": {**FOLDER, "client_pattern": "(a){99999999999}"}}, "no regular expression"),
        ({"data": {**FOLDER, "client_pattern": "a" * 501}}, "data.client_pattern"),
        ({"data": {**FOLDER, "classes": "path"}}, "data.domains = true"),
        ({"data": {**FOLDER, "classes": "names"}}, "folder, path"),
        ({"shift": {"kinds": ["nois"]}}, 'Did you mean "noise"?'),
        ({"shift": {"kinds": ["noise", "noise"]}}, "names one twice"),
        ({"shift": {"kinds": ["blur"], "severity": 6}}, "at most 5"),
        ({"shift": {"kinds": ["blur"], "fraction": 1.5}}, "at most 1"),
        (
            {
                "shift": {"kinds": ["blur"]},
                "data": {"source": "arrays", "path": "x"},
                "backbone": {"name": "identity"},
            },
            "ready features",
        ),
        ({"shift": {"kinds": ["blur"]}, "data": {"on_bad_file": "skip"}}, "on_bad_file"),
        ({"shift": {"concept_fraction": 0.5}, "data": {"on_bad_file": "skip"}}, "on_bad_file"),
        ({"clients": {"alpha": float("nan")}}, "clients.alpha"),
    ],
)
def test_refused(tables: dict[str, Any], says: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        judged(**tables)
    assert says in caught.value.line()
    assert len(caught.value.problems) == 1


def test_accepted() -> None:
    natural = {"partition": "natural"}
    assert judged(data=DRAWERS, clients=natural).data.client_pattern
    assert judged(data={**DRAWERS, "domains": True, "classes": "path"}, clients=natural)
    assert judged(clients={"partition": "file", "split_file": "a.csv", "num": 3})
    assert judged(clients={"partition": "label_quantity", "alpha": float("inf")})
    assert judged(shift={"kinds": ["noise", "blur"], "fraction": 0.0})
    assert judged(shift={"concept_fraction": 1.0}, data={"source": "arrays", "path": "x"})

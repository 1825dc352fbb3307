"""Texts and pictures are not mixed up, and names start only what they can."""

from __future__ import annotations

from typing import Any

import pytest

from fedtl.errors import ScenarioError
from fedtl.scenario.load import validate

GOOD: dict[str, dict[str, Any]] = {
    "data": {"source": "texts", "path": "t.csv"},
    "backbone": {"name": "hf"},
    "evaluation": {"references": []},
}


def problems(**tables: dict[str, Any]) -> list[str]:
    raw: dict[str, Any] = {"name": "t", "rounds": 2}
    for table in {*GOOD, *tables}:
        raw[table] = {**GOOD.get(table, {}), **tables.get(table, {})}
    try:
        validate(raw, "t", {})
    except ScenarioError as error:
        return [problem.line() for problem in error.problems]
    return []


def test_texts_alone_are_fine() -> None:
    assert problems() == []
    assert problems(head={"initial": "names", "prompt": "about {}"}) == []
    assert problems(head={"initial": "names", "kind": "cosine"}) == []
    assert problems(training={"mixup": 0.2}, augmentation={"noise": 0.1}) == []
    assert problems(data={"source": "datasets", "path": None, "name": "a/b"}) == []


@pytest.mark.parametrize(
    ("tables", "where", "what"),
    [
        ({"backbone": {"name": "efficientnet_lite0"}}, "backbone.name", "does not read"),
        ({"data": {"source": "digits", "path": None}}, "data.source", "reads texts"),
        ({"data": {"path": None}}, "data.path", "needs a file"),
        ({"data": {"source": "datasets", "name": "a/b"}}, "data.path", "needs one place"),
        ({"shift": {"kinds": ["blur"]}}, "shift.kinds", "these data are texts"),
        ({"adaptation": {"input": "match"}}, "adaptation.input", "these data are texts"),
        ({"augmentation": {"views": 2}}, "augmentation.views", "these data are texts"),
        ({"backbone": {"image_size": 64}}, "backbone.image_size", "these data are texts"),
        (
            {"evaluation": {"references": ["from_scratch"]}},
            "evaluation.references",
            "these data are texts",
        ),
        (
            {"transfer": {"mode": "last_blocks"}, "training": {"mixup": 0.2}},
            "training.mixup",
            "which places are tokens",
        ),
        (
            {"transfer": {"mode": "lora"}, "augmentation": {"noise": 0.1}},
            "augmentation.noise",
            "which places are tokens",
        ),
        ({"head": {"initial": "names", "kind": "mlp"}}, "head.kind", "one vector per class"),
        ({"head": {"initial": "names", "prompt": "about"}}, "head.prompt", "no place for a name"),
        (
            {
                "head": {"initial": "names"},
                "backbone": {"name": "efficientnet_lite0"},
                "data": {"source": "digits", "path": None},
            },
            "head.initial",
            "only a trunk that reads texts",
        ),
    ],
)
def test_what_cannot_be(tables: dict[str, Any], where: str, what: str) -> None:
    found = problems(**tables)
    assert any(where in line and what in line for line in found), found

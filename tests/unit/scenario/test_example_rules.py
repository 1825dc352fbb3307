"""Several rows for one example: refused where one row has to be one example."""

from __future__ import annotations

import pytest

from fedtl.scenario.example_rules import EXAMPLE_RULES
from fedtl.scenario.schema import Scenario


def conflicts(**tables: object) -> dict[str, str]:
    scenario = Scenario.model_validate({"name": "x", **tables})
    return {problem.where: problem.line() for rule in EXAMPLE_RULES for problem in rule(scenario)}


VIEWS = {"views": 4}


@pytest.mark.parametrize(
    ("tables", "where"),
    [
        ({"data": {"source": "texts", "path": "a.csv"}}, "augmentation.views"),
        ({"data": {"source": "table", "path": "a.csv"}}, "augmentation.views"),
        ({"privacy": {"mechanism": "example", "epsilon": 1.0}}, "privacy.mechanism"),
        ({"privacy": {"mechanism": "release", "epsilon": 1.0}}, "privacy.mechanism"),
        (
            {"privacy": {"mechanism": "central", "epsilon": 1.0, "canaries": 5}},
            "privacy.canaries",
        ),
        ({"privacy": {"min_class_examples": 3}}, "privacy.min_class_examples"),
        ({"training": {"validation_fraction": 0.2}}, "training.validation_fraction"),
    ],
)
def test_views_are_refused_with_the_reason(tables: dict[str, object], where: str) -> None:
    assert set(conflicts(augmentation=VIEWS, **tables)) == {where}
    assert not conflicts(augmentation={"views": 1, "noise": 0.1}, **tables)


def test_few_shots_are_no_protected_examples() -> None:
    for mechanism, unit, refused in (
        ("example", "client", True), ("release", "example", True), ("release", "client", False),
        ("central", "client", False),
    ):  # fmt: skip
        privacy = {"mechanism": mechanism, "unit": unit, "epsilon": 1.0}
        assert ("data.shots" in conflicts(data={"shots": 5}, privacy=privacy)) is refused
    assert not conflicts(data={"shots": 5})


def test_views_without_a_kind_are_refused() -> None:
    assert "augmentation.kinds" in conflicts(augmentation={"views": 2, "kinds": []})


def test_a_clients_update_may_come_from_views() -> None:
    assert not conflicts(
        augmentation=VIEWS, privacy={"mechanism": "central", "epsilon": 1.0, "noise": "independent"}
    )


def test_only_pretrained_networks_on_images_have_a_source_task() -> None:
    source = {"source_path": "a.npz"}
    assert set(conflicts(evaluation=source, transfer={"mode": "scratch"})) == {
        "evaluation.source_path"
    }
    assert conflicts(evaluation=source, data={"source": "table", "path": "a.csv"})
    assert not conflicts(evaluation=source, transfer={"mode": "full"})

"""How verdicts are held against test examples that had no part in them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fedtl.build import open_data, population_of
from fedtl.ready_features import make_features
from fedtl.types import Population

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

SCENARIO = """name = "small"
seed = 1
rounds = 2
[data]
source = "arrays"
path = "small.npz"
test_fraction = 0.4
[clients]
num = 12
partition = "dirichlet"
alpha = 0.8
[backbone]
name = "identity"
[evaluation]
references = ["local_only", "fine_tuned"]
"""


def benchmark(name: str) -> ModuleType:
    """A module of ``benchmarks/``, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


studies = benchmark("studies")


@pytest.fixture
def study(tmp_path: Path) -> Any:
    generator = np.random.default_rng(0)
    y = generator.integers(0, 3, 600)
    x = generator.standard_normal((600, 8)).astype(np.float32)
    x[:, :3] += 2.0 * np.eye(3, dtype=np.float32)[y]
    np.savez(tmp_path / "small.npz", x=x, y=y)
    (tmp_path / "small.toml").write_text(SCENARIO)
    return studies.Study("small", str(tmp_path / "small.toml"))


def people_of(study: Any) -> Population:
    return population_of(make_features(open_data(study.load(1))))


def test_halves_are_even_in_every_class_of_every_client(study: Any) -> None:
    people = people_of(study)
    first, second = studies.halves(people, 1)
    assert np.array_equal(first, ~second)
    start = 0
    for client in range(people.num_clients):
        labels = people.labels[people.test.of(client)]
        here = first[start : start + len(labels)]
        for label in range(3):
            mine = here[labels == label]
            assert abs(2 * mine.sum() - len(mine)) <= 1
        start += len(labels)
    other, _ = studies.halves(people, 2)
    assert not np.array_equal(first, other)


def test_a_half_has_everybodys_training_and_its_own_tests(study: Any, tmp_path: Path) -> None:
    people = people_of(study)
    half, _ = studies.halves(people, 1)
    studies.write_half(people, half, tmp_path / "half.npz")
    chosen = studies.judged_on(study.load(1), tmp_path / "half.npz")
    written = population_of(make_features(open_data(chosen)))
    assert [name[5:] for name in written.names] == list(people.names)
    assert written.classes == people.classes
    for client in range(people.num_clients):
        mine, theirs = people.train.of(client), written.train.of(client)
        assert np.array_equal(written.features[theirs], people.features[mine])
        assert np.array_equal(written.labels[theirs], people.labels[mine])
    assert written.test.counts.sum() == half.sum()


def test_each_half_is_held_against_the_other(study: Any, tmp_path: Path) -> None:
    cases = studies.check(study, 1, tmp_path)  # raises if the two trainings were not the same
    people = people_of(study)
    assert {case["client"][5:] for case in cases} <= set(people.names)
    by_client: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        by_client.setdefault(case["client"], []).append(case)
    for pair in by_client.values():
        assert len(pair) == 2
        assert pair[0]["said"] == pair[1]["held"]
        assert pair[0]["held"] == pair[1]["said"]
    judged = sum(pair[0]["said"]["examples"] + pair[0]["held"]["examples"]
                 for pair in by_client.values())  # fmt: skip
    assert judged <= people.test.counts.sum()
    assert all(case["said"]["verdict"] in ("gains", "harmed", "no evidence") for case in cases)


def case(verdict: str, advice: str, federated: float, alone: float, tuned: float, held: str) -> Any:
    home = {"federated": federated, "local_only": alone, "fine_tuned": tuned}
    everywhere = {head: value / 2 for head, value in home.items()}
    truth = {"home": home, "everywhere": everywhere, "verdict": held}
    return {"said": {"verdict": verdict, "advice": advice}, "held": truth}


@pytest.mark.parametrize(
    ("verdict", "federated", "alone", "held", "fate"),
    [
        ("gains", 0.9, 0.8, "no evidence", "right"),
        ("gains", 0.8, 0.9, "no evidence", "wrong"),
        ("gains", 0.8, 0.8, "no evidence", "equal"),
        ("harmed", 0.8, 0.9, "harmed", "right"),
        ("harmed", 0.9, 0.8, "gains", "wrong"),
        ("no evidence", 0.9, 0.8, "gains", "missed"),
        ("no evidence", 0.9, 0.8, "no evidence", "quiet"),
    ],
)
def test_what_becomes_of_a_verdict(
    verdict: str, federated: float, alone: float, held: str, fate: str
) -> None:
    assert studies.fate(case(verdict, "join", federated, alone, 0.5, held)) == fate


def test_what_following_the_advice_is_worth() -> None:
    cases = [
        case("gains", "join", 0.9, 0.5, 0.8, "gains"),
        case("harmed", "personalise", 0.4, 0.6, 0.7, "harmed"),
        case("harmed", "stay alone", 0.4, 0.8, 0.7, "harmed"),
        case("no evidence", "not enough evidence", 0.7, 0.6, 0.5, "no evidence"),
    ]
    for choose, expected in (
        ("advice", (0.9 + 0.7 + 0.8 + 0.6) / 4),
        ("federated", (0.9 + 0.4 + 0.4 + 0.7) / 4),
        ("best", (0.9 + 0.7 + 0.8 + 0.7) / 4),
    ):
        assert studies.worth(cases, choose, "home") == pytest.approx(expected)
        assert studies.worth(cases, choose, "everywhere") == pytest.approx(expected / 2)

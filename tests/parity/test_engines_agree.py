"""One scenario, one answer: every engine, worker count and block size ends with the same bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedtl.interrupts import Interrupts
from fedtl.parity import COMPARED, Quiet, certify, ways
from fedtl.run import run_scenario
from fedtl.scenario.load import validate

BASE: dict[str, Any] = {
    "name": "parity",
    "seed": 5,
    "rounds": 3,
    "data": {"source": "arrays", "path": "people.npz"},
    "clients": {"partition": "natural"},
    "backbone": {"name": "identity"},
    "training": {"local_epochs": 2, "batch_size": 8, "learning_rate": 0.1},
    "evaluation": {"references": []},
}

SCENARIOS: dict[str, dict[str, Any]] = {
    "sampled clients": {"clients": {"partition": "natural", "fraction": 0.4}, "rounds": 4},
    "ragged sizes in one batch": {"training": {"local_epochs": 3, "batch_size": 500}},
    "momentum, decay and a schedule": {
        "training": {
            "local_epochs": 2, "batch_size": 4, "momentum": 0.9, "weight_decay": 1e-3,
            "schedule": "cosine",
        },
    },
    "an adaptive server": {"strategy": {"name": "fedadam"}},
    "a proximal term": {"strategy": {"name": "fedprox", "mu": 0.5}},
    "an MLP head": {"head": {"kind": "mlp", "hidden": [6]}},
    "half-width features": {"backbone": {"name": "identity", "feature_dtype": "float16"}},
    "clients that fail": {
        "participation": {"absent": [{"round": 2, "clients": ["3", "7", "8"]}]},
        "validation": {"max_norm_ratio": 1.2},  # the longest updates of a round are refused
    },
    "more clients asked than needed": {
        "clients": {"partition": "natural", "fraction": 0.3},
        "participation": {"over_selection": 1.5, "quorum": 2},
    },
}  # fmt: skip

ENGINES: dict[str, dict[str, Any]] = {
    "local in blocks of 7": {"kind": "local", "threads": 2, "block_size": 7},
    "local in one block": {"kind": "local", "threads": 1, "block_size": 1000},
    "ray, one worker": {"kind": "ray", "num_cpus": 1, "block_size": 1},
    "ray, two workers": {"kind": "ray", "num_cpus": 2},
    "ray, two workers, blocks of 7": {"kind": "ray", "num_cpus": 2, "block_size": 7},
    "flower, one node": {"kind": "flower", "num_cpus": 1, "num_nodes": 1, "block_size": 1000},
    "flower, three nodes": {"kind": "flower", "num_cpus": 2, "num_nodes": 3, "block_size": 1},
}


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve natural clients of very different sizes, four classes."""
    place = tmp_path_factory.mktemp("people")
    rng = np.random.default_rng(0)
    sizes = [2, 3, 90, 11, 40, 7, 130, 25, 5, 60, 17, 33]
    client = np.repeat(np.arange(len(sizes)), sizes)
    y = rng.integers(0, 4, len(client))
    x = rng.normal(size=(len(client), 13)).astype(np.float32)
    x[np.arange(len(client)), y] += 1.5
    np.savez(place / "people.npz", x=x, y=y, client=client)
    return place / "people.npz"


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One Ray for all runs of this file; starting one takes seconds."""
    from fedtl.engines import ray_cluster

    cluster = ray_cluster.join(num_cpus=4)
    yield
    cluster.leave()


def run(people: Path, place: Path, changes: dict[str, Any], engine: dict[str, Any]) -> Any:
    data = {"source": "arrays", "path": str(people)}
    scenario = validate({**BASE, "data": data, **changes, "engine": engine}, "parity", {})
    return run_scenario(scenario, place, Quiet(lambda note: None), Interrupts())


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_all_engines_give_the_same_bits(name: str, people: Path, tmp_path: Path) -> None:
    changes = SCENARIOS[name]
    plain = run(
        people, tmp_path / "plain", changes, {"kind": "local", "threads": 1, "block_size": 1}
    )
    tables = [tmp_path / "plain"]
    for engine, section in ENGINES.items():
        place = tmp_path / engine.replace(" ", "-")
        other = run(people, place, changes, section)
        tables.append(place)
        assert {key: other[key] for key in COMPARED} == {key: plain[key] for key in COMPARED}, (
            engine
        )
        assert other["final"] == plain["final"], engine
        assert other["scenario_hash"] == plain["scenario_hash"]
    kept = pd.read_parquet(tables[0] / "clients.parquet")
    for place in tables[1:]:  # every loss and norm of every client, and who was refused and why
        pd.testing.assert_frame_equal(
            kept, pd.read_parquet(place / "clients.parquet"), check_exact=True
        )


def test_the_scenarios_do_what_their_names_say(people: Path, tmp_path: Path) -> None:
    engine = {"kind": "local", "threads": 1}
    run(people, tmp_path / "fail", SCENARIOS["clients that fail"], engine)
    rows = pd.read_parquet(tmp_path / "fail" / "clients.parquet").query("split == 'train'")
    assert rows["status"].str.contains("absent").sum() == 3
    assert rows["status"].str.contains("times the cohort's median").any()
    assert (rows["status"] == "ok").any()
    summary = run(people, tmp_path / "more", SCENARIOS["more clients asked than needed"], engine)
    rounds = pd.read_parquet(tmp_path / "more" / "rounds.parquet")
    assert set(rounds["cohort"]) == {6}
    assert set(rounds["accepted"]) == {4}
    assert summary["rounds_completed"] == 3


def test_the_certificate(people: Path) -> None:
    data = {"source": "arrays", "path": str(people)}
    scenario = validate({**BASE, "data": data}, "parity", {})
    told: list[str] = []
    done: list[str] = []
    certificate = certify(
        scenario,
        Quiet(told.append),
        Interrupts(),
        ways(scenario),
        lambda attempt: done.append(attempt.engine),
    )
    facts = certificate.as_facts()
    assert certificate.equal
    assert facts["equal"] is True
    assert {name.split(",")[0] for name in done} == {"local", "ray", "flower"}
    assert len({one["head_sha256"] for one in facts["engines"]}) == 1
    assert os.cpu_count() == 1 or any("2 workers" in name for name in done)

"""The gaps between real clients are the simulation's, and clients are asked for sums only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.build import open_data, population_of
from fedtl.deployment.gaps import (
    DEADLINE_SECONDS,
    asking_for_statistics,
    collect_statistics,
    gap_facts,
)
from fedtl.engines.flower_engine import FlowerEngine
from fedtl.errors import PolicyStop, SecurityRefusal
from fedtl.evaluation.client_sums import ClientSums
from fedtl.evaluation.gaps import from_statistics
from fedtl.plans import RoundPlan
from fedtl.ready_features import make_features
from fedtl.types import LocalTraining

NAMES = ("east", "north", "west")


@pytest.fixture
def gathered(make_site: Callable[..., Any], tmp_path: Path) -> tuple[Any, FlowerEngine]:
    """Three clients with data of their own; the server's scenario would train an MLP."""
    rng = np.random.default_rng(1)
    whose = np.array(NAMES)[rng.integers(0, 3, 150)]
    y = rng.integers(0, 3, 150)
    x = rng.normal(size=(150, 5)).astype(np.float32)
    x[np.arange(150), y] += 1.5
    x[whose == "west", 4] += 3
    np.savez(tmp_path / "all.npz", x=x, y=y, client=whose)
    site = make_site(
        data={"source": "arrays", "path": str(tmp_path / "all.npz"), "domains": False},
        clients={"partition": "natural", "fraction": 0.5},
        backbone={"name": "identity", "weights": "default", "image_size": None},
        head={"kind": "mlp"},
        strategy={"name": "ditto"},
    )
    for name in NAMES:
        np.savez(tmp_path / f"{name}.npz", x=x[whose == name], y=y[whose == name])
        site.add(name, tmp_path / f"{name}.npz")
    gathering = site.gathering(scenario=asking_for_statistics(site.scenario))
    found = gathering.gather()
    engine = FlowerEngine(
        site.exchange, found.roster, gathering.seat, found.seats, DEADLINE_SECONDS, real=True
    )
    return site, engine


def facts_of(site: Any, engine: FlowerEngine) -> dict[str, Any]:
    backbone = open_data(site.scenario).backbone
    collected = collect_statistics(engine, engine.roster, site.scenario)
    return gap_facts(site.scenario, backbone, engine.roster, collected)


@pytest.mark.parametrize("held_bytes", [2**28, 1], ids=["together", "one by one"])
def test_the_same_figures_as_in_simulation(
    gathered: tuple[Any, FlowerEngine], held_bytes: int
) -> None:
    site, engine = gathered
    facts = facts_of(site, replace(engine, held_bytes=held_bytes))
    people = population_of(make_features(open_data(site.scenario)))
    assert people.names == NAMES
    simulated = from_statistics(
        ClientSums(people, 1, lambda: None), people.names, people.domains, people.classes
    )
    for key in ("clients", "classes", "examples", "counts", "kinds", "pairs", "rest",
                "transferability"):  # fmt: skip
        assert facts[key] == simulated[key], key
    assert facts["pairs"]["coral"][0][2] > 0
    assert facts["rest"]["frechet"][2] > facts["rest"]["frechet"][0], "west is the odd one"
    for name in ("a_distance", "mmd2", "mmd_p"):
        assert facts["rest"][name] == [None] * 3, "these need rows side by side"
        assert "stay where they are" in facts["kinds"][name]["note"]
    assert facts["scenario_hash"] == site.scenario.hash()
    assert any("nothing was trained" in note for note in facts["notes"])


def test_clients_are_told_of_sums_and_do_nothing_else(gathered: tuple[Any, FlowerEngine]) -> None:
    site, engine = gathered
    facts_of(site, engine)
    for name, host in site.hosts.items():
        assert sum("in a round, what leaves is" in line for line in site.told[name]) == 1
        assert any("sums of your features" in line for line in site.told[name])
        one = np.zeros(1, np.int64)
        plan = RoundPlan(1, one, one.astype(np.uint64), LocalTraining(1, 8, 0.1))
        with pytest.raises(SecurityRefusal, match="asks for train"):
            host.consent(plan)


def test_who_does_not_answer_is_missing_and_named(gathered: tuple[Any, FlowerEngine]) -> None:
    site, engine = gathered
    (node,) = (node for node, name in site.names.items() if name == "north")
    site.nodes[node].silent = True
    facts = facts_of(site, engine)
    assert facts["clients"] == ["east", "west"]
    assert any(note.startswith("north is missing: ") for note in facts["notes"])
    for recorder in site.nodes.values():
        recorder.silent = True
    with pytest.raises(PolicyStop, match="no client's statistics came"):
        facts_of(site, engine)


def test_a_lone_example_is_told(gathered: tuple[Any, FlowerEngine]) -> None:
    site, engine = gathered
    collected = collect_statistics(engine, engine.roster, site.scenario)
    collected.sums[1]["counts"][0] = 1  # type: ignore[index]
    facts = gap_facts(site.scenario, open_data(site.scenario).backbone, engine.roster, collected)
    assert any("once a client has one example" in note for note in facts["notes"])


def test_without_a_federation_there_is_nobody_to_ask(
    fedtl: Callable[..., Any], small: Path
) -> None:
    done = fedtl("server", "gap", str(small))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "federation" in done.stderr

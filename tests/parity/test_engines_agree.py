"""One scenario, one answer: every engine, worker count and block size ends with the same bits."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedtl.build import Built, make_federation, open_data
from fedtl.clients.personal_store import PersonalStore
from fedtl.conduct import head_hash
from fedtl.engines import Engine
from fedtl.evaluation.personalised import judge_personalised
from fedtl.evaluation.references import Judge, everyone_rows
from fedtl.interrupts import Interrupts
from fedtl.parity import COMPARED, Quiet, certify, ways
from fedtl.planning import local_training
from fedtl.results.runs import RunFolder
from fedtl.rounds import run_rounds
from fedtl.scenario.load import validate
from fedtl.scenario.schema import Scenario
from fedtl.simulation import run_scenario
from fedtl.strategies.base import ServerState, personal_of

pytestmark = [  # Ray leaves sockets and its own dead children to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

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
    "clients that fail": {
        "participation": {"absent": [{"round": 2, "clients": ["3", "7", "8"]}]},
        "validation": {"max_norm_ratio": 1.2},  # the longest updates of a round are refused
    },
    "more clients asked than needed": {
        "clients": {"partition": "natural", "fraction": 0.3},
        "participation": {"over_selection": 1.5, "quorum": 2},
    },
}  # fmt: skip

HALF = {"partition": "natural", "fraction": 0.5}

OWN_LAYERS = "layers of the clients' own"

TRAVELLING: dict[str, dict[str, Any]] = {
    "corrections": {"clients": HALF, "strategy": {"name": "scaffold"}},
    "corrections and a proximal term": {"clients": HALF, "strategy": {"name": "feddyn"}},
    "gradients": {
        "training": {"weight_decay": 1e-3, "batch_size": 8},
        "strategy": {"name": "lbfgs"},
        "rounds": 5,
    },
    "statistics in waves": {
        "clients": HALF,
        "strategy": {"name": "fed3r", "random_features": 16, "scale": 0.2},
        "rounds": 4,
    },
    "gradients beside heads": {"strategy": {"name": "mime"}},
    "losses beside heads": {"strategy": {"name": "qfedavg"}},
    "heads of the clients' own": {"clients": HALF, "strategy": {"name": "ditto"}},
    OWN_LAYERS: {
        "clients": HALF,
        "strategy": {"name": "fedrep", "head_epochs": 1},
        "head": {"kind": "mlp", "hidden": [6]},
    },
    "packed updates": {
        "clients": HALF, "compression": {"kind": "top_k", "fraction": 0.1}, "rounds": 4,
    },
    "statistics first, then updates": {
        "strategy": {"name": "fedavgm"},
        "head": {"kind": "prototype", "initial": "class_means"},
    },
    "a strategy of Flower's": {
        "strategy": {
            "name": "flower", "class": "FedAdam", "parameters": {"fraction_train": 0.5},
        },
    },
    "noise at the clients, then packed": {
        "privacy": {"mechanism": "local", "noise_multiplier": 0.5, "delta": 1e-2},
        "strategy": {"name": "fedavg", "weighting": "uniform"}, "clients": HALF,
        "compression": {"kind": "top_k", "fraction": 0.3}, "rounds": 2,
    },
    "noise in a secure sum, by coins": {
        "privacy": {
            "mechanism": "central", "noise_multiplier": 0.5, "delta": 1e-2,
            "secure_aggregation": "arithmetic",
        },
        "strategy": {"name": "fedavg", "weighting": "uniform"},
        "clients": {"partition": "natural", "fraction": 0.2}, "rounds": 4,
    },
    "some too large for the ring": {
        "privacy": {"secure_aggregation": "arithmetic", "value_range": 0.3, "threshold": 0.2},
        "rounds": 2,
    },
    "statistics in a secure sum": {
        "privacy": {"secure_aggregation": "arithmetic"},
        "strategy": {"name": "fed3r", "keep_statistics": False}, "rounds": 2,
    },
    "noise in every step": {
        "privacy": {"mechanism": "example", "noise_multiplier": 1.0, "delta": 1e-2},
        "clients": HALF, "rounds": 2,
    },
    "statistics released once": {
        "privacy": {"mechanism": "release", "noise_multiplier": 1.0, "delta": 1e-2},
        "strategy": {"name": "fed3r"}, "rounds": 1,
    },
}  # fmt: skip
"""Every kind of thing that is sent or kept besides heads."""

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


def scenario_of(people: Path, changes: dict[str, Any], engine: dict[str, Any]) -> Scenario:
    data = {"source": "arrays", "path": str(people)}
    return validate({**BASE, "data": data, **changes, "engine": engine}, "parity", {})


def run(people: Path, place: Path, changes: dict[str, Any], engine: dict[str, Any]) -> Any:
    scenario = scenario_of(people, changes, engine)
    return run_scenario(scenario, place, Quiet(lambda note: None), Interrupts())


def rounds(built: Built, place: Path, store: PersonalStore) -> tuple[dict[str, Any], pd.DataFrame]:
    """The loop alone: what a run's summary would compare, and every client's rows."""
    federation = built.federation
    folder = RunFolder.create(place, "")
    try:
        state, done = run_rounds(federation, folder, lambda row, updates: None, Interrupts())
        folder.write_tables()
    finally:
        folder.release()
    return {
        "personal": judged(built, state, done.round, store),
        "head_sha256": head_hash(state.result),
        "cohorts_blake2b": done.cohorts,
        "batches_blake2b": done.batches,
        "bytes_up": done.bytes_up,
        "bytes_down": done.bytes_down,
    }, in_rounds(place)


def in_rounds(place: Path) -> pd.DataFrame:
    """What the rounds wrote of every client, without what is added after the last one."""
    return pd.read_parquet(place / "clients.parquet").loc[:, "round":"status"]


def judged(built: Built, state: ServerState, rounds: int, store: PersonalStore) -> Any:
    """What the clients' own heads are worth, as the summary has it."""
    scenario, people = built.federation.scenario, built.population
    personal = personal_of(built.federation.strategy, state)
    if personal is None:
        return None
    everybody = np.arange(people.num_clients)
    judge = Judge(people, everybody, everyone_rows(people, everybody, 10_000, 0), 1, "cpu")
    training = local_training(scenario, 1)
    return judge_personalised(
        judge, state.result, personal, training, rounds, scenario.seed, store
    ).facts


@pytest.fixture(scope="module")
def simplest(people: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every scenario, client by client on one thread."""
    engine = {"kind": "local", "threads": 1, "block_size": 1}
    found = {}
    for name, changes in {**SCENARIOS, **TRAVELLING}.items():
        place = tmp_path_factory.mktemp("simplest")
        summary = run(people, place, changes, engine)
        rows = in_rounds(place).query("split != 'everyone'")
        found[name] = (
            {key: summary[key] for key in (*COMPARED, "personal")},
            rows.reset_index(drop=True),
        )
    return found


def test_the_certificate(people: Path) -> None:
    changes = {"backbone": {"name": "identity", "feature_dtype": "float16"}, "rounds": 2}
    scenario = scenario_of(people, changes, {"kind": "local"})
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
    assert [one["not_run"] for one in facts["engines"]] == [None] * len(done)
    assert certificate.equal
    assert facts["equal"] is True
    assert {name.split(",")[0] for name in done} == {"local", "ray", "flower"}
    assert len({one["head_sha256"] for one in facts["engines"]}) == 1
    assert os.cpu_count() == 1 or any("2 workers" in name for name in done)


@pytest.fixture(scope="module", params=list(ENGINES))
def engine(
    request: Any, people: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, PersonalStore]]:
    """One engine for all scenarios, as their clients are the same: starting one takes seconds."""
    store = PersonalStore(tmp_path_factory.mktemp("own") / "own")
    opened = open_data(scenario_of(people, {}, ENGINES[request.param]))
    built = make_federation(opened, store=store)
    made = built.federation.engine
    try:
        made.start(built.federation.head)
        yield made, store
    finally:
        made.close()


@pytest.mark.parametrize("name", [*SCENARIOS, *TRAVELLING])
def test_all_engines_give_the_same_bits(
    name: str,
    engine: tuple[Engine, PersonalStore],
    simplest: dict[str, Any],
    people: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, store = engine
    monkeypatch.setattr(
        "fedtl.round_training.WAVE_BYTES", 2**13
    )  # four clients with 16 random features
    shutil.rmtree(store.folder, ignore_errors=True)  # what another scenario's clients kept
    scenario = {**SCENARIOS, **TRAVELLING}[name]
    built = make_federation(open_data(scenario_of(people, scenario, {"kind": "local"})))
    federation = replace(built.federation, engine=made)
    facts, rows = rounds(replace(built, federation=federation), tmp_path / "run", store)
    wanted, kept = simplest[name]
    assert facts == wanted
    # every loss and norm of every client, and who was refused and why
    # where layers stay at the clients there is nothing to judge until the rounds are over
    splits = {"train"} if name == OWN_LAYERS else {"train", "test"}
    assert set(rows["split"]) == splits
    kept = kept[kept["split"].isin(splits)].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, rows, check_exact=True)


def test_the_scenarios_do_what_their_names_say(people: Path, tmp_path: Path) -> None:
    engine = {"kind": "local", "threads": 1}
    run(people, tmp_path / "fail", SCENARIOS["clients that fail"], engine)
    rows = pd.read_parquet(tmp_path / "fail" / "clients.parquet").query("split == 'train'")
    assert rows["status"].str.contains("absent").sum() == 3
    assert rows["status"].str.contains("times the cohort's median").any()
    assert (rows["status"] == "ok").any()
    summary = run(people, tmp_path / "more", SCENARIOS["more clients asked than needed"], engine)
    table = pd.read_parquet(tmp_path / "more" / "rounds.parquet")
    assert set(table["cohort"]) == {6}
    assert set(table["accepted"]) == {4}
    assert summary["rounds_completed"] == 3


def test_what_travels_does_what_its_names_say(simplest: dict[str, Any]) -> None:
    facts = {name: simplest[name][0] for name in TRAVELLING}
    own = {name for name, found in facts.items() if found["personal"] is not None}
    assert own == {"heads of the clients' own", OWN_LAYERS}
    head = 4 * (13 * 4 + 4)  # bytes
    assert facts["packed updates"]["bytes_up"] == 4 * 6 * 8 * 6  # of 56 entries, with their places
    assert facts["gradients"]["bytes_up"] == 5 * 12 * 2 * head  # in float64
    assert facts["gradients beside heads"]["bytes_up"] == 3 * 12 * 2 * head
    for name in ("corrections", "corrections and a proximal term"):
        assert facts[name]["bytes_down"] == 3 * 6 * 2 * head
    reported = simplest["statistics in waves"][1].query("split == 'train'")
    assert reported.groupby("round").size().max() > 4, "more than a wave"
    assert reported["client"].is_unique

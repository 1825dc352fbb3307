"""Federations whose truth is known get the verdict that is true, and the tables that say why."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedtl import run as start_run

SCENARIO = """name = "known"
seed = 3
rounds = 6
[data]
source = "arrays"
path = "known.npz"
test_fraction = 0.5
[clients]
partition = "natural"
[backbone]
name = "identity"
[training]
local_epochs = 2
learning_rate = 0.1
weight_decay = 1e-3
[evaluation]
references = ["local_only", "fine_tuned", "best_client"]
"""


def write(
    folder: Path, examples: list[int], *, strange: tuple[int, ...] = (), far: float = 2.5
) -> None:
    """Clients with four classes that a linear head can mostly tell apart; strange ones have their
    labels turned by one."""
    rng = np.random.default_rng(5)
    client = np.repeat(np.arange(len(examples)), examples)
    y = rng.integers(0, 4, len(client))
    x = rng.normal(size=(len(client), 8)).astype(np.float32)
    x[np.arange(len(client)), y] += far
    y = np.where(np.isin(client, strange), (y + 1) % 4, y)
    np.savez(folder / "known.npz", x=x, y=y, client=np.array([f"c{i}" for i in client]))
    (folder / "known.toml").write_text(SCENARIO)


def run(fedtl, folder: Path, *arguments: str):
    done = fedtl("run", "known.toml", "--json", "--out", "out", *arguments)
    assert done.returncode == 0, done.stderr
    frame = pd.read_parquet(folder / "out" / "clients.parquet")
    last = frame[frame["round"] == frame["round"].max()]
    own = last[last["split"] == "test"].set_index("name")
    everyone = last[last["split"] == "everyone"].set_index("name")
    return json.loads(done.stdout), own, everyone


def test_another_concept_is_harmed_and_stays_alone(fedtl, tmp_path: Path) -> None:
    write(tmp_path, [200] * 6, strange=(2,))
    found, own, _ = run(fedtl, tmp_path, "--set", "evaluation.fine_tune_epochs=1",
                        "--set", "training.learning_rate=0.02")  # fmt: skip
    assert own["verdict"]["c2"] == "harmed"
    assert own["advice"]["c2"] == "stay alone"
    assert own["advice"].drop("c2").isin(["join", "not enough evidence"]).all()
    assert found["verdict"]["effects"]["harmed"] == 1
    assert found["verdict"]["advice"]["stay alone"] == 1
    assert own["accuracy"]["c2"] < 0.3 < 0.8 < own["local_only_accuracy"]["c2"]


def test_where_tuning_wins_the_concept_back_it_personalises(fedtl, tmp_path: Path) -> None:
    write(tmp_path, [200] * 6, strange=(0, 1, 2))
    _, own, _ = run(fedtl, tmp_path, "--set", "evaluation.fine_tune_epochs=40")
    harmed = own[own["verdict"] == "harmed"]
    assert len(harmed) > 0
    assert set(harmed["advice"]) <= {"personalise", "stay alone"}
    assert (own["fine_tuned_accuracy"] > own["accuracy"]).all()


def test_with_enough_of_the_same_data_there_is_no_evidence(fedtl, tmp_path: Path) -> None:
    write(tmp_path, [400] * 5)
    found, own, _ = run(fedtl, tmp_path)
    assert set(own["verdict"]) == {"no evidence"}
    assert set(own["advice"]) == {"not enough evidence"}
    assert (
        found["verdict"]["headline"] == "Not enough evidence that federating changes anything here."
    )


def test_tiny_clients_cannot_know(fedtl, tmp_path: Path) -> None:
    write(tmp_path, [6] * 5, far=1.0)
    _, own, _ = run(fedtl, tmp_path)
    assert set(own["verdict"]) == {"no evidence"}
    assert set(own["advice"]) == {"not enough evidence"}
    assert own["p_holm"].min() > 0.05


def test_small_clients_join_where_they_gain_and_lose_nothing(fedtl, tmp_path: Path) -> None:
    write(tmp_path, [16] * 30, far=1.6)
    _, own, everyone = run(fedtl, tmp_path)
    joins = own["advice"] == "join"
    measured = own["accuracy"] - own["local_only_accuracy"]
    assert joins.sum() > 15
    assert measured[joins].min() > -0.0101  # who measured a loss is not told to join for it
    assert not joins[measured < -0.0101].any()
    assert not (own["advice"] == "stay alone").any()
    assert (everyone["beats_local_only"] > everyone["loses_to_local_only"]).mean() > 0.9


def test_the_tables_agree_with_each_other(fedtl, tmp_path: Path) -> None:
    write(tmp_path, [60, 20, 90], strange=(2,))
    found, own, everyone = run(fedtl, tmp_path)
    for head, before in (("accuracy", ""), ("fine_tuned_accuracy", "fine_tuned_")):
        for frame in (own, everyone):
            more = frame[f"{before}beats_local_only"] - frame[f"{before}loses_to_local_only"]
            np.testing.assert_allclose(
                more / frame["examples"], frame[head] - frame["local_only_accuracy"], atol=1e-12
            )
    tuned, best = found["references"]["fine_tuned"], found["references"]["best_client"]
    lost = found["final"]["accuracy_everyone"] - tuned["accuracy_everyone"]
    assert tuned["forgetting"] == pytest.approx(lost)
    assert best["client"] in set(own.index)
    assert everyone["best_client_accuracy"].nunique() == 1
    assert found["fairness"].keys() == {"federated", "local_only"}
    assert own["verdict"].notna().all()
    assert everyone["verdict"].isna().all()


def test_only_some_clients_are_compared_and_the_others_are_undefined(fedtl, tmp_path: Path) -> None:
    write(tmp_path, [40] * 6)
    found, own, _ = run(fedtl, tmp_path, "--set", "evaluation.reference_clients=2")
    for column in ("verdict", "p_value", "beats_local_only", "calibration_error"):
        assert own[column].notna().sum() == 2
    assert sum(found["verdict"]["advice"].values()) == 2
    classes = pd.read_parquet(tmp_path / "out" / "classes.parquet")
    assert classes.groupby("client")["local_only_correct"].count().gt(0).sum() == 2
    assert classes["train"].notna().all()


def test_without_own_heads_there_is_no_verdict(fedtl, tmp_path: Path) -> None:
    write(tmp_path, [40] * 3)
    found, own, _ = run(fedtl, tmp_path, "--set", 'evaluation.references=["fine_tuned"]')
    assert found["verdict"]["advice"] is None
    assert own["verdict"].isna().all()
    assert own["fine_tuned_accuracy"].notna().all()
    assert own["beats_local_only"].isna().all()


@pytest.mark.parametrize(
    ("strategy", "told"),
    [("fed3r", False), ("fedbabu", True), ("ditto", False), ("knnper", False)],
)
def test_every_kind_of_head_is_compared(fedtl, tmp_path: Path, strategy: str, told: bool) -> None:
    write(tmp_path, [40] * 4)
    done = fedtl("run", "known.toml", "--out", "out", "--set", f"strategy.name={strategy}")
    assert done.returncode == 0, done.stderr
    assert ("fine_tuned is left out" in done.stdout) == told
    frame = pd.read_parquet(tmp_path / "out" / "clients.parquet")
    own = frame[(frame["split"] == "test") & frame["verdict"].notna()]
    assert len(own) == 4
    mine = own["personal_beats_local_only"].notna()
    assert mine.all() == (strategy != "fed3r")
    if mine.all():
        more = own["personal_beats_local_only"] - own["personal_loses_to_local_only"]
        wanted = own["personal_accuracy"] - own["local_only_accuracy"]
        np.testing.assert_allclose(more / own["examples"], wanted, atol=1e-12)


def test_a_start_of_secretly_summed_class_means_is_judged(tmp_path: Path) -> None:
    write(tmp_path, [60, 20, 90])
    done = start_run(
        tmp_path / "known.toml",
        out=tmp_path / "out",
        head={"kind": "prototype", "initial": "class_means"},
        privacy={"secure_aggregation": "arithmetic"},
        training={"learning_rate": 1.0},
        evaluation={"references": ["start"]},
    )
    found = json.loads((done.path / "summary.json").read_text())
    rounds = pd.read_parquet(done.path / "rounds.parquet")
    start = found["references"]["start"]
    assert start["accuracy"] == pytest.approx(rounds["accuracy"][0]) != found["final"]["accuracy"]
    assert start["accuracy"] > 0.8


def test_the_bootstrap_is_seeded_and_gives_the_same_words(fedtl, tmp_path: Path) -> None:
    write(tmp_path, [100] * 4, strange=(2,))
    found, own, _ = run(fedtl, tmp_path, "--set", 'verdict.test="bootstrap"')
    (tmp_path / "out").rename(tmp_path / "first")
    again, same, _ = run(fedtl, tmp_path, "--set", 'verdict.test="bootstrap"',
                         "--set", "engine.threads=1")  # fmt: skip
    assert again["verdict"] == found["verdict"]
    assert same["p_value"].tolist() == own["p_value"].tolist()
    (tmp_path / "out").rename(tmp_path / "second")
    exact, _, _ = run(fedtl, tmp_path)
    assert exact["verdict"]["effects"] == found["verdict"]["effects"]

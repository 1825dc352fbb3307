"""The README's first command, as a user runs it: real data, real weights, no network."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from safetensors import safe_open

SUMMARY_KEYS = {
    "scenario_hash", "engine", "seed", "rounds_completed", "num_clients", "head_sha256", "final",
    "references", "bytes_up", "bytes_down", "epsilon", "seconds", "client_rounds_per_second",
    "peak_rss_mib", "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def summary(place: Path) -> dict:
    from fedtl.cli import run_command

    assert run_command(["run", "quickstart", "--out", str(place / "run")]) == 0
    return json.loads((place / "run" / "summary.json").read_text())


def test_the_summary_has_what_others_rely_on(summary: dict) -> None:
    assert set(summary) >= SUMMARY_KEYS
    assert set(summary["final"]) >= {
        "accuracy", "balanced_accuracy", "loss", "worst_decile_accuracy",
    }  # fmt: skip
    assert set(summary["references"]) == {"local_only", "centralised", "fine_tuned"}
    assert set(summary["seconds"]) == {"extract", "start", "train", "references", "total"}
    assert (summary["num_clients"], summary["rounds_completed"]) == (10, 20)
    assert summary["epsilon"] is None


def test_bytes_are_those_of_the_head(summary: dict) -> None:
    assert summary["bytes_up"] == summary["bytes_down"] == 20 * 10 * 4 * (10 * 1280 + 10)


def test_it_learns_and_the_verdict_tells_both_sides(summary: dict) -> None:
    final, alone = summary["final"], summary["references"]["local_only"]
    pooled = summary["references"]["centralised"]
    # ten classes, a pretrained trunk: far above chance, below what digits are capable of
    assert 0.85 < final["accuracy"] < 0.97
    assert 0.85 < pooled["accuracy"] < 0.97
    assert pooled["converged"]
    # own head: good at home, lost on everybody else's digits
    assert alone["accuracy"] > final["accuracy"] - 0.05
    assert alone["accuracy_everyone"] < 0.6 < final["accuracy_everyone"]


def test_the_run_folder_is_as_designed(summary: dict, place: Path) -> None:
    names = {p.name for p in (place / "run").iterdir()}
    assert names == {
        "scenario.toml", "summary.json", "rounds.parquet", "clients.parquet", "head.safetensors",
        "classes.parquet", "checkpoints", "events.jsonl",
    }  # fmt: skip
    clients = pd.read_parquet(place / "run" / "clients.parquet")
    assert set(clients["split"]) == {"train", "test", "everyone"}
    assert not clients.duplicated(["round", "client", "split"]).any()
    test = clients[clients["split"] == "test"]
    assert len(test) == 200
    last = test[test["round"] == 20]
    weighted = (last["accuracy"] * last["examples"]).sum() / last["examples"].sum()
    assert weighted == pytest.approx(summary["final"]["accuracy"])
    assert set(last["domain"]) == {"mnist", "optical"}
    everyone = clients[clients["split"] == "everyone"]
    for name, facts in summary["references"].items():
        own = last[f"{name}_accuracy"]
        assert (own * last["examples"]).sum() / last["examples"].sum() == pytest.approx(
            facts["accuracy"]
        )
        assert everyone[f"{name}_accuracy"].mean() == pytest.approx(facts["accuracy_everyone"])
        assert test[test["round"] < 20][f"{name}_accuracy"].isna().all()


def test_the_verdicts_rest_on_the_tables(summary: dict, place: Path) -> None:
    clients = pd.read_parquet(place / "run" / "clients.parquet")
    last = clients[clients["round"] == 20]
    own, everyone = (last[last["split"] == split] for split in ("test", "everyone"))
    for frame in (own, everyone):
        more = (frame["beats_local_only"] - frame["loses_to_local_only"]) / frame["examples"]
        wanted = frame["accuracy"] - frame["local_only_accuracy"]
        assert more.to_numpy(float) == pytest.approx(wanted.to_numpy(float))
    assert own["verdict"].value_counts().to_dict() == {
        name: count for name, count in summary["verdict"]["effects"].items() if count
    }
    assert own["advice"].value_counts().to_dict() == {
        name: count for name, count in summary["verdict"]["advice"].items() if count
    }
    assert sum(summary["verdict"]["advice"].values()) == 10
    assert (own["p_holm"] >= own["p_value"]).all()
    assert own["calibration_error"].between(0, 1).all()
    assert 0.9 < summary["calibration"]["auroc"] < 1
    assert clients[clients["round"] < 20]["advice"].isna().all()


def test_classes_are_those_of_the_clients(summary: dict, place: Path) -> None:
    classes = pd.read_parquet(place / "run" / "classes.parquet")
    assert (classes["train"].sum(), classes["test"].sum()) == (
        summary["data"]["train"], summary["data"]["test"],
    )  # fmt: skip
    right = classes["correct"].sum() / classes["test"].sum()
    assert right == pytest.approx(summary["final"]["accuracy"])
    alone = classes["local_only_correct"].sum() / classes["test"].sum()
    assert alone == pytest.approx(summary["references"]["local_only"]["accuracy"])
    assert ((classes["train"] > 0) | (classes["test"] > 0)).all()
    recalls = classes.groupby("class")[["correct", "test"]].sum()
    for name, facts in summary["fairness"]["federated"]["classes"].items():
        assert facts["recall"] == recalls["correct"][name] / recalls["test"][name]
    by_clients = summary["fairness"]["federated"]["by_clients"]
    assert by_clients["worst_decile"] == pytest.approx(summary["final"]["worst_decile_accuracy"])
    assert by_clients["spread"] == pytest.approx(summary["final"]["spread"])


def test_the_head_says_what_it_fits(summary: dict, place: Path) -> None:
    import numpy as np

    from fedtl.conduct import head_hash

    with safe_open(place / "run" / "head.safetensors", "np") as file:
        tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        card = file.metadata()
    assert head_hash(tensors) == summary["head_sha256"]
    assert card["backbone_sha256"] == summary["backbone"]["weights_sha256"]
    assert card["classes"].split("\n") == [str(digit) for digit in range(10)]


def test_a_second_run_finds_the_features_and_ends_with_the_same_head(
    summary: dict, place: Path
) -> None:
    from fedtl.cli import run_command

    settings = ["--set", "engine.threads=1", "--set", "engine.block_size=3"]
    assert run_command(["run", "quickstart", "--out", str(place / "again"), *settings]) == 0
    again = json.loads((place / "again" / "summary.json").read_text())
    assert again["backbone"]["cached"]
    for key in ("head_sha256", "scenario_hash", "final", "bytes_up"):
        assert again[key] == summary[key]

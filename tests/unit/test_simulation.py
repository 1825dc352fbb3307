"""What a run says of heads that are a client's own, of attacks, and of what is missing."""

from __future__ import annotations

import json

import pandas as pd
import pytest

MLP = ("--set", "head.kind=mlp", "--set", "head.hidden=[4]")


def summary_of(fedtl, *arguments: str):
    done = fedtl("run", "small.toml", "--json", "--out", "out", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_where_the_shared_head_is_no_model_every_figure_is_of_the_clients_own(fedtl, small) -> None:
    found, _ = summary_of(
        fedtl, *MLP, "--set", "strategy.name=fedper",
        "--set", 'evaluation.references=["local_only", "centralised"]',
        "--set", "evaluation.reference_clients=2",
    )  # fmt: skip
    assert found["final"] == found["personal"]
    assert "excess_loss" not in found["final"]
    frame = pd.read_parquet(small.parent / "out" / "clients.parquet")
    own = frame[(frame["split"] == "test") & frame["local_only_accuracy"].notna()]
    assert len(own) == 2
    told = next(line for line in found["verdict"]["lines"] if line.startswith("At home"))
    right = (own["personal_accuracy"] * own["examples"]).sum() / own["examples"].sum()
    assert f"federated {100 * right:.1f} %" in told


def test_the_backdoors_success_is_told(fedtl, small) -> None:
    done = fedtl("run", "small.toml", "--set", "attack.kind=backdoor", "--out", "out")
    assert done.returncode == 0
    assert "The backdoor works on" in done.stdout
    assert "lies in every round" in done.stdout


def test_a_head_of_some_clients_says_so(fedtl, small) -> None:
    arguments = ("--set", "strategy.name=fed3r", "--set", "rounds=1")
    done = fedtl("run", "small.toml", "--out", "out", *arguments)
    assert "3 of 5 clients are in the head" in done.stdout


def test_without_anybodys_statistics_there_is_no_head(fedtl, small) -> None:
    everybody = ", ".join(f'"client-{i:04}"' for i in range(5))
    absent = f"participation.absent=[{{round = 1, clients = [{everybody}]}}]"
    done = fedtl(
        "run", "small.toml", "--out", "out", "--set", "strategy.name=fed3r", "--set", "rounds=1",
        "--set", absent,
    )  # fmt: skip
    assert done.returncode == 4, done.stdout
    assert "no client's statistics came" in done.stderr


@pytest.mark.parametrize("strategy", ["fed3r", "afl"])
def test_each_clients_contribution_is_in_the_results(fedtl, small, strategy: str) -> None:
    summary_of(fedtl, "--set", f"strategy.name={strategy}", "--set", "clients.fraction=1.0")
    frame = pd.read_parquet(small.parent / "out" / "clients.parquet")
    own = frame[frame["split"] == "test"]
    assert own["contribution_own"].notna().all()
    assert own["contribution_others"].notna().all()
    forgotten = fedtl("forget", "out", own["name"].iloc[0])
    assert forgotten.returncode == 0, forgotten.stderr
    assert (small.parent / "out" / f"head-without-{own['name'].iloc[0]}.safetensors").is_file()
    assert fedtl("forget", "out", "nobody").returncode == 2

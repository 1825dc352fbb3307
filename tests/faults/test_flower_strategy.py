"""Strategies of Flower's through the command line: the same head as ours, killed and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

STRATEGY = ["--set", "strategy.name=flower"]

USERS = '''
from flwr.serverapp.strategy import FedAdam


class Noting(FedAdam):
    """Halves the clients' rate every other round and notes what it saw."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.notes = []

    def configure_train(self, server_round, arrays, config, grid):
        if server_round % 2 == 0:
            config["lr"] *= 0.5
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.notes.append([server_round, metrics["train_loss"]])
        return arrays, metrics
'''


def run(fedtl, small: Path, out: Path, *settings: str) -> dict:
    done = fedtl("run", str(small), *settings, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_fedavg_is_ours_up_to_the_rounding_of_its_float32_sums(
    fedtl, small: Path, tmp_path: Path
) -> None:
    ours = run(fedtl, small, tmp_path / "ours", "--set", "strategy.name=fedavg")
    theirs = run(fedtl, small, tmp_path / "theirs", *STRATEGY, "--set", "strategy.class=FedAvg")
    assert ours["bytes_up"] == theirs["bytes_up"]
    heads = [load_file(tmp_path / name / "head.safetensors") for name in ("ours", "theirs")]
    for name, tensor in heads[0].items():
        # Three products and two sums a round in float32, of values below 1.
        np.testing.assert_allclose(heads[1][name], tensor, rtol=0, atol=4 * 3 * 2**-23)


@pytest.mark.parametrize("place", ["after_train", "after_commit"])
def test_killed_and_resumed_it_ends_with_the_same_head(
    fedtl, fedtl_process, small: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "users_noting.py").write_text(USERS)
    settings = [*STRATEGY, "--set", "strategy.class=users_noting:Noting"]
    settings += ["--set", "strategy.parameters.fraction_train=0.7"]
    whole = run(fedtl, small, tmp_path / "whole", *settings)
    broken = str(tmp_path / "broken")
    killed = fedtl_process(
        "run", str(small), *settings, "--out", broken, env={"FEDTL_FAIL": f"{place}:kill:3"}
    )
    assert killed.returncode == -signal.SIGKILL
    done = fedtl("resume", broken, "--json")
    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout)
    for key in ("head_sha256", "final", "bytes_up", "rounds_completed"):
        assert resumed[key] == whole[key]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["strategy.class=Krumm"], "Did you mean 'Krum'?"),
        (["strategy.class=Krum", "strategy.parameters.f=1"], "Krum knows no parameter"),
        ([], "strategy.class: is required"),
    ],
)
def test_what_is_wrong_with_the_class_is_said_in_a_line(
    fedtl, small: Path, settings: list[str], words: str
) -> None:
    more = [part for setting in settings for part in ("--set", setting)]
    refused = fedtl("run", str(small), *STRATEGY, *more)
    assert refused.returncode == 2
    assert words in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr

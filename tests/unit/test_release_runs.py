"""Whole runs of a closed form that is released once: what is promised, kept, and done again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtl.build import make_federation, open_data
from fedtl.interrupts import Interrupts
from fedtl.results.runs import RunFolder
from fedtl.rounds import run_rounds
from fedtl.scenario.load import load_scenario
from fedtl.strategies import make_strategy
from fedtl.strategies.private import Private
from fedtl.strategies.private_release import PrivateRelease

NAMES = ["fed3r", "afl", "fedncm", "fedlda"]


def release(name: str = "fed3r", multiplier: float = 0.5, clip: float = 4.0) -> list[str]:
    own = {
        "strategy.name": name, "rounds": 1, "clients.fraction": 1.0, "privacy.clip": clip,
        "privacy.mechanism": "release", "privacy.noise_multiplier": multiplier,
    }  # fmt: skip
    return [part for key, value in own.items() for part in ("--set", f"{key}={value}")]


def head_of(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "head.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_promises_and_keeps_only_what_was_released(fedtl, small, name: str) -> None:
    out = small.parent / "out"
    done = fedtl("run", "small.toml", "--json", "--out", "out", *release(name, 1000.0))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert 0 < summary["epsilon"] < 0.1
    assert summary["privacy"]["mechanism"] == "release"
    assert len((out / "ledger.jsonl").read_text().splitlines()) == 1
    assert not list(out.rglob("*statistics*"))
    commits = [load_file(path) for path in out.rglob("checkpoints/*.safetensors")]
    slots = [slot for commit in commits for slot in commit.items()]
    sums = [tensor for slot, tensor in slots if slot.endswith(("sums", "gram")) and tensor.any()]
    assert len(sums) == 1 + (name != "fedncm")  # before the release there is nothing
    for tensor in sums:  # true ones are below 1,000 here; noise is a few thousand
        assert np.abs(tensor).mean() > 1000


@pytest.mark.parametrize("name", NAMES)
def test_without_noise_it_is_the_plain_head_and_promises_nothing(fedtl, small, name: str) -> None:
    plain = ("--set", f"strategy.name={name}", "--set", "rounds=1", "--set", "clients.fraction=1.0")
    assert fedtl("run", "small.toml", "--out", "plain", *plain).returncode == 0
    done = fedtl("run", "small.toml", "--json", "--out", "out", *release(name, 0.0, 1000.0))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["epsilon"] is None
    expected, found = (head_of(small.parent / folder) for folder in ("plain", "out"))
    for tensor, same in expected.items():
        assert found[tensor] == pytest.approx(same, rel=1e-5, abs=1e-6)


def test_a_run_that_is_killed_before_its_release_is_charged_once(
    fedtl, fedtl_process, small
) -> None:
    assert fedtl("run", "small.toml", "--out", "whole", *release()).returncode == 0
    fail = {"FEDTL_FAIL": "after_charge:kill"}
    assert fedtl_process("run", "small.toml", "--out", "out", *release(), env=fail).returncode < 0
    out = small.parent / "out"
    charged = (out / "ledger.jsonl").read_bytes()
    assert len(charged.splitlines()) == 1
    assert fedtl("resume", "out").returncode == 0
    assert (out / "ledger.jsonl").read_bytes() == charged  # the same noise is the same release
    whole = head_of(small.parent / "whole")
    assert all((tensor == whole[name]).all() for name, tensor in head_of(out).items())


@pytest.mark.parametrize("unit", ["example", "client"])
@pytest.mark.parametrize("name", ["fed3r", "afl", "fedncm"])
def test_a_secure_sum_gives_the_plain_head_up_to_the_quantisation(
    small, tmp_path, monkeypatch, name: str, unit: str
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = [part for part in release(name, 0.0) if part != "--set"]
    changes += [f'privacy.unit="{unit}"', 'privacy.secure_aggregation="arithmetic"']
    made = make_federation(open_data(load_scenario("small.toml", changes))).federation
    ring = made.strategy.ring  # type: ignore[attr-defined]
    assert ring is not None
    inner = make_strategy(made.scenario, made.roster.names)

    def head(strategy, **more):
        folder = RunFolder.create(tmp_path / f"{len(more)}", "")
        federation = replace(made, strategy=strategy, **more)
        try:
            return run_rounds(federation, folder, lambda row, updates: None, Interrupts())[0].head
        finally:
            folder.release()

    secret = head(Private(PrivateRelease(inner, unit, 4.0, 0.0, ring), ring=ring))
    plain = head(PrivateRelease(inner, unit, 4.0, 0.0), secure=None)
    for tensor, same in plain.items():
        assert secret[tensor] == pytest.approx(same, rel=1e-4, abs=1e-5)

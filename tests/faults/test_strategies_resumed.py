"""Strategies that remember more than a head, killed and resumed, end as the unbroken run."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pandas as pd
import pytest

Fedtl = Callable[..., CompletedProcess[str]]

SAME = (
    "head_sha256", "final", "personal", "bytes_up", "bytes_down", "rounds_completed",
    "cohorts_blake2b", "batches_blake2b",
)  # fmt: skip


def summary(done: CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def broken_as_whole(
    settings: list[str], fails: str, small: Path, fedtl: Fedtl, fedtl_process: Fedtl, place: Path
) -> tuple[dict[str, Any], pd.DataFrame]:
    """The summary and the clients' rows, after both were found the same for the killed run."""
    command = ["run", str(small), "--json"]
    for setting in settings:
        command += ["--set", setting]
    whole = summary(fedtl(*command, "--out", "whole"))
    killed = fedtl_process(*command, "--out", "broken", env={"FEDTL_FAIL": fails})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = summary(fedtl("resume", "broken", "--json"))
    assert {key: resumed[key] for key in SAME} == {key: whole[key] for key in SAME}
    rows = [pd.read_parquet(place / name / "clients.parquet") for name in ("whole", "broken")]
    pd.testing.assert_frame_equal(*rows, check_exact=True)
    return whole, rows[0]


@pytest.mark.parametrize(
    ("settings", "fails"),
    [
        (["strategy.name=scaffold"], "after_train:kill:3"),
        (["strategy.name=lbfgs", "clients.fraction=1", "rounds=6"], "after_aggregate:kill:4"),
        # what clients keep of round 3 is written, and the round is not
        (["strategy.name=ditto"], "before_commit:kill:3"),
    ],
    ids=["scaffold", "lbfgs", "ditto"],
)
def test_killed_and_resumed(
    settings: list[str],
    fails: str,
    small: Path,
    fedtl: Fedtl,
    fedtl_process: Fedtl,
    tmp_path: Path,
) -> None:
    whole, _ = broken_as_whole(settings, fails, small, fedtl, fedtl_process, tmp_path)
    assert (whole["personal"] is not None) == ("strategy.name=ditto" in settings)


def test_late_reports_are_added_without_repeating_others(
    small: Path, fedtl: Fedtl, fedtl_process: Fedtl, tmp_path: Path
) -> None:
    """Killed when round 2's statistics were kept and summed, and not committed."""
    settings = ["strategy.name=fed3r", "rounds=9"]
    whole, rows = broken_as_whole(
        settings, "after_train:kill:2", small, fedtl, fedtl_process, tmp_path
    )
    assert 2 <= whole["rounds_completed"] < 9  # ends with the last report
    trained = rows[rows["split"] == "train"]
    assert sorted(trained["client"]) == [0, 1, 2, 3, 4]  # each is asked once
    assert set(trained["status"]) == {"ok"}
    assert trained["round"].nunique() > 1
    at_once = summary(
        fedtl("run", str(small), "--json", "--set", "strategy.name=fed3r", "--set",
              "clients.fraction=1", "--out", "once")
    )  # fmt: skip
    assert at_once["rounds_completed"] == 1
    assert at_once["bytes_up"] == whole["bytes_up"]
    for key in ("accuracy", "loss"):
        assert at_once["final"][key] == pytest.approx(whole["final"][key], rel=1e-6)

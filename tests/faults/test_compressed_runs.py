"""Compressed runs as a user starts them: bytes in the summary, and the same end after a kill."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

Fedtl = Callable[..., CompletedProcess[str]]


def summary(done: CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("kind", "num_bytes"),
    [("none", 21 * 4), ("top_k", 3 * 8), ("int8", 21 + 2 * 4), ("sign", 3 + 2 * 4)],
)
def test_bytes_are_counted_as_they_are_sent(
    kind: str, num_bytes: int, small: Path, fedtl: Fedtl
) -> None:
    """A head of three classes and six features; three clients in each of four rounds."""
    settings = ("--set", f"compression.kind={kind}", "--set", "compression.fraction=0.1")
    found = summary(fedtl("run", str(small), "--json", *settings))
    assert found["bytes_up"] == 4 * 3 * num_bytes
    assert found["bytes_down"] == 4 * 3 * 21 * 4


def test_a_killed_run_ends_as_the_unbroken_one(
    small: Path, fedtl: Fedtl, fedtl_process: Fedtl, tmp_path: Path
) -> None:
    """Killed when clients had written round 4's residuals, and the two newest commits are torn:
    the run goes back to round 2, and so must what the clients keep."""
    command = ("run", str(small), "--json", "--set", "compression.kind=sign", "--out")
    unbroken = summary(fedtl(*command, "unbroken"))
    killed = fedtl_process(*command, "broken", env={"FEDTL_FAIL": "before_commit:kill:4"})
    assert killed.returncode == -signal.SIGKILL
    for round in (3, 2):
        (manifest,) = (tmp_path / "broken").rglob(f"round-{round:06d}.json")
        manifest.write_text("torn")
    resumed = summary(fedtl("resume", "broken", "--json"))
    assert resumed["head_sha256"] == unbroken["head_sha256"]
    plain = summary(fedtl(*command, "plain", "--set", "compression.error_feedback=false"))
    assert plain["head_sha256"] != unbroken["head_sha256"]

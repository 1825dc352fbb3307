"""Private runs through the command line: what is told, stopped, killed and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

PRIVATE = [
    "--set", "strategy.weighting=uniform",
    "--set", "privacy.mechanism=central",
    "--set", "privacy.noise_multiplier=1.5",
    "--set", "privacy.delta=0.01",
]  # fmt: skip

KEYS = {
    "mechanism", "unit", "epsilon", "delta", "noise_multiplier", "clip", "final_clip", "accountant",
    "sampling", "rate", "releases", "noise_source", "noise_at", "epsilon_against_server",
    "assumptions", "secure_aggregation", "min_class_examples", "canaries", "leaves",
}  # fmt: skip


def summary_of(done: Any) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_run_says_what_it_promises_and_what_that_rests_on(
    fedtl: Any, small: Path, tmp_path: Path
) -> None:
    done = fedtl("run", str(small), *PRIVATE, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "differential privacy (central) of whole clients" in said
    assert "noise from the seeded stream at the server" in said
    assert said.count("assumed:") >= 3
    assert "fedtl audit" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    facts = summary["privacy"]
    assert set(facts) == KEYS
    assert summary["epsilon"] == facts["epsilon"] > 0
    assert (facts["unit"], facts["noise_at"], facts["releases"]) == ("client", "server", 4)
    assert facts["secure_aggregation"] is None
    assert f"epsilon {facts['epsilon']:.4g} (delta 0.01)" in said
    leaves = {one["tensor"]: (one["shape"], one["dtype"]) for one in facts["leaves"]}
    assert leaves["bias"] == ([3], "float32")
    assert {"weight", "num_examples", "loss"} <= set(leaves)
    rounds = pq.read_table(tmp_path / "run" / "rounds.parquet")
    assert rounds["epsilon"].to_pylist()[-1] == facts["epsilon"]


def test_a_secure_sum_says_what_it_hides(fedtl: Any, small: Path, tmp_path: Path) -> None:
    secure = ["--set", "privacy.secure_aggregation=secagg"]
    absent = "participation.absent=[{round=2, clients=['client-0000', 'client-0001']}]"
    lax = ["--set", absent, "--set", "privacy.threshold=0.6", "--set", "clients.fraction=1.0"]
    done = fedtl("run", str(small), *secure, *lax, "--out", str(tmp_path / "run"), "--json")
    facts = summary_of(done)["privacy"]
    assert set(facts) == KEYS
    assert facts["epsilon"] is None
    assert facts["unit"] is None
    sums = facts["secure_aggregation"]
    assert (sums["protocol"], sums["ring_bits"], sums["neighbours"]) == ("secagg", 32, 4)
    assert (sums["dropouts"], sums["aborted_rounds"]) == (2, 0)
    assert [one["tensor"] for one in facts["leaves"]] == ["ring.values", "num_examples"]
    assert any("one process" in sentence for sentence in facts["assumptions"])


def test_no_promise_is_none(fedtl: Any, small: Path, tmp_path: Path) -> None:
    summary = summary_of(fedtl("run", str(small), "--out", str(tmp_path / "run"), "--json"))
    assert summary["epsilon"] is None
    assert summary["privacy"] is None
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_clipping_alone_promises_nothing_and_says_so(
    fedtl: Any, small: Path, tmp_path: Path
) -> None:
    quiet = [*PRIVATE, "--set", "privacy.noise_multiplier=0.0"]
    done = fedtl("run", str(small), *quiet, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "epsilon not bounded" in said
    assert "nothing is promised" in said
    facts = json.loads((tmp_path / "run" / "summary.json").read_text())["privacy"]
    assert facts["epsilon"] is None
    assert facts["noise_source"] is facts["noise_at"] is None


def test_the_budget_ends_a_run_with_4_and_keeps_what_was_done(
    fedtl: Any, small: Path, tmp_path: Path
) -> None:
    whole = summary_of(
        fedtl("run", str(small), *PRIVATE, "--out", str(tmp_path / "whole"), "--json")
    )
    told = pq.read_table(tmp_path / "whole" / "rounds.parquet")["epsilon"].to_pylist()
    assert told[-1] == whole["epsilon"]
    budget = ["--set", f"privacy.budget={(told[1] + told[2]) / 2}"]
    run = tmp_path / "run"
    few = ["--set", "evaluation.every=4"]  # the last round is judged, whichever that is
    stopped = fedtl("run", str(small), *PRIVATE, *budget, *few, "--out", str(run))
    assert stopped.returncode == 4
    error = " ".join(stopped.stderr.split())
    assert "round 3 would bring what is spent to epsilon" in error
    assert "2 rounds are kept" in error
    assert "Traceback" not in stopped.stderr
    rounds = pq.read_table(run / "rounds.parquet")
    assert rounds["round"].to_pylist() == [1, 2]
    assert rounds["accuracy"].to_pylist()[1] is not None
    assert len((run / "ledger.jsonl").read_text().splitlines()) == 2
    # the run is whole: a head, a summary, a report
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["rounds_completed"], summary["privacy"]["releases"]) == (2, 2)
    assert summary["epsilon"] == pytest.approx(told[1])
    assert any("round 3 would bring" in note for note in summary["notes"])
    assert (run / "head.safetensors").exists()
    assert fedtl("report", str(run)).returncode == 0
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["exit_code"] for e in events if e["event"] == "stopped"] == [4]
    assert "finished" in fedtl("resume", str(run)).stderr


def test_a_budget_for_no_round_at_all(fedtl: Any, small: Path, tmp_path: Path) -> None:
    budget = ["--set", "privacy.budget=0.01"]
    stopped = fedtl("run", str(small), *PRIVATE, *budget, "--out", str(tmp_path / "run"))
    assert stopped.returncode == 4
    assert "0 rounds are kept" in " ".join(stopped.stderr.split())
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_killed_between_charge_and_commit(
    fedtl: Any, fedtl_process: Any, small: Path, tmp_path: Path
) -> None:
    adaptive = [*PRIVATE, "--set", "privacy.adaptive_clip=true"]
    out = str(tmp_path / "whole")
    unbroken = summary_of(fedtl("run", str(small), *adaptive, "--out", out, "--json"))
    run = tmp_path / "broken"
    failing = {"FEDTL_FAIL": "after_charge:kill:3"}
    killed = fedtl_process("run", str(small), *adaptive, "--out", str(run), env=failing)
    assert killed.returncode == -signal.SIGKILL
    assert len((run / "ledger.jsonl").read_text().splitlines()) == 3
    resumed = summary_of(fedtl("resume", str(run), "--json"))
    for key in ("head_sha256", "final", "epsilon", "privacy"):
        assert resumed[key] == unbroken[key]
    assert (run / "ledger.jsonl").read_text() == (tmp_path / "whole/ledger.jsonl").read_text()


def test_a_ledger_that_cannot_be_read_stops_the_run(
    fedtl: Any, small: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    away = "participation.absent=[{round=1, clients=['client-0000']}]"
    few = ["--set", away, "--set", "participation.quorum=5", "--set", "participation.patience=1"]
    few += ["--set", "clients.fraction=1.0"]
    assert fedtl("run", str(small), *PRIVATE, *few, "--out", str(run)).returncode == 4
    (run / "ledger.jsonl").write_text("nonsense\n")
    refused = fedtl("resume", str(run))
    assert refused.returncode == 5
    assert "nobody knows what was spent" in " ".join(refused.stderr.split())
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("secure", ["arithmetic", "secagg"])
def test_below_the_threshold_for_too_long(
    secure: str, fedtl: Any, small: Path, tmp_path: Path
) -> None:
    away = "['client-0000', 'client-0001', 'client-0002', 'client-0003']"
    rounds = ", ".join(f"{{round={t}, clients={away}}}" for t in (1, 2, 3))
    done = fedtl(
        "run", str(small), "--out", str(tmp_path / "run"),
        "--set", "clients.fraction=1.0", "--set", f"participation.absent=[{rounds}]",
        "--set", "participation.patience=3", "--set", f"privacy.secure_aggregation={secure}",
    )  # fmt: skip
    assert done.returncode == 4
    assert "no secure sum" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr

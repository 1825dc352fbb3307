"""Leaving a domain out: who trains, who is judged, and that what is done is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from statsmodels.stats.proportion import proportion_confint

from fedtl.errors import Interrupted

DOMAINS = ("ink", "pencil", "chalk/board")

SCENARIO = """name = "hands"
seed = 3
rounds = 3
[data]
source = "arrays"
path = "hands.npz"
[clients]
num = 6
within_domains = true
[backbone]
name = "identity"
[training]
local_epochs = 2
batch_size = 8
[strategy]
name = "fedavgm"
"""


def write_data(place: Path, **columns: Any) -> dict[str, Any]:
    rng = np.random.default_rng(6)
    n = 240
    domain = np.arange(n) % 3
    y = rng.integers(0, 3, n)
    x = rng.normal(size=(n, 5)).astype(np.float32)
    x[np.arange(n), y] += 2
    x[:, 3:] += domain[:, None]
    data = {"x": x, "y": y, "domain": np.array(DOMAINS)[domain], **columns}
    np.savez(place / "hands.npz", **data)
    (place / "hands.toml").write_text(SCENARIO)
    return data


@pytest.fixture
def lodo(fedtl: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    return lambda *more: fedtl("lodo", "hands.toml", "--out", "out", "--json", *more)


def test_each_head_never_saw_its_domain_and_is_judged_on_all_of_it(
    lodo: Callable[..., Any], tmp_path: Path
) -> None:
    data = write_data(tmp_path)
    done = lodo("--seeds", "2")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert json.loads((tmp_path / "out" / "lodo.json").read_text()) == facts
    assert {one["domain"] for one in facts["domains"]} == set(DOMAINS)
    for place, one in enumerate(facts["domains"]):
        rows = data["domain"] == one["domain"]
        assert one["examples"] == rows.sum() == 80, "training and test rows, all of them"
        own = []
        for seed in (3, 4):
            (run,) = (tmp_path / "out" / f"seed-{seed}").glob(f"without-{place + 1}-*")
            trained = json.loads((run / "summary.json").read_text())
            assert trained["num_clients"] == 4
            assert trained["data"]["train"] + trained["data"]["test"] == 160
            head = load_file(run / "head.safetensors")
            scores = data["x"][rows] @ head["weight"].T + head["bias"]
            own.append(float((scores.argmax(axis=1) == data["y"][rows]).mean()))
        assert one["seeds"] == pytest.approx(own)
        assert one["accuracy"] == pytest.approx(np.mean(own))
        assert one["spread"] == pytest.approx(np.std(own, ddof=1))
        right = one["accuracy"] * 80
        assert one["interval"] == pytest.approx(proportion_confint(right, 80, 0.05, "wilson"))
        assert set(one["references"]) == {"left_out", "with_domain", "own"}
        assert min(one["references"].values()) > 0.4
    assert facts["mean"] == pytest.approx(np.mean([one["accuracy"] for one in facts["domains"]]))
    assert any("cover which examples" in note for note in facts["notes"])


def test_finished_runs_are_not_run_again_and_a_stopped_one_goes_on(
    lodo: Callable[..., Any], fedtl: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from fedtl.lodo.shown import Progress

    write_data(tmp_path)
    told = Progress.round_done

    def stop(self: Progress, row: Any, updates: Any) -> None:
        told(self, row, updates)
        if "pencil" in self._what and row["round"] == 2:
            raise Interrupted("stopped", do=self._interrupts.hint)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "round_done", stop)
        done = lodo()
    assert done.returncode == 130
    assert "--out out" in done.stderr
    place = tmp_path / "out" / "seed-3"
    summaries = {path.parent.name: path.stat().st_mtime_ns for path in place.glob("*/summary.json")}
    assert "everybody" in summaries
    assert not (place / "without-3-pencil" / "summary.json").exists()
    done = lodo()
    assert done.returncode == 0, done.stderr
    for name, time in summaries.items():
        assert (place / name / "summary.json").stat().st_mtime_ns == time, "left as it was"
    events = (place / "without-3-pencil" / "events.jsonl").read_text()
    assert "resumed" in events
    unbroken = fedtl("lodo", "hands.toml", "--out", "again", "--json")
    assert json.loads(unbroken.stdout)["domains"] == json.loads(done.stdout)["domains"]


def test_an_unfinished_run_without_a_domain_is_not_gone_on_with_by_resume(
    lodo: Callable[..., Any], fedtl: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It would be a run with everybody: the domain would be in it after all."""
    from fedtl.lodo.shown import Progress

    write_data(tmp_path)

    def stop(self: Progress, row: Any, updates: Any) -> None:
        if "without" in self._what:
            raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "round_done", stop)
        assert lodo().returncode == 130
    (run,) = (tmp_path / "out" / "seed-3").glob("without-1-*")
    assert run.name == "without-1-chalk_board"
    done = fedtl("resume", str(run))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def alone(place: Path) -> None:
    write_data(place, domain=np.repeat("ink", 240))


def without(place: Path) -> None:
    data = write_data(place)
    del data["domain"]
    np.savez(place / "hands.npz", **data)


def apart(place: Path) -> None:
    data = write_data(place)
    np.savez(place / "hands.npz", **{**data, "y": np.arange(240) % 3 * 2 + np.arange(240) // 3 % 2})


@pytest.mark.parametrize(
    ("spoil", "settings", "says"),
    [
        (alone, ["clients.within_domains=false"], "one domain only"),
        (without, ["clients.within_domains=false"], "no domains to leave out"),
        (write_data, ["clients.within_domains=false"], "examples of several domains"),
        (apart, [], "no class in common"),
        (write_data, ["strategy.name=fedper"], "no shared head"),
        (write_data, ["adaptation.features=whiten"], "adaptation.features"),
    ],
)
def test_what_cannot_be_left_out_is_refused(
    spoil: Callable[[Path], Any], settings: list[str], says: str,
    lodo: Callable[..., Any], tmp_path: Path,
) -> None:  # fmt: skip
    spoil(tmp_path)
    done = lodo(*[part for one in settings for part in ("--set", one)])
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_another_scenarios_folder_is_refused(lodo: Callable[..., Any], tmp_path: Path) -> None:
    write_data(tmp_path)
    assert lodo("--set", "rounds=1").returncode == 0
    done = lodo("--set", "rounds=2")
    assert done.returncode == 2
    assert "another scenario" in done.stderr


def test_classes_that_nobody_else_has_are_told(lodo: Callable[..., Any], tmp_path: Path) -> None:
    data = write_data(tmp_path)
    y = np.where((data["domain"] == "pencil") & (data["y"] == 2), 3, data["y"])
    write_data(tmp_path, y=y)
    facts = json.loads(lodo("--set", "rounds=1").stdout)
    unseen = {one["domain"]: one["unseen_classes"] for one in facts["domains"]}
    assert unseen == {"ink": [], "chalk/board": [], "pencil": ["3"]}
    assert any("pencil has classes that nobody else has: 3" in note for note in facts["notes"])

"""Adaptation through whole runs: what it wins back, the harm that is gated, and who is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedtl.evaluation.label_skew import MOST_LABEL_SKEW, label_skew
from fedtl.scenario.load import load_scenario

TABLES = """name = "adapted"
seed = 1
rounds = 8
[data]
source = "arrays"
path = "data.npz"
[clients]
partition = "natural"
[backbone]
name = "identity"
[training]
local_epochs = 3
learning_rate = 0.1
[evaluation]
references = []
"""


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., None]:
    """Writes four clients of 3 classes whose sensors have an offset and a gain of their own."""

    def write(gap: float, skew: float, apart: float = 2.0, each: int = 150) -> None:
        random = np.random.default_rng(5)
        x, y, client = [], [], []
        for k in range(4):
            favourite = np.eye(3)[k % 3]
            shares = (1 - skew) / 3 + skew * favourite
            labels = np.repeat(np.arange(3), np.rint(each * shares).astype(int))
            rows = random.normal(size=(len(labels), 8)) + apart * np.eye(8)[labels]
            gain, offset = 1 + gap * random.uniform(0, 4), gap * random.normal(size=8) * 6
            x.append(gain * rows + offset)
            y.append(labels)
            client.append(np.full(len(labels), f"site{k}"))
        np.savez(
            tmp_path / "data.npz",
            x=np.concatenate(x).astype(np.float32),
            y=np.concatenate(y),
            client=np.concatenate(client),
        )
        (tmp_path / "adapted.toml").write_text(TABLES)

    return write


@pytest.fixture
def judged(
    fedtl: Callable[..., object], tmp_path: Path
) -> Callable[..., tuple[float, float | None]]:
    """Accuracy of the shared heads, and of the clients' own, after a run with some settings."""

    def run(*sets: str) -> tuple[float, float | None]:
        out = f"out{len(list(tmp_path.glob('out*')))}"
        told = [part for one in sets for part in ("--set", one)]
        done = fedtl("run", "adapted.toml", "--out", out, *told)
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / out / "summary.json").read_text())
        return summary["final"]["accuracy"], (summary["personal"] or {}).get("accuracy")

    return run


def test_alignment_wins_back_what_a_gap_without_label_skew_costs(world, judged) -> None:
    kinds = ("standardise", "whiten", "coral")
    world(gap=1.0, skew=0.0)
    plain, _ = judged()
    for kind in kinds:
        assert judged(f"adaptation.features={kind}")[0] > plain + 0.05, kind
    world(gap=0.0, skew=0.0)
    plain, _ = judged()
    for kind in kinds:
        assert judged(f"adaptation.features={kind}")[0] > plain - 0.05, "no gap: it costs little"


def test_alignment_under_label_skew_does_harm_and_is_refused(world, judged, fedtl) -> None:
    world(gap=0.0, skew=0.9)
    told = ("--set", "adaptation.features=standardise")
    for command in (["run", "adapted.toml", "--out", "none"], ["check", "adapted.toml"]):
        refused = fedtl(*command, *told)
        assert refused.returncode == 2
        assert "label distance of 0." in refused.stderr
        assert "adaptation.allow_label_skew = true" in refused.stderr
    plain, _ = judged()
    harmed, _ = judged("adaptation.features=standardise", "adaptation.allow_label_skew=true")
    assert harmed < plain - 0.1, "a client's own mean is that of its classes"


def test_the_gates_figure() -> None:
    assert label_skew(np.array([[5, 5], [50, 50]])) == 0
    assert label_skew(np.array([[7, 0], [0, 7]])) == pytest.approx(0.3113, abs=1e-4)
    # of a client with nothing there is nothing to say, and many examples count for more
    assert label_skew(np.array([[7, 0], [0, 7], [0, 0]])) == pytest.approx(0.3113, abs=1e-4)
    assert label_skew(np.array([[1, 0], [500, 501]])) < 0.01 < MOST_LABEL_SKEW


def test_priors_at_home(world, judged) -> None:
    world(gap=0.0, skew=0.8, apart=1.0)
    plain, none = judged()
    assert none is None
    for prior in ("logit_adjustment", "bbse"):
        shared, home = judged(f"adaptation.prior={prior}")
        assert shared == plain, "the shared head is the same"
        assert home > plain + 0.02, prior
    balanced, none = judged("adaptation.prior=balanced_softmax")
    assert none is None
    assert balanced != plain


def test_bbse_says_why_it_cannot(world, fedtl, tmp_path) -> None:
    world(gap=0.0, skew=0.5)
    with np.load(tmp_path / "data.npz") as data:
        same = {**data, "x": np.ones_like(data["x"])}  # all examples look alike
    np.savez(tmp_path / "data.npz", **same)
    told = ("--set", "adaptation.prior=bbse", "--set", "data.leakage=allow")
    stopped = fedtl("run", "adapted.toml", "--out", "out", *told)
    assert stopped.returncode == 2
    assert "condition number" in stopped.stderr


def test_the_summary_of_a_resumed_run_is_that_of_the_unbroken_one(world, fedtl, tmp_path) -> None:
    world(gap=1.0, skew=0.0)
    told = ("--set", "adaptation.features=whiten", "--set", "adaptation.prior=balanced_softmax")
    assert fedtl("run", "adapted.toml", "--out", "whole", *told).returncode == 0
    env = {"FEDTL_FAIL": "after_commit:3:interrupt"}
    fedtl("run", "adapted.toml", "--out", "broken", *told, env=env)
    heads = []
    for name in ("whole", "broken"):
        if name == "broken" and not (tmp_path / name / "summary.json").is_file():
            assert fedtl("resume", "broken").returncode == 0
        heads.append(json.loads((tmp_path / name / "summary.json").read_text())["head_sha256"])
    assert heads[0] == heads[1]


def test_what_the_page_says_to_type_is_a_scenario() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "adaptation.md").read_text()
    commands = re.findall(r"^ *uv run fedtl run (\S+) --set (\S+)$", page, re.M)
    assert len(commands) == 2
    for name, setting in commands:
        load_scenario(name, [setting])
    assert f"above {MOST_LABEL_SKEW:g}." in page

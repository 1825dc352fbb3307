"""Choosing hyper-parameters: who judges, what may be searched, searches that go on, range tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtl.data.clients import ClientSplit
from fedtl.errors import InputError, Interrupted, ScenarioError
from fedtl.interrupts import Interrupts
from fedtl.scenario.load import load_scenario
from fedtl.transfer.views import _with_views
from fedtl.tune import search as searching
from fedtl.tune.rates import Curve, find_rates
from fedtl.tune.search import Asked, Search, Trial, run_search
from fedtl.tune.space import Dimension, check_space, read_dimension
from fedtl.tune.validation import Trials, validation_split
from fedtl.types import Rows

Fedtl = Callable[..., Any]


def features(counts: list[int], views: int = 1) -> Any:
    """What ``validation_split`` looks at of clients with so many training rows, 3 tests each."""
    total = sum(counts)
    order = np.random.default_rng(0).permutation(total + 3 * len(counts))
    ends = np.cumsum([0, *counts])
    train = [np.sort(order[a:b]) for a, b in pairwise(ends)]
    rows = Rows(np.concatenate(train), ends)
    test = Rows(np.sort(order[total:]), np.arange(len(counts) + 1) * 3)
    if views > 1:
        rows = _with_views(rows, np.sort(rows.index), len(order), views - 1)
    names = tuple(f"c{i}" for i in range(len(counts)))
    split = ClientSplit(rows, test, names, ("",) * len(counts))
    further = (views - 1) * total
    return SimpleNamespace(split=split, examples=range(len(order) + further), views=further)


def test_validation_takes_from_training_and_never_from_tests() -> None:
    given = features([20, 7, 1, 2])
    found = validation_split(given, 3)
    assert found.test.counts.tolist() == [4, 1, 0, 1]
    for client in range(4):
        parts = [*found.train.of(client), *found.test.of(client)]
        assert sorted(parts) == given.split.train.of(client).tolist()
        assert not set(parts) & set(given.split.test.index.tolist())
    again = validation_split(features([20, 7, 1, 2]), 3)
    np.testing.assert_array_equal(found.test.index, again.test.index)
    assert validation_split(given, 4).test.index.tolist() != found.test.index.tolist()
    with pytest.raises(InputError, match="no client has two training examples"):
        validation_split(features([1, 1]), 3)


def test_views_of_a_validation_image_are_not_trained_on() -> None:
    plain, viewed = features([20, 7, 1, 2]), features([20, 7, 1, 2], views=3)
    found, alone = validation_split(viewed, 3), validation_split(plain, 3)
    np.testing.assert_array_equal(found.test.index, alone.test.index)
    assert found.train.counts.tolist() == (3 * alone.train.counts).tolist()
    images, rows = len(plain.examples), np.sort(plain.split.train.index)
    for client in range(4):
        train = found.train.of(client)
        sources = np.where(train < images, train, rows[(train - images) % len(rows)])
        assert set(sources) == set(alone.train.of(client))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.learning_rate=1e-3:1", Dimension("training.learning_rate", (), 1e-3, 1, True)),
        ("training.mixup=0.1:0.5", Dimension("training.mixup", (), 0.1, 0.5, False)),
        ("training.mixup=0:100", Dimension("training.mixup", (), 0, 100, False)),
        ("rounds=2:40:linear", Dimension("rounds", (), 2, 40, False)),
        ("rounds=2:4:log", Dimension("rounds", (), 2, 4, True)),
        ("training.local_epochs=1,2, 5", Dimension("training.local_epochs", (1, 2, 5))),
        ("head.kind=linear,cosine,linear", Dimension("head.kind", ("linear", "cosine"))),
    ],
)
def test_values(text: str, expected: Dimension) -> None:
    assert read_dimension(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "rounds", "rounds=", "=1:2", "rounds=5:1", "rounds=1:1", "training.mixup=0:1:log",
     "rounds=1:2:3", "rounds=1:2:3:4", "rounds=1:b"],
)  # fmt: skip
def test_values_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="not a key with values"):
        read_dimension(text)


def test_every_problem_is_told_at_once(small: Path) -> None:
    space = [
        "training.learning_rat=0.1:1",
        "training.local_epochs=1,0,-3",
        "data.test_fraction=0.1:0.5",
        "head.kind=linear,cosin",
    ]
    with pytest.raises(ScenarioError) as told:
        check_space(str(small), [], None, [read_dimension(one) for one in space])
    text = told.value.line()
    assert "Did you mean 'learning_rate'?" in text
    assert 'Did you mean "cosine"?' in text
    assert "got 0;" in text
    assert "got -3;" in text
    assert "data.test_fraction: says what is judged" in text
    with pytest.raises(InputError, match="the same key twice"):
        check_space(str(small), [], None, [Dimension("rounds", (1, 2))] * 2)
    together = ["training.early_stopping=1,2", "training.validation_fraction=0.1,0.2"]
    check_space(str(small), [], None, [read_dimension(one) for one in together])


def started(small: Path, trials: int, *over: str) -> Asked:
    space = [read_dimension(one) for one in over]
    return Asked(str(small), [], None, space, trials)


def found(asked: Asked, path: Path, **hooks: Any) -> Search:
    with Interrupts() as interrupts:
        done = hooks.get("done", lambda search, trial: None)
        return run_search(asked, path, interrupts, lambda search: None, done)


OVER = ("training.learning_rate=0.001:1", "training.local_epochs=1,2,5")


def test_a_search_goes_on_as_if_it_had_not_stopped(small: Path, tmp_path: Path) -> None:
    def values(search: Search) -> list[Any]:
        return [(one.values, one.state, one.accuracy, list(one.rounds)) for one in search.trials]

    whole = found(started(small, 5, *OVER), tmp_path / "whole")
    assert len(whole.trials) == 5
    assert whole.trials[0].values == {"training.learning_rate": 0.05, "training.local_epochs": 1}

    def stop(search: Search, trial: Trial) -> None:
        if trial.number == 2:
            raise Interrupted("Ctrl-C")

    with pytest.raises(Interrupted):
        found(started(small, 5, *OVER), tmp_path / "part", done=stop)
    assert len(json.loads((tmp_path / "part" / "study.json").read_text())["trials"]) == 3
    resumed = found(started(small, 5, *OVER), tmp_path / "part")
    assert values(resumed) == values(whole)
    more = found(started(small, 6, *OVER), tmp_path / "part")
    assert values(more)[:5] == values(whole)
    assert not (tmp_path / "part" / "trial").exists()
    with pytest.raises(InputError, match="a search over other values"):
        found(started(small, 6, OVER[0]), tmp_path / "part")
    (tmp_path / "part" / "study.json").write_text("[]")
    with pytest.raises(InputError, match="not a search of fedtl"):
        found(started(small, 6, *OVER), tmp_path / "part")


def test_few_combinations_are_tried_once_each(small: Path, tmp_path: Path) -> None:
    asked = started(small, 50, "training.local_epochs=1,2", "head.kind=linear,cosine")
    search = found(asked, tmp_path / "study")
    tried = [tuple(one.values.values()) for one in search.trials]
    assert tried == [(1, "linear"), (1, "cosine"), (2, "linear"), (2, "cosine")]
    best = max(one.accuracy or 0 for one in search.trials if one.state == "complete")
    assert search.best is not None
    assert search.best.accuracy == best


def test_no_test_example_is_looked_at(small: Path, tmp_path: Path) -> None:
    """Labels of the tests turned round leave every trial as it was."""
    from fedtl.build import open_data

    asked = started(small, 2, "training.local_epochs=1,2")
    before = found(asked, tmp_path / "before")
    test = open_data(load_scenario(str(small))).split.test.index
    path = tmp_path / "small.npz"
    arrays = dict(np.load(path))
    arrays["x"] = arrays["x"].copy()
    arrays["x"][test] *= -100
    np.savez(path, **arrays)
    after = found(asked, tmp_path / "after")
    assert [one.rounds for one in after.trials] == [one.rounds for one in before.trials]


def test_trials_that_burst_fail_and_the_others_go_on(small: Path, tmp_path: Path) -> None:
    asked = started(small, 2, "training.learning_rate=0.05,1e38")
    search = found(asked, tmp_path / "study")
    assert [one.state for one in search.trials] == ["complete", "failed"]
    assert search.trials[1].reason
    assert search.best == search.trials[0]
    with pytest.raises(InputError, match="no trial came to its end"):
        found(started(small, 1, "training.learning_rate=1e38"), tmp_path / "none")


def test_bad_trials_end_early(small: Path, tmp_path: Path) -> None:
    rates = "training.learning_rate=0.05,0.06,0.07,0.08,30000.0"
    search = found(started(small, 5, rates), tmp_path / "study")
    assert [one.state for one in search.trials] == ["complete"] * 4 + ["pruned"]
    assert len(search.trials[4].rounds) < 4


def test_without_a_shared_head_there_is_nothing_to_go_by(small: Path, tmp_path: Path) -> None:
    small.write_text(small.read_text().replace("fedavgm", "fedper"))
    with pytest.raises(InputError, match="only clients' own heads"):
        found(started(small, 2, "training.local_epochs=1,2"), tmp_path / "study")


def test_range_test(small: Path, tmp_path: Path) -> None:
    with Interrupts() as interrupts:
        trials = Trials(tmp_path / "lr", interrupts)
        curve = find_rates(load_scenario(str(small)), trials, 1e-4, 1e4, 17)
        assert 3 < len(curve.rates) <= 17
        np.testing.assert_allclose(np.diff(np.log10(curve.rates)), 0.5)
        assert curve.rates[0] < curve.suggestion < curve.lowest
        assert curve.steepest <= curve.lowest
        again = find_rates(load_scenario(str(small)), trials, 1e-4, 1e4, 17)
        assert again == curve
        for span in ((0.0, 1.0, 5), (1.0, 0.1, 5), (0.1, 1.0, 2), (0.1, float("inf"), 5)):
            with pytest.raises(InputError, match="not a range"):
                find_rates(load_scenario(str(small)), trials, *span)
        closed = load_scenario(str(small), ['strategy.name="fed3r"'])
        with pytest.raises(InputError, match="take no steps"):
            find_rates(closed, trials)
    curve.draw(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_what_a_curve_says() -> None:
    rates = tuple(10.0**i for i in range(-5, 1))
    curve = Curve(rates, (2.0, 2.0, 1.0, 0.2, 0.2, 50.0))
    assert curve.lowest == pytest.approx(0.1)
    assert curve.suggestion == pytest.approx(0.033)
    assert curve.steepest == pytest.approx(1e-2)
    smooth = curve.smooth
    assert smooth[0] == pytest.approx(2.0)
    weights = 0.6 ** np.arange(5, -1, -1)
    assert smooth[-1] == pytest.approx(np.average(curve.losses, weights=weights))


def test_the_command_line(small: Path, fedtl: Fedtl, monkeypatch: pytest.MonkeyPatch) -> None:
    done = fedtl(
        "tune", "small.toml", "--over", "training.local_epochs=1,2", "--trials", "2", "--json"
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["command"].startswith("fedtl run small.toml --set training.local_epochs=")
    assert "nobody's test examples were looked at" in facts["judged_by"]
    done = fedtl("tune", "small.toml", "--lr", "--to", "1", "--steps", "5")
    assert done.returncode == 0, done.stderr
    assert "suggestion: training.learning_rate" in done.stdout
    done = fedtl("tune", "small.toml", "--lr", "--over", "rounds=1,2")
    assert (done.returncode, done.stdout) == (2, "")
    done = fedtl("tune", "small.toml")
    assert done.returncode == 2
    assert "nothing to search over" in done.stderr
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = fedtl("tune", "small.toml", "--over", "rounds=1,2")
    assert done.returncode == 3
    assert "uv sync --extra tune" in done.stderr


def test_tests_do_not_share_a_folder_by_chance() -> None:
    """Another scenario, or other values, are another folder."""
    base = load_scenario("quickstart")
    one = Asked("quickstart", [], None, [Dimension("rounds", (1, 2))], 5)
    other = replace(one, space=[Dimension("rounds", (1, 3))])
    folders = {
        searching._folder(one, base),
        searching._folder(other, base),
        searching._folder(one, base.model_copy(update={"seed": 99})),
    }
    assert len(folders) == 3
    assert searching._folder(replace(one, trials=9), base) in folders

"""Splits, shifts and patterns that cannot be: one line, exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def assert_refused(done, *says: str) -> None:
    assert done.returncode == 2, done.stdout
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in says), done.stderr


def settings(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["clients.partition=dirichlet_kapacity"], "dirichlet_capacity"),
        (["clients.partition=file"], "clients.split_file"),
        (["clients.partition=file", "clients.split_file=nowhere.csv"], "no such file"),
        (["clients.partition=file", "clients.split_file=small.npz"], "*.csv, *.parquet"),
        (["clients.partition=dirichlet_capacity", "clients.num=150"], "clients.min_examples"),
        (["clients.partition=dirichlet_capacity", "clients.alpha=1e-9", "clients.num=90"], "draws"),
        (["clients.partition=label_quantity", "clients.num=500"], "at most 200"),
        (["clients.alpha=nan"], "clients.alpha"),
        (["shift.kinds=['noise']"], "identity"),
        (["shift.kinds=['fog']"], "shift.kinds"),
        (["shift.severity=0"], "shift.severity"),
        (["data.client_pattern=_(a)"], "data.client_pattern"),
    ],
)
@pytest.mark.parametrize("command", ["split", "run"])
def test_refused_alike_by_split_and_run(
    fedtl, small: Path, command: str, values: list[str], says: str
) -> None:
    arguments = ["--out", "out"] if command == "run" else ["--write", "who.csv"]
    assert_refused(fedtl(command, "small.toml", *settings(*values), *arguments), says)
    assert {path.name for path in small.parent.iterdir()} == {"small.npz", "small.toml"}


def test_a_split_of_other_data(fedtl, small: Path) -> None:
    assert fedtl("split", "small.toml", "--write", "who.csv").returncode == 0
    content = dict(np.load(small.parent / "small.npz"))
    content["x"][0, 0] += 1
    np.savez(small.parent / "small.npz", **content)
    by_file = settings("clients.partition=file", "clients.split_file=who.csv")
    done = fedtl("run", "small.toml", *by_file, "--out", "out")
    assert_refused(done, "of other data", "fedtl split")
    assert not (small.parent / "out").exists()


def test_resuming_with_another_split_in_the_same_file(fedtl, small: Path) -> None:
    """The file's name is all that the scenario's hash knows; its content is in the identity."""
    by_file = settings("clients.partition=file", "clients.split_file=who.csv")
    assert fedtl("split", "small.toml", "--write", "who.csv").returncode == 0
    stopped = {"FEDTL_FAIL": "before_commit:interrupt:3"}
    assert fedtl("run", "small.toml", *by_file, "--out", "out", env=stopped).returncode == 130
    other = settings("seed=4")
    assert fedtl("split", "small.toml", *other, "--write", "who.csv").returncode == 0
    assert_refused(fedtl("resume", "out"), "begun with something else: data_fingerprint")
    assert fedtl("split", "small.toml", "--write", "who.csv").returncode == 0
    assert fedtl("resume", "out").returncode == 0


@pytest.mark.parametrize(
    ("y", "says"),
    [
        ([0, 1], "examples"),
        ([0] * 3 + [1], "examples"),
        ([0] * 30, "only one class"),
    ],
)
def test_hardly_any_data(fedtl, small: Path, y: list[int], says: str) -> None:
    x = np.random.default_rng(0).normal(size=(len(y), 6)).astype(np.float32)
    np.savez(small.parent / "small.npz", x=x, y=np.array(y))
    assert_refused(fedtl("split", "small.toml"), says)


def test_one_client_and_clients_of_one_class_are_shown(fedtl, small: Path) -> None:
    done = fedtl("split", "small.toml", *settings("clients.num=1"))
    assert done.returncode == 0, done.stderr
    assert "there is one client (client-0000)" in done.stdout
    assert "undefined" in done.stdout
    shards = settings("clients.partition=shards", "clients.shards_per_client=1", "clients.num=3")
    done = fedtl("split", "small.toml", *shards)
    assert "training examples of one class only" in done.stdout


def test_where_nothing_can_be_written(fedtl, small: Path) -> None:
    for option, name in (("--write", "nowhere/who.csv"), ("--html", "nowhere/who.html")):
        done = fedtl("split", "small.toml", option, name)
        assert done.returncode in (2, 3), done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["split", "gap"])
@pytest.mark.parametrize("target", ["nowhere/page.html", "folder"])
def test_what_cannot_be_written_is_said_before_the_work(
    fedtl, tmp_path: Path, command: str, target: str
) -> None:
    (tmp_path / "folder").mkdir()
    done = fedtl(command, "quickstart", "--html", str(tmp_path / target))
    assert done.returncode == 2
    assert not done.stdout
    assert "folder" in done.stderr

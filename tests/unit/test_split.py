"""``fedtl split``: counts, distances and warnings of known clients; what it prints; its files."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from fedtl.data.clients import ClientSplit
from fedtl.data.examples import Examples
from fedtl.scenario.schema import Scenario
from fedtl.split import (
    PAIRED_CLIENTS,
    class_counts,
    domain_warnings,
    heatmap,
    shown_cut,
    split_facts,
    spread_of,
)
from fedtl.types import Rows

SCENARIO = Scenario(name="made")


def rows_of(labels: Any, counts: Any, start: int) -> tuple[Rows, int]:
    """Consecutive rows for a table of counts [K, C]; writes their labels."""
    each = np.asarray(counts).sum(axis=1)
    total = int(each.sum())
    labels[start : start + total] = np.concatenate(
        [np.repeat(np.arange(len(row)), row) for row in counts] or [[]]
    )
    index = np.arange(start, start + total)
    return Rows(index, np.concatenate([[0], np.cumsum(each)]).astype(np.int64)), start + total


def facts_of(
    train: Any, test: Any, domains: Any = None, excluded: Any = (), scenario: Scenario = SCENARIO
) -> dict[str, Any]:
    """The facts of clients with these counts [K, C]."""
    train, test = np.asarray(train), np.asarray(test)
    num, num_classes = train.shape
    labels = np.zeros(int(train.sum() + test.sum()), np.int32)
    first, end = rows_of(labels, train, 0)
    second, _ = rows_of(labels, test, end)
    classes = tuple(f"class{i}" for i in range(num_classes))
    examples = Examples(labels, classes, "ab", features=np.zeros((len(labels), 1), np.float32))
    names = tuple(f"site-{i}" for i in range(num))
    split = ClientSplit(first, second, names, tuple(domains or [""] * num), tuple(excluded))
    return split_facts(scenario, examples, split)


def warned(train: Any, test: Any, *words: str, **options: Any) -> None:
    """Exactly one warning has all the words, and there is no other."""
    found = facts_of(train, test, **options)["warnings"]
    assert len(found) == 1, found
    assert all(word in found[0] for word in words), found


EVEN = np.full((4, 3), 20)


def test_facts_are_what_was_dealt() -> None:
    train, test = [[5, 0, 1], [40, 30, 30]], [[1, 0, 0], [9, 9, 9]]
    facts = facts_of(train, test, excluded=[("tiny", 1)])
    assert facts["train"] == train
    assert facts["test"] == test
    assert facts["clients"] == ["site-0", "site-1"]
    assert facts["excluded"] == [["tiny", 1]]
    assert set(facts["distances"]) == {"js", "hellinger", "emd"}
    emd = facts["distances"]["emd"]
    assert emd["pairs"]["max"] == emd["pairs"]["min"] == pytest.approx(5 / 6 - 0.4)
    assert emd["to_all"][0] == pytest.approx(5 / 6 - 45 / 106)
    json.dumps(facts, allow_nan=False)


def test_nothing_to_warn_of() -> None:
    facts = facts_of(EVEN, EVEN)
    assert facts["warnings"] == []
    assert facts["notes"] == []
    assert facts["distances"]["js"]["to_all"] == [0.0] * 4
    assert facts["distances"]["js"]["pairs"] == {"min": 0, "median": 0, "mean": 0, "max": 0}


def test_warnings_in_words() -> None:
    lacking = EVEN.copy()
    lacking[:3, 2] = 0
    five = lacking[[3, 0, 1, 2, 3]]
    warned(five, five, "3 of 5 clients (site-1, site-2, site-3) lack 1 of 3 classes")
    lacking[0, 1] = 0
    found = facts_of(lacking[[0, 3, 3]], lacking[[0, 3, 3]])["warnings"]
    assert "1 of 3 clients (site-0) lacks 2 of 3 classes" in found
    assert "1 of 3 clients (site-0) has training examples of one class only" in found
    small = EVEN.copy()
    small[0] = 3
    warned(small, EVEN, "1 of 4 clients (site-0) has fewer than 10 training examples")
    warned(EVEN, small // 3, "fewer than 8 test examples, too few for a verdict", "4 (Holm)")
    warned(EVEN * [[1], [1], [1], [25]], EVEN, "25 times", "site-3 1,500, site-0 60")
    warned(EVEN[:1], EVEN[:1], "there is one client (site-0)")
    warned(EVEN, EVEN, "1 client has too few examples", "left (2)", excluded=[("left", 2)])


def test_the_verdicts_level_decides_what_is_too_few() -> None:
    strict = Scenario(name="made", verdict={"level": 1e-12})
    assert (
        "fewer than 43 test examples" in facts_of(EVEN, EVEN // 2, scenario=strict)["warnings"][0]
    )
    assert 2 * 4 * 0.5**43 <= 1e-12 < 2 * 4 * 0.5**42


def test_classes_that_nobody_can_teach() -> None:
    train = np.c_[EVEN, [30, 0, 0, 0], [0, 0, 0, 0]]
    found = facts_of(train, EVEN[:, [0, 1, 2, 2, 2]])["warnings"]
    assert "no client has a training example of class4, though some are judged on it" in found
    assert "only one client has training examples of class3" in found
    assert any("are judged on classes without a training example" in line for line in found)


def test_domains_without_common_classes() -> None:
    counts = np.array([[5, 0, 0, 0], [0, 5, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
    domains = ["a", "b", "c", "mixed"]
    found = list(domain_warnings(domains, counts))
    assert found == ["domains without a class in common: a and b, a and c"]
    assert list(domain_warnings(["a", "a", "mixed", ""], counts)) == []


def test_empty_and_single_are_undefined_not_zero() -> None:
    assert spread_of(np.array([np.nan])) == dict.fromkeys(("min", "median", "mean", "max"))
    facts = facts_of([[3, 3]], [[20, 20]])
    assert facts["distances"]["js"]["pairs"]["max"] is None


def test_many_clients_are_sampled_and_that_is_said() -> None:
    generator = np.random.default_rng(0)
    train = generator.integers(1, 30, (PAIRED_CLIENTS + 50, 4))
    facts = facts_of(train, train)
    assert "300 of 350" in facts["notes"][0]
    assert len(facts["distances"]["js"]["to_all"]) == 350
    again = facts_of(train, train)
    assert again["distances"] == facts["distances"]


def test_counts_against_a_loop() -> None:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 5, 100).astype(np.int32)
    rows = Rows(generator.permutation(100)[:60], np.array([0, 0, 25, 60, 60]))
    found = class_counts(rows, labels, 5)
    for client in range(4):
        assert found[client].tolist() == [(labels[rows.of(client)] == c).sum() for c in range(5)]


def printed(facts: dict[str, Any], **options: Any) -> str:
    console = Console(file=io.StringIO(), width=100, **options)
    for line in heatmap(facts, console):
        console.print(line, soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_heatmap_has_plain_numbers_off_a_terminal_and_shades_on_one() -> None:
    facts = facts_of([[50, 0], [5, 1500]], [[9, 9], [1, 1]])
    plain = printed(facts)
    assert "\x1b" not in plain
    assert plain.splitlines()[1].split() == ["site-0", "50", "18", "50", "."]
    assert plain.splitlines()[2].split() == ["site-1", "1,505", "2", "5", "1500"]
    shaded = printed(facts, force_terminal=True, color_system="truecolor")
    assert "48;2;8;48;107" in shaded
    assert "1500" in shaded


def test_what_is_too_much_for_a_screen_is_added_up() -> None:
    train = np.arange(45 * 25).reshape(45, 25) + 1
    text = printed(facts_of(train, train))
    lines = text.splitlines()
    assert len(lines) == 1 + 40 + 1
    assert lines[0].endswith("+5 more")
    assert lines[1].split()[-1] == str(21 + 22 + 23 + 24 + 25)
    assert lines[-1].startswith("and 5 more clients with 25,325 to 27,825 training examples")
    narrow = printed(facts_of(train, train), force_terminal=True, color_system=None)
    assert max(map(len, narrow.splitlines())) <= 100


def test_names_are_cut_in_the_middle_and_made_printable() -> None:
    assert shown_cut("Greek/character01", 8) == "Gre~er01"
    assert shown_cut("a\x1b[31mb", 20) == "a?[31mb"
    assert len(shown_cut("x" * 50, 7)) == 7


def test_on_the_command_line_and_its_file_gives_the_same_clients(fedtl, small: Path) -> None:
    arguments = ("split", "small.toml", "--json", "--set", "clients.partition=dirichlet")
    done = fedtl(*arguments, "--write", "who.parquet")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert "client-0004" in done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("Next: "))
    again = fedtl(*shlex.split(line)[2:], "--out", "out")
    assert again.returncode == 0, again.stderr
    found = pd.read_parquet(small.parent / "out" / "clients.parquet")
    last = found[(found["round"] == 4) & (found["split"] == "test")].set_index("name")["examples"]
    assert last.to_dict() == {
        name: sum(row) for name, row in zip(facts["clients"], facts["test"], strict=True)
    }


def test_a_run_with_the_file_is_the_run_without(fedtl, small: Path) -> None:
    skewed = ("--set", "clients.partition=label_quantity", "--set", "clients.alpha=0.3")
    first = fedtl("run", "small.toml", *skewed, "--json", "--out", "first")
    assert first.returncode == 0, first.stderr
    assert fedtl("split", "small.toml", *skewed, "--write", "who.csv").returncode == 0
    by_file = ("--set", "clients.partition=file", "--set", "clients.split_file=who.csv")
    second = fedtl("run", "small.toml", *by_file, "--json", "--out", "second")
    assert second.returncode == 0, second.stderr
    one, two = json.loads(first.stdout), json.loads(second.stdout)
    assert one["final"] == two["final"]
    heads = [load_file(small.parent / run / "head.safetensors") for run in ("first", "second")]
    assert all((tensor == heads[1][name]).all() for name, tensor in heads[0].items())


def test_permuted_labels_are_told_of(fedtl, small: Path) -> None:
    done = fedtl("split", "small.toml", "--set", "shift.concept_fraction=0.4")
    assert "concept shift: 2 of 5 clients (client-000" in done.stdout
    done = fedtl("run", "small.toml", "--set", "shift.concept_fraction=0.4", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "labels permuted, in training and test" in done.stdout

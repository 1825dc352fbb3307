"""Comparisons: paired where they can be, refused where not, and seldom wrong where nothing is."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from fedtl.errors import InputError
from fedtl.listings import print_runs_compared
from fedtl.results.compare import compare_runs, differing_keys
from fedtl.results.paired import clients_test, seeds_test, unpaired_test
from fedtl.results.tables import read_run


@pytest.fixture(scope="module")
def runs(made_runs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a; b, better; c, as a; folders of seeds sa and sb, better."""
    path = tmp_path_factory.mktemp("runs")
    rate = {"training": {"learning_rate": 0.1}}
    made_runs.write_run(path / "a", rounds=2, gap=False)
    made_runs.write_run(path / "b", rounds=2, gap=False, better=0.1, scenario=rate)
    made_runs.write_run(path / "c", rounds=2, gap=False)
    for seed in range(5):
        place = f"seed-{seed}"
        made_runs.write_run(path / "sa" / place, rounds=2, gap=False, seed=seed)
        made_runs.write_run(path / "sb" / place, rounds=2, gap=False, seed=seed, better=0.05)
    return path


def test_clients_test_is_exact_for_few() -> None:
    d = np.array([0.1, 0.05, 0.2, -0.02, 0.07, 0.0])
    signs = np.array(list(itertools.product([1, -1], repeat=6)))
    slow = (np.abs((signs * d).mean(axis=1)) >= abs(d.mean()) - 1e-12).mean()
    found = clients_test(d, 0)
    assert found["difference"] == pytest.approx(d.mean())
    assert found["p"] == pytest.approx(slow)
    low, high = found["interval"]
    assert low < d.mean() < high


def test_seeds_test_is_the_paired_t_test() -> None:
    d = np.array([0.02, 0.03, 0.01, 0.05])
    found = seeds_test(d)
    expected = stats.ttest_1samp(d, 0)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert found["interval"] == pytest.approx(list(expected.confidence_interval(0.95)))
    same = seeds_test(np.zeros(3))
    assert same == {"difference": 0.0, "interval": None, "p": 1.0}
    assert seeds_test(np.full(3, 0.5))["p"] is None  # no spread to judge by


def test_nothing_is_seldom_taken_for_something() -> None:
    rng = np.random.default_rng(0)
    draws = 250
    bound = 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)
    clients = [clients_test(rng.normal(0, 0.05, 9), 0)["p"] for _ in range(draws)]
    assert np.mean(np.array(clients) <= 0.05) <= bound
    seeds = [seeds_test(rng.normal(0, 0.05, 4))["p"] for _ in range(draws)]
    assert np.mean(np.array(seeds) <= 0.05) <= bound


def test_intervals_of_few_clients_cover() -> None:
    rng = np.random.default_rng(2)
    draws = 250
    found = [clients_test(rng.normal(0, 0.05, 5), 0)["interval"] for _ in range(draws)]
    covered = np.mean([low <= 0 <= high for low, high in found])
    assert covered >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / draws)  # plain percentiles: 0.83


def test_nothing_is_seldom_taken_for_something_unpaired() -> None:
    rng = np.random.default_rng(1)
    found = [unpaired_test(rng.normal(size=4), rng.normal(size=5), 0)["p"] for _ in range(200)]
    assert np.mean(np.array(found) <= 0.05) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_a_better_run_is_found(runs: Path) -> None:
    facts = compare_runs([runs / "a", runs / "b"], allow_unlike=False).as_facts()
    (pair,) = facts["pairs"]
    own = [read_run(runs / name).own["accuracy"] for name in "ab"]
    assert pair["home"]["difference"] == pytest.approx((own[1] - own[0]).mean())
    assert pair["better"] + pair["worse"] + pair["equal"] == 12
    assert pair["says"].startswith("b is better than a by ")
    assert facts["differences"] == [{"key": "training.learning_rate", "values": [0.05, 0.1]}]
    assert any("run both with --seeds 5" in note for note in facts["notes"])
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_equal_runs_are_not_told_apart(runs: Path) -> None:
    facts = compare_runs([runs / "a", runs / "c"], allow_unlike=False).as_facts()
    (pair,) = facts["pairs"]
    assert pair["home"]["difference"] == 0
    assert pair["equal"] == 12
    assert "not enough evidence" in pair["says"]


def test_holm_goes_over_all_pairs(runs: Path) -> None:
    facts = compare_runs([runs / name for name in "abc"], allow_unlike=False).as_facts()
    p = [pair["home"]["p"] for pair in facts["pairs"]]
    assert len(p) == 3
    smallest = min(facts["pairs"], key=lambda pair: pair["home"]["p"])
    assert smallest["home"]["p_holm"] == pytest.approx(min(1, 3 * min(p)))


def test_seeds_are_the_evidence_where_there_are_several(runs: Path) -> None:
    facts = compare_runs([runs / "sa", runs / "sb"], allow_unlike=False).as_facts()
    (pair,) = facts["pairs"]
    assert (pair["unit"], pair["n"]) == ("seeds", 5)
    means = [
        [read_run(runs / name / f"seed-{s}").own["accuracy"].mean() for s in range(5)]
        for name in ("sa", "sb")
    ]
    assert pair["home"]["p"] == pytest.approx(stats.ttest_rel(means[1], means[0]).pvalue)
    assert pair["everywhere"]["p"] is not None
    assert facts["notes"] == []


def test_unlike_runs_are_refused_unless_told(
    runs: Path, made_runs: ModuleType, tmp_path: Path
) -> None:
    other = made_runs.write_run(
        tmp_path / "other", rounds=2, gap=False, scenario={"clients": {"partition": "shards"}}
    )
    with pytest.raises(InputError, match=r"differ in clients\.partition.*--allow-unlike"):
        compare_runs([runs / "a", other], allow_unlike=False)
    facts = compare_runs([runs / "a", other], allow_unlike=True).as_facts()
    assert not facts["pairs"][0]["paired"]
    assert "compared unpaired" in facts["notes"][0]
    with pytest.raises(InputError, match="seeds 0 against 3"):
        compare_runs([runs / "a", runs / "sa" / "seed-3"], allow_unlike=False)


@pytest.mark.parametrize("what", ["fingerprint", "names", "tests"])
def test_other_data_or_clients_are_unlike(
    what: str, runs: Path, made_runs: ModuleType, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    other = made_runs.write_run(tmp_path / "other", rounds=2, gap=False)
    if what == "fingerprint":
        summary = json.loads((other / "summary.json").read_text())
        summary["data"]["fingerprint"] = "00" * 32
        (other / "summary.json").write_text(json.dumps(summary))
    else:
        table = pq.read_table(other / "clients.parquet")
        name = "name" if what == "names" else "examples"
        values = [f"x{v}" if what == "names" else v + 1 for v in table[name].to_pylist()]
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
        pq.write_table(table, other / "clients.parquet")
    with pytest.raises(InputError, match=r"not the same|no client in common|other test examples"):
        compare_runs([runs / "a", other], allow_unlike=False)


def test_keys_an_older_version_did_not_write_are_no_difference(runs: Path) -> None:
    new = read_run(runs / "a").scenario
    old = {"name": "made", "seed": 0, "rounds": 2}
    assert differing_keys([new, old]) == []
    assert differing_keys([new, {**old, "clients": {"alpha": 0.1}}]) == [
        {"key": "clients.alpha", "values": [0.5, 0.1]}
    ]


def test_fewer_than_two_runs(runs: Path) -> None:
    with pytest.raises(InputError, match="nothing to be compared with"):
        compare_runs([runs / "a"], allow_unlike=False)


def test_the_same_run_twice_has_two_names(runs: Path) -> None:
    facts = compare_runs([runs / "a", runs / "a"], allow_unlike=False).as_facts()
    assert [run["name"] for run in facts["runs"]] == ["a (1)", "a (2)"]


def test_few_clients_are_not_enough(made_runs: ModuleType, tmp_path: Path) -> None:
    for name, better in (("a", 0.0), ("b", 0.2)):
        made_runs.write_run(tmp_path / name, clients=4, rounds=2, gap=False, better=better)
    facts = compare_runs([tmp_path / "a", tmp_path / "b"], allow_unlike=False).as_facts()
    assert facts["pairs"][0]["home"]["p"] >= 0.125  # 2 of 16 orders of signs
    assert "not enough evidence" in facts["pairs"][0]["says"]


def test_an_interrupted_run_is_compared_as_far_as_it_went(
    runs: Path, made_runs: ModuleType, tmp_path: Path
) -> None:
    cut = made_runs.write_run(tmp_path / "cut", rounds=2, gap=False, better=0.1)
    (cut / "summary.json").unlink()
    text = (cut / "scenario.toml").read_text()
    (cut / "scenario.toml").write_text(text.replace("rounds = 2", "rounds = 9"))
    facts = compare_runs([runs / "a", cut], allow_unlike=False).as_facts()
    assert facts["runs"][1]["interrupted"]
    assert any("cut was interrupted at round 2 of 9" in note for note in facts["notes"])
    assert facts["pairs"][0]["home"]["difference"] > 0


def test_printed(runs: Path) -> None:
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    paths = [runs / "a", runs / "b"]
    print_runs_compared(console, compare_runs(paths, allow_unlike=False).as_facts())
    console.file.close()
    text = console.export_text()
    assert "training.learning_rate: 0.05, 0.1" in text
    assert "b and a: b is better than a by" in text

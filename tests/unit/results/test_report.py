"""What a page says is what the tables hold."""

from __future__ import annotations

import json
import math
import shutil
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from fedtl.errors import InputError
from fedtl.results import answer, gaps, provenance, report
from fedtl.results.evenness import evenness
from fedtl.results.page import run_page
from fedtl.results.privacy import privacy
from fedtl.results.tables import read_run

ROUND = 8


def rows_of(made: Path, split: str) -> list[dict[str, Any]]:
    rows = pq.read_table(made / "clients.parquet").to_pylist()
    return [row for row in rows if row["split"] == split and row["round"] == ROUND]


def test_interval_of_a_paired_difference_by_hand() -> None:
    # n = 50, 9 wins, 3 losses: p = 10/52, q = 4/52
    low, high = report.paired_interval(9, 3, 50)
    half = 1.959963984540054 * math.sqrt((14 / 52 - (6 / 52) ** 2) / 52)
    assert low == pytest.approx(6 / 52 - half, abs=1e-12)
    assert high == pytest.approx(6 / 52 + half, abs=1e-12)
    turned = report.paired_interval(3, 9, 50)
    assert turned[0] == pytest.approx(-high)
    assert turned[1] == pytest.approx(-low)
    assert np.isnan(report.paired_interval(math.nan, 3, 50)[0])


@pytest.mark.parametrize(("p", "q", "n"), [(0.05, 0.05, 40), (0.2, 0.1, 60), (0.02, 0.1, 200)])
def test_interval_of_a_paired_difference_covers(p: float, q: float, n: int) -> None:
    drawn = np.random.default_rng(0).multinomial(n, [p, q, 1 - p - q], 4000)
    low, high = report.paired_interval(drawn[:, 0], drawn[:, 1], n)
    covered = ((low <= p - q) & (p - q <= high)).mean()
    assert covered >= 0.94  # 0.95 less three standard errors of 4000 draws


def test_evenness_in_closed_form() -> None:
    one = np.ones(4, int)
    same = evenness(np.full(4, 0.4), one)
    assert same["jain"] == pytest.approx(1)
    assert same["entropy"] == pytest.approx(1)
    assert same["spread"] == pytest.approx(0)
    alone = evenness(np.array([0.0, 0.0, 0.9, 0.0]), one)
    assert alone["jain"] == pytest.approx(1 / 4)
    assert alone["entropy"] == pytest.approx(0)
    assert alone["worst_decile"] == 0
    half = evenness(np.array([0.5, 0.5, 0.0, 0.0]), one)
    assert half["jain"] == pytest.approx(1 / 2)
    assert half["entropy"] == pytest.approx(math.log(2) / math.log(4))
    assert set(evenness(np.empty(0), one[:0]).values()) == {None}
    nothing = evenness(np.zeros(3), one[:3])
    assert nothing["jain"] is nothing["entropy"] is None
    assert evenness(np.array([0.5]), one[:1])["entropy"] is None


def test_weights_are_repeated_clients() -> None:
    accuracy, weights = np.array([0.2, 0.9, 0.5]), np.array([3, 1, 17])
    repeated = np.repeat(accuracy, weights)
    assert evenness(accuracy, weights) == pytest.approx(evenness(repeated, np.ones(21, int)))


def test_heads_are_those_of_a_slow_loop(made: Path) -> None:
    found = {row["head"]: row for row in report.heads(read_run(made))}
    for head, column in (("federated", "accuracy"), ("local_only", "local_only_accuracy")):
        own = [row for row in rows_of(made, "test") if row[column] is not None]
        right = sum(row[column] * row["examples"] for row in own)
        assert found[head]["home"] == pytest.approx(right / sum(row["examples"] for row in own))
        each = sorted(row[column] for row in own)
        assert found[head]["mean"] == pytest.approx(sum(each) / len(each))
        assert found[head]["worst"] == pytest.approx(sum(each[:2]) / 2)  # ceil of 1.2 clients
        far = [row[column] for row in rows_of(made, "everyone") if row[column] is not None]
        assert found[head]["everywhere"] == pytest.approx(sum(far) / len(far))


def test_client_frame(made: Path) -> None:
    frame = report.client_frame(read_run(made)).set_index("client")
    for row in rows_of(made, "test")[1:]:
        mine = frame.loc[row["client"]]
        difference = row["accuracy"] - row["local_only_accuracy"]
        assert mine["difference"] == pytest.approx(difference)
        assert mine["low"] <= difference <= mine["high"]
        assert mine["tuned"] == row["personal_accuracy"]
        assert mine["train"] == 4 * mine["test"]
    undefined = frame.loc[0]  # has no head of its own
    assert undefined[["alone", "difference", "low", "high", "p_holm"]].isna().all()


def test_home_and_everywhere_over_the_same_clients(made: Path) -> None:
    found = report.at_home_and_everywhere(read_run(made))
    own = rows_of(made, "test")[1:]
    total = sum(row["examples"] for row in own)
    home = [
        sum(row[name] * row["examples"] for row in own) / total
        for name in ("accuracy", "local_only_accuracy", "personal_accuracy")
    ]
    first, second, third = found["sentences"]
    assert report.percent(home[0]) in first
    assert report.percent(home[1]) in first
    assert report.points(home[0] - home[1]) in first
    assert "42.0" in second
    assert report.points(home[2] - home[0]) in third
    assert "opposite" in found["opposite"]


def test_no_opposite_answers_where_one_is_within_noise(made: Path, tmp_path: Path) -> None:
    other = shutil.copytree(made, tmp_path / "other")
    summary = json.loads((other / "summary.json").read_text())
    summary["verdict"] |= {"home": {"outcome": "none"}, "everyone": {"outcome": "gain"}}
    (other / "summary.json").write_text(json.dumps(summary))
    assert report.at_home_and_everywhere(read_run(other))["opposite"] is None


def test_answer_counts_and_headline(made: Path) -> None:
    found = answer.verdict(read_run(made))
    assert found["headline"] == (
        "3 of 12 should join, 3 should personalise and 3 should stay alone; "
        "for 3 there is not enough evidence."
    )
    assert [one["count"] for one in found["counts"]] == [3, 3, 3, 3]
    assert "McNemar" in found["basis"]
    assert "at least 1 percentage" in found["basis"]
    # Holm's correction is over the clients of one question, and there are three
    assert "at home, everywhere and for tuned models, each by itself" in found["basis"]


def test_without_references_there_is_no_verdict(made_runs: ModuleType, tmp_path: Path) -> None:
    run = read_run(made_runs.write_run(tmp_path / "run", references=False, gap=False))
    assert "No verdict" in answer.verdict(run)["headline"]
    assert report.at_home_and_everywhere(run)["sentences"] == []
    assert report.forgetting(run) is None
    (what, command), (_, gap) = answer.state(run)["missing"]
    assert "alone, pooled, shared, then tuned" in what
    assert command.startswith("fedtl run run/scenario.toml --set 'evaluation.references=[")
    assert gap == "fedtl report run --gap"


def test_forgetting_names_who_loses_most(made: Path) -> None:
    found = report.forgetting(read_run(made))
    assert found is not None
    lost = [r["accuracy"] - r["personal_accuracy"] for r in rows_of(made, "everyone")[1:]]
    assert found["mean"] == pytest.approx(sum(lost) / len(lost))


def test_classes_and_domains(made: Path) -> None:
    run = read_run(made)
    rows = pq.read_table(made / "classes.parquet").to_pylist()
    for found in report.by_class(run):
        mine = [row for row in rows if row["class"] == found["class"]]
        assert found["train"] == sum(row["train"] for row in mine)
        assert found["recall"] == sum(r["correct"] for r in mine) / sum(r["test"] for r in mine)
        assert found["holders"] == sum(row["train"] > 0 for row in mine)
    own = [row for row in rows_of(made, "test") if row["domain"] == "cartoon"]
    cartoon = next(row for row in report.by_domain(run) if row["domain"] == "cartoon")
    right = sum(row["accuracy"] * row["examples"] for row in own)
    assert cartoon["federated"] == pytest.approx(right / sum(row["examples"] for row in own))


def test_many_holders_are_summed_by_domain(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(made)
    one = report.who_has_what(run)
    assert one is not None
    assert (len(one["rows"]), one["by"]) == (12, "client")
    monkeypatch.setattr(report, "CELLS_MOST", 20)
    summed = report.who_has_what(run)
    assert summed is not None
    assert summed["by"] == "domain"
    assert sum(map(sum, summed["values"])) == sum(map(sum, one["values"]))


def test_rank_correlation_is_spearmans(made: Path) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=7), rng.normal(size=7)
    y[2] = y[4]  # a tie
    found = gaps.rank_correlation(x, y, 0)
    assert found["r"] == pytest.approx(stats.spearmanr(x, y)[0])
    assert found["low"] < found["r"] < found["high"]
    slow = [
        abs(stats.spearmanr(x, [y[i] for i in order])[0]) >= abs(found["r"]) - 1e-12
        for order in list(permutations(range(7)))[::40]
    ]
    assert found["p"] == pytest.approx(np.mean(slow), abs=0.13)  # 126 of the 5,040 orders


def test_rank_correlation_is_seldom_found_where_there_is_none() -> None:
    rng = np.random.default_rng(0)
    found = [
        gaps.rank_correlation(rng.normal(size=6), rng.normal(size=6), 0)["p"] for _ in range(400)
    ]
    rate = np.mean(np.array(found) <= 0.05)
    assert rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


def test_rank_correlation_is_undefined_of_few_or_constant() -> None:
    few = gaps.rank_correlation(np.arange(4.0), np.arange(4.0), 0)
    assert few["n"] == 4
    assert math.isnan(few["p"])
    assert math.isnan(gaps.rank_correlation(np.ones(9), np.arange(9.0), 0)["r"])
    perfect = gaps.rank_correlation(np.arange(6.0), -np.arange(6.0), 0)
    assert perfect["r"] == pytest.approx(-1)
    assert perfect["p"] == pytest.approx(2 / 720)


def test_distance_to_the_rest_falls_back_on_the_pairs() -> None:
    gap = {"clients": ["a", "b", "c"], "pairs": {"js": [[0, 1, 3], [1, 0, None], [3, None, 0]]}}
    assert gaps.to_the_rest(gap, "js").tolist() == [2.0, 1.0, 3.0]
    assert np.isnan(gaps.to_the_rest(gap, "coral")).all()
    rest = {**gap, "rest": {"js": [0.1, None, 0.3]}}
    assert gaps.to_the_rest(rest, "js")[0] == 0.1
    assert np.isnan(gaps.to_the_rest(rest, "js")[1])


def test_a_gap_that_predicts_the_gain_is_said_to(made: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made, tmp_path / "run")
    frame = report.client_frame(read_run(run))
    gap = json.loads((run / "gap.json").read_text())
    gap["rest"]["coral"] = [None if math.isnan(d) else 1 - d for d in frame["difference"]]
    (run / "gap.json").write_text(json.dumps(gap))
    found = gaps.gap_and_gain(read_run(run))
    assert found is not None
    assert "CORAL: clients further from the others gain less" in found["sentence"]
    assert "Not enough evidence" in gaps.gap_and_gain(read_run(made))["sentence"]  # type: ignore[index]


def test_privacy_says_what_leaves(made: Path, made_runs: ModuleType, tmp_path: Path) -> None:
    found = privacy(read_run(made))
    assert "without a limit" in " ".join(found["could"])
    assert found["card"] is None
    assert found["audit_command"] == f"fedtl audit {made.name}"
    assert found["per_answer"] == "1,000 bytes"
    assert "weight" in found["sent"][0]
    sums = made_runs.write_run(tmp_path / "sums", scenario={"strategy": {"name": "fed3r"}})
    assert "sums over" in privacy(read_run(sums))["sent"][0]


PROMISE = {
    "mechanism": "central",
    "unit": "client",
    "epsilon": 2.5,
    "delta": 1e-5,
    "noise_multiplier": 1.0,
    "noise_at": "clients",
    "assumptions": ["the coins of the cohorts stay secret"],
    "secure_aggregation": {"protocol": "secagg", "threshold": 4},
    "min_class_examples": 3,
}
AUDIT = {
    "format": 1,
    "unit": "client",
    "upper": 2.5,
    "lower": {
        "epsilon": 0.75,
        "confidence": 0.95,
        "method": "one run",
        "canaries": 100,
        "guesses": 40,
        "correct": 31,
        "note": None,
    },
    "membership": [
        {
            "attack": "loss",
            "auc": 0.61,
            "tpr_at_0.1%": 0.01,
            "tpr_at_1%": None,
            "members": 80,
            "nonmembers": 20,
            "note": None,
        }
    ],
    "leakage": [{"what": "labels", "clients": 3, "found": "off by 12", "note": None}],
    "warnings": [],
    "notes": [],
}


def private_run(made: Path, place: Path, **audit: object) -> Path:
    run = shutil.copytree(made, place)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "epsilon": 2.5, "privacy": PROMISE}))
    if audit:
        (run / "audit.json").write_text(json.dumps({**AUDIT, **audit}))
    return run


def test_promise_and_attack_stand_on_one_card(made: Path, tmp_path: Path) -> None:
    found = privacy(read_run(private_run(made, tmp_path / "run", format=1)))
    assert (found["card"]["upper"], found["card"]["lower"]) == ("2.5", "0.75")
    assert not found["card"]["shouted"]
    assert "31 of 40 guesses" in found["card"]["lower_words"]
    assert found["could"][1] == "the sum of the clients' messages of a round"
    assert "at least 4 clients" in " ".join(found["could_not"])
    assert "under 3" in " ".join(found["sent"])
    page = run_page(read_run(tmp_path / "run"))
    assert "31 of 40" in page
    assert "coins of the cohorts" in page


def test_noise_at_the_server_bounds_nothing_for_the_server(made: Path, tmp_path: Path) -> None:
    run = private_run(made, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    open_sums = {**PROMISE, "noise_at": "server", "secure_aggregation": None}
    (run / "summary.json").write_text(json.dumps({**summary, "privacy": open_sums}))
    found = privacy(read_run(run))
    assert "without a limit" in " ".join(found["could"])
    assert "epsilon" not in " ".join(found["could_not"])
    assert found["card"]["upper"] == "2.5"  # for whoever sees the model


def test_what_is_sent_is_what_the_answer_holds(made: Path, tmp_path: Path) -> None:
    found = privacy(read_run(private_run(made, tmp_path / "run")))
    assert "told without noise" in " ".join(found["sent"])
    assert "mean loss" in " ".join(found["sent"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["privacy"]["leaves"] = [{"tensor": "ring.values", "shape": [9], "dtype": "uint32"}]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert "loss" not in " ".join(privacy(read_run(tmp_path / "run"))["sent"])


def test_a_bound_of_zero_proves_nothing(made: Path, tmp_path: Path) -> None:
    lower = {**AUDIT["lower"], "epsilon": 0.0, "note": "with 9 pairs no more than 1"}  # type: ignore[dict-item]
    found = privacy(read_run(private_run(made, tmp_path / "run", lower=lower)))["card"]
    assert "proved nothing" in found["lower_words"]
    assert "confidence" not in found["lower_words"]
    assert "92.4 of 100" in found["odds"]  # e^2.5 / (1 + e^2.5)
    assert "with 9 pairs" in run_page(read_run(tmp_path / "run"))


def test_more_found_than_promised_is_shouted(made: Path, tmp_path: Path) -> None:
    lower = {**AUDIT["lower"], "epsilon": 3.0}  # type: ignore[dict-item]
    page = run_page(read_run(private_run(made, tmp_path / "run", lower=lower)))
    assert "More was found than was promised" in page


def test_a_damaged_audit_is_said_to_be_one(made: Path, tmp_path: Path) -> None:
    run = private_run(made, tmp_path / "run", membership=[{"attack": 3}])
    with pytest.raises(InputError, match="is damaged") as caught:
        read_run(run)
    assert "fedtl audit" in (caught.value.do or "")
    other = private_run(made, tmp_path / "other", format=2)
    assert read_run(other).audit is None


def test_paths_of_this_machine_stay_here(made_runs: ModuleType, tmp_path: Path) -> None:
    data = {"source": "folder", "path": "/home/somebody/patients"}
    run = read_run(made_runs.write_run(tmp_path / "run", scenario={"data": data}))
    settings = dict(provenance.reproduce(run)["scenario"])
    assert settings["data.path"] == "patients"
    assert "somebody" not in json.dumps(provenance.reproduce(run))


def test_warnings(made: Path) -> None:
    found = provenance.warnings(read_run(made))
    assert "1 answer of a client was not used: <i>answered late</i>." in found
    assert any("fewer than 30 test examples" in warning for warning in found)


def test_bytes_in_words() -> None:
    assert provenance.bytes_text(0) == "0 bytes"
    assert provenance.bytes_text(1536) == "1.5 KiB"
    assert provenance.bytes_text(None) == "undefined"


def test_a_model_whose_part_stays_at_home_is_called_that(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run")
    summary = json.loads((made / "summary.json").read_text())
    kept = {**summary, "personal": summary["final"]}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(kept))
    titles = [[row["title"] for row in report.heads(read_run(p))] for p in (made, tmp_path / "run")]
    assert titles[0][:2] == ["Shared", "Personal"]
    assert titles[1][0] == "Shared in part"
    assert titles[1][1:] == titles[0][2:]
    first = [
        report.at_home_and_everywhere(read_run(path))["sentences"][0]
        for path in (made, tmp_path / "run")
    ]
    assert [sentence == report.NO_SHARED_MODEL for sentence in first] == [False, True]

"""The audit end to end: it finds what leaks, stays below what is promised, and refuses the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from fedtl.audit import audit_run
from fedtl.audit.bounds import split_coins
from fedtl.audit.reopened import reopen
from fedtl.errors import InputError
from fedtl.interrupts import Interrupts
from fedtl.results.audit_file import is_whole

CANARIES = "privacy.canaries=120"


def run_audit(path: Path) -> dict[str, Any]:
    return audit_run(path, Console(quiet=True), Interrupts())


@pytest.mark.parametrize(
    "settings",
    [
        (CANARIES,),
        (CANARIES, "strategy.name=fed3r"),
        (CANARIES, "strategy.name=fedncm", "privacy.canary_labels=random"),
        (CANARIES, "head.kind=mlp", "head.hidden=[64]", "rounds=10"),
        (CANARIES, "privacy.mechanism=example", "privacy.noise_multiplier=0", "privacy.clip=5"),
        (
            CANARIES,
            "strategy.name=fed3r",
            "rounds=1",
            "privacy.mechanism=release",
            "privacy.noise_multiplier=0",
            "privacy.clip=20",
        ),
    ],
    ids=lambda settings: " ".join(settings[1:]) or "fedavg",
)
def test_a_leak_is_found_where_there_is_no_noise(
    audited: Callable[..., Any], settings: tuple[str, ...]
) -> None:
    summary, facts, text = audited(*settings)
    lower = facts["lower"]
    assert summary["epsilon"] is facts["upper"] is None
    assert facts["unit"] == "example"
    assert lower["canaries"] == 120
    assert lower["epsilon"] > 1.5
    assert lower["correct"] >= 0.9 * lower["guesses"]
    assert facts["membership"][0]["auc"] > 0.6
    assert any("nothing was promised" in warning for warning in facts["warnings"])
    assert is_whole(facts)
    assert "epsilon at least" in text


@pytest.mark.parametrize(
    "settings",
    [
        ("privacy.mechanism=example", "privacy.clip=5"),
        ("strategy.name=fed3r", "rounds=1", "privacy.mechanism=release", "privacy.clip=20"),
        ("strategy.name=fedncm", "rounds=1", "privacy.mechanism=release", "privacy.clip=20"),
    ],
    ids=" ".join,
)
def test_with_noise_no_more_is_shown_than_was_promised(
    audited: Callable[..., Any], settings: tuple[str, ...]
) -> None:
    promised, facts, _ = audited(CANARIES, "privacy.epsilon=0.5", *settings)
    assert promised["epsilon"] == pytest.approx(0.5, rel=0.02)
    assert facts["upper"] == promised["epsilon"]
    assert facts["lower"]["epsilon"] <= promised["epsilon"]
    assert facts["lower"]["correct"] < 0.9 * facts["lower"]["guesses"]
    assert not any("PROMISE" in warning for warning in facts["warnings"])


def test_clients_as_canaries_are_too_few_and_it_is_said(audited: Callable[..., Any]) -> None:
    _, facts, _ = audited(
        "privacy.canaries=5",
        "privacy.mechanism=central",
        "privacy.noise_multiplier=1.0",
        "strategy.weighting=uniform",
    )
    assert facts["unit"] == "client"
    assert facts["lower"]["canaries"] == 5
    assert "too few" in facts["lower"]["note"]
    assert facts["lower"]["epsilon"] <= facts["upper"]


@pytest.mark.parametrize("strategy", ["fedavg", "fed3r"])
def test_every_run_has_pairs(audited: Callable[..., Any], strategy: str) -> None:
    _, facts, _ = audited(f"strategy.name={strategy}")
    lower = facts["lower"]
    assert "pairs" in lower["method"]
    assert 40 < lower["canaries"] <= 72
    assert lower["epsilon"] > 0.7  # half of what so many single canaries would show
    assert "two neighbours apart" in lower["note"]


def test_a_bound_above_the_promise_is_shouted(make_run: Callable[..., Any]) -> None:
    path, summary = make_run(CANARIES)
    summary["epsilon"] = 0.1
    (path / "summary.json").write_text(json.dumps(summary))
    assert any("PROMISE IS BROKEN" in warning for warning in run_audit(path)["warnings"])


def test_heads_that_never_saw_the_data_show_nothing(make_run: Callable[..., Any]) -> None:
    """Attack by loss at chance, and no bound, whatever the head is: 200 of them."""
    from dataclasses import replace

    from fedtl.audit.coins import Directions, best_guess
    from fedtl.audit.scores import confidences_of
    from fedtl.privacy.membership import attack_facts, losses
    from fedtl.privacy.one_run import audited as bounded

    path, _ = make_run()
    run = reopen(path)
    coins, rng = split_coins(run), np.random.default_rng(0)
    z = np.pad(run.trained.features[coins.rows].astype(float), ((0, 0), (0, 1)))
    push = rng.normal(size=(len(z), 3))
    directions = Directions.of(z, push, coins)
    members, others = run.trained.train.index, run.trained.test.index
    bounds, inside = [], []
    for _ in range(200):
        head = {
            "weight": rng.normal(size=(3, 200)).astype(np.float32),
            "bias": np.zeros(3, np.float32),
        }
        scores = best_guess(directions, np.pad(head["weight"].astype(float), ((0, 0), (0, 1))))
        fallen = rng.random(len(coins)) < 0.5
        bounds.append(bounded(scores, replace(coins, inside=fallen).inside, delta=0, pairs=True))
        sides = (-losses(confidences_of(head, run.trained, rows)) for rows in (members, others))
        facts = attack_facts("loss", *sides)
        inside.append(abs(facts["auc"] - 0.5) <= facts["chance"])
    assert np.mean([bound.epsilon == 0 for bound in bounds]) >= 0.95
    assert np.mean(inside) >= 0.9


def test_what_is_sent_is_attacked_before_and_after_protection(
    audited: Callable[..., Any],
) -> None:
    local = ("privacy.mechanism=local", "privacy.noise_multiplier=5", "strategy.weighting=uniform")
    _, facts, _ = audited(*local, "training.local_epochs=1", "training.batch_size=1000")
    before, after = facts["leakage"]
    assert "before protection" in before["what"]
    assert "as sent" in after["what"]
    assert before["value"] < 1e-4
    assert after["value"] > 0.05


def test_under_secure_aggregation_only_the_sum_is_seen(audited: Callable[..., Any]) -> None:
    _, facts, _ = audited("privacy.secure_aggregation=arithmetic")
    assert all("before protection" in fact["what"] for fact in facts["leakage"])
    assert any("the sum over 6 clients only" in note for note in facts["notes"])


def test_statistics_give_away_single_examples(audited: Callable[..., Any]) -> None:
    _, facts, _ = audited("strategy.name=fedncm", "clients.num=40")
    found = {fact["what"].split(",")[0]: fact for fact in facts["leakage"]}
    assert found["how many examples of each class a client has"]["value"] == 0
    assert found["the features of the only example of a class"]["value"] == 1


def test_a_given_split_has_no_coins(make_run: Callable[..., Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 100)
    split = np.where(rng.random(100) < 0.3, "test", "train")
    np.savez(tmp_path / "given.npz", x=rng.normal(size=(100, 5)), y=y, split=split)
    path, _ = make_run(f"data.path={tmp_path / 'given.npz'}")
    facts = run_audit(path)
    assert facts["lower"]["epsilon"] is None
    assert "own split" in facts["lower"]["note"]
    assert is_whole(facts)


def test_an_audit_is_repeated_to_the_digit_and_mends_a_damaged_file(
    make_run: Callable[..., Any],
) -> None:
    path, _ = make_run("strategy.name=fed3r")
    first = run_audit(path)
    (path / "audit.json").write_bytes(b"{broken")
    again = run_audit(path)
    assert json.loads((path / "audit.json").read_text()) == again
    assert {**first, "seconds": 0} == {**again, "seconds": 0}


class TestRefused:
    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="not a run folder"):
            run_audit(tmp_path)
        with pytest.raises(InputError, match="not a run folder"):
            run_audit(tmp_path / "nowhere")

    def test_unfinished(self, make_run: Callable[..., Any]) -> None:
        path, _ = make_run()
        (path / "summary.json").unlink()
        with pytest.raises(InputError, match="not finished"):
            run_audit(path)
        assert not (path / "audit.json").exists()

    def test_real_clients(self, make_run: Callable[..., Any]) -> None:
        path, _ = make_run()
        (path / "party.json").write_text("{}")
        with pytest.raises(InputError, match="real clients"):
            run_audit(path)

    def test_other_data(self, make_run: Callable[..., Any], tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        data = tmp_path / "moving.npz"
        np.savez(data, x=rng.normal(size=(90, 5)), y=rng.integers(0, 2, 90))
        path, _ = make_run(f"data.path={data}")
        np.savez(data, x=rng.normal(size=(90, 5)), y=rng.integers(0, 2, 90))
        with pytest.raises(InputError, match="not those that the run was made with"):
            run_audit(path)
        data.unlink()
        with pytest.raises(InputError):
            run_audit(path)

    def test_another_or_a_damaged_head(self, make_run: Callable[..., Any]) -> None:
        path, _ = make_run()
        head = load_file(path / "head.safetensors")
        save_file({**head, "bias": head["bias"] + 1}, path / "head.safetensors")
        with pytest.raises(InputError, match="not the head"):
            run_audit(path)
        (path / "head.safetensors").write_bytes(b"damaged")
        with pytest.raises(InputError, match="missing or damaged"):
            run_audit(path)

    def test_a_damaged_summary(self, make_run: Callable[..., Any]) -> None:
        path, _ = make_run()
        (path / "summary.json").write_text("{")
        with pytest.raises(InputError, match="damaged"):
            run_audit(path)

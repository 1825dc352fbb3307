"""``fedtl privacy``: the figures are the promise's, told in words, before any data are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.cli import run_command
from fedtl.privacy.accounting import Release, epsilon_of

BASE = """
name = "made"
rounds = 10
[data]
source = "arrays"
path = "{path}"
[backbone]
name = "identity"
[clients]
num = {num}
fraction = 0.5
[strategy]
name = "{strategy}"
"""


@pytest.fixture
def made(tmp_path: Path):
    def write(strategy: str = "fedavg", num: int = 20, examples: int = 0) -> str:
        data, path = tmp_path / "x.npz", tmp_path / "made.toml"
        if examples:
            stream = np.random.default_rng(0)
            labels = np.arange(examples) % 3
            x = stream.normal(size=(examples, 4)).astype(np.float32)
            np.savez(data, x=x, y=labels)
        path.write_text(BASE.format(path=data, num=num, strategy=strategy))
        return str(path)

    return write


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """What the command gives as JSON, and what it tells people."""
    assert run_command(["privacy", *arguments, "--json"]) == 0
    out, told = capsys.readouterr()
    return json.loads(out), " ".join(told.split())  # as it reads, however it is wrapped


def settings(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


CENTRAL = settings("privacy.mechanism=central", "strategy.weighting=uniform")


def test_a_promise_before_any_data_are_there(made, capsys) -> None:
    facts, told = planned(capsys, made(), *CENTRAL, *settings("privacy.noise_multiplier=1.5"))
    exact = epsilon_of([Release(1.5, 10, "poisson", 0.5)], 1e-5)
    assert facts["epsilon"] == exact
    assert facts["epsilon_against_server"] is None
    assert (facts["mechanism"], facts["unit"], facts["accountant"]) == ("central", "client", "pld")
    assert facts["noise_in_mean"] == 1.5 / 10
    assert facts["clients_counted"] is False
    assert facts["only_if_set"] is False
    assert facts["curve"][0]["round"] == 1
    assert facts["curve"][-1] == {"round": 10, "epsilon": exact}
    noises = [row["noise_multiplier"] for row in facts["noise_for"]]
    assert noises == sorted(noises, reverse=True)
    at_8 = facts["noise_for"][-1]["noise_multiplier"]
    assert epsilon_of([Release(at_8, 10, "poisson", 0.5)], 1e-5) <= 8
    assert facts["worst"]["all"]
    for words in (
        f"epsilon {exact:.4g} (delta 1e-05)", "all the data of one client", "by a coin (0.5)",
        "multiplier 1.5, clip 1", "against it nothing is bounded", "stays secret", "after round",
        "Next: fedtl run",
    ):  # fmt: skip
        assert words in told


def test_the_command_line_has_the_last_word(made, capsys) -> None:
    own = [made(), *CENTRAL, *settings("privacy.epsilon=8")]
    facts, _ = planned(capsys, *own, "--epsilon", "3")
    assert 2.98 < facts["epsilon"] <= 3
    facts, _ = planned(capsys, *own, "--noise", "4.0")
    assert facts["noise_multiplier"] == 4.0
    facts, told = planned(capsys, *own, "--noise", "0")
    assert facts["epsilon"] is None
    assert facts["curve"][-1]["epsilon"] is None
    assert "there is no noise, so nothing is promised" in told
    _, told = planned(capsys, *own, "--noise", "4")
    again = told[told.index("Next: fedtl run ") :].split("fedtl run ")[1].split()
    facts, _ = planned(capsys, *again)  # as it says
    assert facts["noise_multiplier"] == 4.0


def test_without_a_mechanism_it_says_what_could_be(made, capsys) -> None:
    facts, told = planned(capsys, made())
    assert facts["only_if_set"]
    assert facts["epsilon"] is facts["noise_multiplier"] is None
    assert facts["noise_for"][-1]["noise_multiplier"] > 0
    assert "privacy.mechanism is not set" in told
    assert "--set privacy.mechanism=central --set privacy.epsilon=8" in told
    assert "--set strategy.weighting=uniform" in told
    facts, told = planned(capsys, made(), "--epsilon", "2")
    assert facts["epsilon"] <= 2
    assert "if it were set" in told
    facts, told = planned(capsys, made("fed3r"))
    assert (facts["mechanism"], facts["unit"], facts["rounds"]) == ("release", "client", 1)


def test_an_amount_goes_with_a_mechanism_on_the_command_line(made, capsys) -> None:
    facts, told = planned(capsys, made(), *CENTRAL, "--epsilon", "4")
    assert 0 < facts["epsilon"] <= 4
    assert told.endswith("--set privacy.epsilon=4")
    own = [made(), *CENTRAL, *settings("privacy.noise_multiplier=9")]
    facts, told = planned(capsys, *own, "--epsilon", "4")
    assert 0 < facts["epsilon"] <= 4
    assert "noise_multiplier=9" not in told
    assert run_command(["privacy", made(), *CENTRAL, "--epsilon", "0"]) == 2
    assert "--epsilon: there is no such amount" in capsys.readouterr().err
    facts, told = planned(capsys, made(), *settings("privacy.mechanism=none"))
    assert told.count("--set privacy.mechanism=") == 1


def test_what_stands_in_the_way_is_told(made, capsys) -> None:
    facts, told = planned(capsys, made("median"), "--noise", "1")
    assert "sorts single updates" in facts["in_the_way"][0]
    assert "in the way" in told
    assert "Next" not in told
    assert run_command(["privacy", made(), "--set", "privacy.mechanism=central"]) == 2
    assert "neither epsilon nor noise_multiplier" in capsys.readouterr().err


def test_sums_under_masks(made, capsys) -> None:
    own = settings("privacy.noise_multiplier=1.5", "privacy.secure_aggregation=secagg")
    facts, told = planned(capsys, made(), *CENTRAL, *own, *settings("privacy.budget=4"))
    assert facts["epsilon_against_server"] > facts["epsilon"]
    assert facts["secure_aggregation"]["protocol"] == "secagg"
    assert "no message; knowing who took part, epsilon" in told
    within = facts["rounds_within_budget"]
    assert epsilon_of([Release(1.5, within, "poisson", 0.5)], 1e-5) <= 4
    assert epsilon_of([Release(1.5, within + 1, "poisson", 0.5)], 1e-5) > 4
    assert f"4: {within} of 10 rounds" in told
    fixed = settings("privacy.sampling=fixed")
    facts, _ = planned(capsys, made(), *CENTRAL, *own, *fixed)
    assert facts["accountant"] == "rdp"
    assert facts["secure_aggregation"]["least_clients"] == 7


def test_single_examples_are_counted_at_each_client(made, capsys) -> None:
    own = settings("privacy.mechanism=example", "privacy.epsilon=6", "privacy.delta=0.5")
    facts, told = planned(capsys, made(num=3, examples=120), *own, "--set", "clients.fraction=1")
    assert facts["clients_counted"]
    assert facts["unit"] == "example"
    assert facts["epsilon_against_server"] == facts["epsilon"] <= 6
    assert facts["worst"]["count"] <= 3
    assert "steps a round" in facts["worst"]["why"] or facts["worst"]["all"]
    assert "examples of the smallest client" in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epsilon", "2", "--noise", "1"], "one of both follows from the other"),
        (["--epsilon", "0"], "--epsilon: there is no such amount"),
        (["--epsilon", "-1"], "allowed: above 0"),
        (["--epsilon", "nan"], "--epsilon: there is no such amount"),
        (["--noise", "-0.5"], "--noise: there is no such amount"),
        (["--noise", "inf"], "--noise: there is no such amount"),
        (["--set", "privacy.clip=0"], "privacy.clip"),
        (["--set", "privacy.epsilon=-1"], "privacy.epsilon"),
        (["--set", "privacy.delta=1"], "privacy.delta"),
        (["--set", "privacy.sampling=coins"], "poisson"),
    ],
)
def test_bad_amounts(made, capsys, arguments: list[str], words: str) -> None:
    assert run_command(["privacy", made(), *arguments]) == 2
    told = capsys.readouterr()
    assert words in told.err
    assert told.out == ""


def test_data_that_are_needed_and_not_there(made, capsys) -> None:
    own = settings("privacy.mechanism=example", "privacy.epsilon=6")
    assert run_command(["privacy", made(), *own]) == 2
    assert "x.npz" in capsys.readouterr().err


def test_the_plan_of_a_run_says_what_it_spends(made, capsys) -> None:
    """``fedtl check``: epsilon after all rounds, its warning, and bytes as they are sent."""
    own = [made(num=3, examples=120), *CENTRAL, "--set", "clients.fraction=1.0"]
    delta, noise = "privacy.delta=0.4", "privacy.noise_multiplier=3.0"
    assert run_command(["check", *own, *settings(delta, noise), "--json"]) == 0
    out, told = capsys.readouterr()
    facts = json.loads(out)
    assert facts["epsilon"] == epsilon_of([Release(3.0, 10)], 0.4)
    assert f"epsilon {facts['epsilon']:.4g} (delta 0.4)" in " ".join(told.split())
    assert "delta = 0.4 is not below one over the clients (1/3" in " ".join(told.split())
    assert run_command(["check", *own, *settings("privacy.noise_multiplier=0"), "--json"]) == 0
    out, told = capsys.readouterr()
    assert json.loads(out)["epsilon"] is None
    assert "epsilon not bounded" in " ".join(told.split())
    released = [made("fed3r", num=3, examples=120), "--set", "clients.fraction=1.0"]
    assert run_command(["check", *released, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["bytes_up"]
    secure = ["--set", "privacy.secure_aggregation=secagg"]
    assert run_command(["check", *released, *secure, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_up"] == plain  # float64 and uint64

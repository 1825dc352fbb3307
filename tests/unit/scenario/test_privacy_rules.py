"""Every pair that privacy cannot be promised for is refused with the reason, and no other."""

from __future__ import annotations

from typing import get_args

import pytest

from fedtl.errors import InputError
from fedtl.scenario import strategies
from fedtl.scenario.adaptation_rules import real_problems
from fedtl.scenario.compatibility import check_cohort, find_conflicts
from fedtl.scenario.schema import Scenario
from fedtl.scenario.secure_rules import NEEDS_SINGLE
from fedtl.scenario.strategies import CLOSED_FORMS
from fedtl.scenario.transfer import FROM_STATISTICS

NAMES = sorted(
    name
    for section in get_args(get_args(strategies.Strategy)[0])
    for name in get_args(section.model_fields["name"].annotation)
)
AVERAGING = {
    "fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "finetune", "ditto",
    "pfedme", "apfl", "fedper", "fedrep", "fedbabu", "lgfedavg", "knnper",
}  # fmt: skip
CORRECTED = {"scaffold", "feddyn", "fednova"}
ROBUST = {
    "krum", "multikrum", "bulyan", "median", "trimmed_mean", "geometric_median", "fltrust",
    "norm_clip",
}  # fmt: skip
OWN_ROUNDS = {"fedper", "lgfedavg", "fedrep", "fedbabu", "ditto", "pfedme", "apfl"}
SUMS = {"fed3r", "afl", "fedncm", "fedlda"}


def conflicts(**tables) -> list[tuple[str, str]]:
    raw = {"name": "x", "strategy": {"name": "fedavg"}, **tables}
    strategy = dict(raw["strategy"])
    if strategy["name"] == "flower":
        strategy.setdefault("class", "FedAvg")
    if strategy["name"] == "fltrust":
        strategy.setdefault("root", "a")
    section = next(
        s
        for s in get_args(get_args(strategies.Strategy)[0])
        if strategy["name"] in get_args(s.model_fields["name"].annotation)
    )
    if "weighting" in section.model_fields:
        strategy.setdefault("weighting", "uniform")
    found = find_conflicts(Scenario.model_validate({**raw, "strategy": strategy}))
    return [(problem.where, problem.line()) for problem in found]


def central(**keys) -> dict[str, object]:
    given = {"epsilon", "noise_multiplier"} & set(keys)
    return {"mechanism": "central", **({} if given else {"epsilon": 4.0}), **keys}


def one(line: str, where: str, **tables) -> None:
    """Exactly one problem, at ``where``, with these words."""
    found = conflicts(**tables)
    assert [place for place, _ in found] == [where], found
    assert line in found[0][1]


def test_the_names_are_all_there() -> None:
    rest = {"fedexp", "qfedavg", "mime", "lbfgs", "flower"}
    assert set(NAMES) == AVERAGING | CORRECTED | ROBUST | set(CLOSED_FORMS) | rest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("mechanism", "carried"),
    [
        ("central", AVERAGING),
        ("local", AVERAGING | CORRECTED | ROBUST | {"flower"}),
        ("example", (AVERAGING - OWN_ROUNDS) | CORRECTED | ROBUST | {"fedexp", "flower"}),
        ("release", SUMS),
        ("none", None),
    ],
)
@pytest.mark.parametrize("secure", [False, True])
def test_which_strategies_each_mechanism_carries(
    name: str, mechanism: str, carried: set[str] | None, secure: bool
) -> None:
    privacy: dict[str, object] = {"mechanism": mechanism}
    if mechanism != "none":
        privacy["epsilon"] = 4.0
    if secure:
        privacy["secure_aggregation"] = "secagg"
    found = conflicts(strategy={"name": name}, privacy=privacy, rounds=1)
    ok = carried is None or name in carried
    if secure:
        ok = ok and (name in AVERAGING | SUMS | {"ccvr", "personal_ridge"})
    assert ok == (not found), found
    assert all(where == "strategy.name" for where, _ in found)
    if not ok and secure and (carried is None or name in carried):
        assert "under secure aggregation the server sees the sum alone" in found[0][1]
        assert NEEDS_SINGLE[name] in found[0][1]
    if not ok and mechanism == "central":
        assert 'under privacy.mechanism = "central"' in found[0][1]


@pytest.mark.parametrize(
    ("strategy", "mechanism", "words"),
    [
        ("krum", "central", "compares single updates with each other"),
        ("krum", "central", 'Use "fedavg", or another that averages'),
        ("fedcof", "release", '(got "fedcof"; allowed: fed3r, afl, fedncm, fedlda)'),
        ("scaffold", "central", "keeps a variate of each client"),
        ("fed3r", "central", 'Set privacy.mechanism = "release"'),
        ("mime", "local", "clients also send a gradient"),
        ("qfedavg", "example", "clients also send their loss"),
        ("fedexp", "local", "takes the noise in every update for disagreement"),
        ("ditto", "example", "its clients also train by steps that are not noised"),
        ("fedavg", "release", "no closed form of summed statistics"),
        ("lbfgs", "local", "clients send gradients"),
    ],
)
def test_reasons_name_what_is_in_the_way(strategy: str, mechanism: str, words: str) -> None:
    privacy = {"mechanism": mechanism, "epsilon": 4.0}
    one(words, "strategy.name", strategy={"name": strategy}, privacy=privacy, rounds=1)


@pytest.mark.parametrize("mechanism", ["central", "local", "example", "release"])
def test_noise_is_said_once(mechanism: str) -> None:
    rest = {"rounds": 1, "strategy": {"name": "fed3r" if mechanism == "release" else "fedavg"}}
    own = {"mechanism": mechanism}
    one("neither epsilon nor noise_multiplier", "privacy", privacy=own, **rest)
    both = {**own, "epsilon": 1.0, "noise_multiplier": 0.0}
    one("epsilon = 1 and noise_multiplier = 0", "privacy", privacy=both, **rest)
    assert not conflicts(privacy={**own, "noise_multiplier": 0.0}, **rest)
    assert not conflicts(privacy={**own, "epsilon": 1.0, "budget": 0.5}, **rest)
    free = {**own, "noise_multiplier": 0.0, "budget": 2.0}
    one("without noise every round spends without bound", "privacy.budget", privacy=free, **rest)


@pytest.mark.parametrize("key", ["epsilon", "noise_multiplier", "budget"])
def test_no_amounts_without_a_mechanism(key: str) -> None:
    one("nothing adds noise", f"privacy.{key}", privacy={key: 1.0})


@pytest.mark.parametrize(
    ("privacy", "key", "words"),
    [
        ({"mechanism": "local", "epsilon": 1.0, "unit": "client"}, "unit", "release"),
        (central(unit="example"), "unit", "release"),
        (central(unit="example"), "unit", '(got "example"). Remove it'),
        (central(bands=2), "bands", "(got 2)"),
        ({"mechanism": "local", "epsilon": 1.0, "adaptive_clip": True}, "adaptive_clip", "follow"),
        (central(clip_quantile=0.4), "clip_quantile", "adaptive_clip is off"),
        (central(clip_rate=0.4), "clip_rate", "adaptive_clip is off"),
        ({"mechanism": "example", "epsilon": 1.0, "sampling": "fixed"}, "sampling", "central"),
        ({"mechanism": "local", "epsilon": 1.0, "sampling": "fixed"}, "sampling", 'to "poisson"'),
        ({"mechanism": "local", "epsilon": 1.0, "noise": "banded"}, "noise", "central"),
        (central(bands=2), "bands", "noise is independent"),
        ({"secure_aggregation": "secagg", "neighbours": 4}, "neighbours", "secagg_plus"),
        (central(canaries=4, canary_labels="random"), "canary_labels", "whole clients"),
    ],
)
def test_keys_without_effect_are_told(privacy, key: str, words: str) -> None:
    one(words, f"privacy.{key}", privacy=privacy)


def test_keys_with_effect_are_not() -> None:
    for privacy in (
        central(clip=2.0, adaptive_clip=True, clip_quantile=0.4, clip_rate=0.1),
        central(sampling="fixed"),
        {"secure_aggregation": "secagg_plus", "neighbours": 4, "threshold": 0.9},
        {"canaries": 10, "canary_labels": "random"},
        central(canary_labels="random"),
        # switched off, whatever else the file says
        {"clip": 2.0, "adaptive_clip": True, "sampling": "cyclic", "noise": "banded", "bands": 3},
        {"threshold": 0.4, "value_range": 2.0, "neighbours": 3, "canary_labels": "random"},
        {"canaries": 3, "unit": "client"},
        {"mechanism": "example", "epsilon": 1.0, "canaries": 5, "canary_labels": "random"},
    ):
        assert not conflicts(privacy=privacy), privacy


@pytest.mark.parametrize("mechanism", ["central", "local"])
def test_weights_by_examples_need_mending(mechanism: str) -> None:
    privacy = {"mechanism": mechanism, "epsilon": 1.0}
    weighted = {"name": "fedavg", "weighting": "examples"}
    one('Set strategy.weighting = "uniform"', "strategy.weighting", strategy=weighted,
        privacy=privacy)  # fmt: skip
    assert not conflicts(strategy=weighted, privacy={"mechanism": "example", "epsilon": 1.0})
    assert not conflicts(strategy=weighted, privacy={"secure_aggregation": "secagg"})


def test_one_release_of_all_clients() -> None:
    own = {"privacy": {"mechanism": "release", "epsilon": 1.0}, "strategy": {"name": "fed3r"}}
    one("statistics are released once", "rounds", rounds=2, **own)
    one("of all clients", "clients.fraction", rounds=1, clients={"fraction": 0.5}, **own)
    assert not conflicts(rounds=1, **own)


def test_who_takes_part_is_left_to_the_sampling() -> None:
    asked = {"over_selection": 1.5}
    words = "who answers first"
    one(words, "participation.over_selection", participation=asked, privacy=central())
    secure = {"secure_aggregation": "secagg"}
    one(words, "participation.over_selection", participation=asked, privacy=secure)
    for mechanism in ("local", "example"):
        own = {"mechanism": mechanism, "epsilon": 1.0}
        assert not conflicts(participation=asked, privacy=own)
    half = {"fraction": 0.5}
    one("a small or empty round counts", "participation.quorum", participation={"quorum": 2},
        clients=half, privacy=central())  # fmt: skip
    for sampling in ("fixed", "cyclic"):
        own = central(sampling=sampling)
        assert not conflicts(participation={"quorum": 2}, clients=half, privacy=own)
    assert not conflicts(participation={"quorum": 2}, privacy=central())  # no coins at 1


def test_banded_noise() -> None:
    half = {"fraction": 0.5}
    turns = central(noise="banded", sampling="cyclic")
    assert not conflicts(clients=half, privacy=turns)
    assert not conflicts(privacy=central(noise="banded", bands=4))
    for sampling in ("poisson", "fixed"):
        own = central(noise="banded", sampling=sampling)
        one("clients that come in turns", "privacy.sampling", clients=half, privacy=own)
    one("one clip for all", "privacy.adaptive_clip", privacy={**turns, "adaptive_clip": True})
    one("more than there are rounds", "privacy.bands", rounds=5, privacy={**turns, "bands": 6})
    assert not conflicts(rounds=5, privacy={**turns, "bands": 5})
    secure = {**turns, "secure_aggregation": "secagg"}
    one("nobody would know the earlier rounds' noise", "privacy.noise", privacy=secure)


def test_secure_sums() -> None:
    own = {"secure_aggregation": "secagg"}
    one("no part of the secure sum", "privacy.adaptive_clip",
        privacy=central(adaptive_clip=True, **own))  # fmt: skip
    one("unmask two sums", "privacy.threshold", privacy={**own, "threshold": 0.5})
    assert not conflicts(privacy={"secure_aggregation": "arithmetic", "threshold": 0.5})
    lonely = {"num": 8, "fraction": 0.1}
    words = "the sum of one client is that client's"
    one(words, "privacy.secure_aggregation", privacy=own, clients=lonely)
    one(words, "privacy.secure_aggregation", privacy=own, clients={"num": 1})
    assert not conflicts(privacy=own, clients={"num": 2})
    assert not conflicts(clients={"num": 1})
    plus = {"secure_aggregation": "secagg_plus", "neighbours": 5}
    one("more than there are other clients", "privacy.neighbours", privacy=plus,
        clients={"num": 5})  # fmt: skip
    assert not conflicts(privacy=plus, clients={"num": 6})
    assert not conflicts(privacy=plus)
    unknown = Scenario.model_validate({"name": "x", "privacy": own})
    check_cohort(unknown, 2)
    check_cohort(Scenario(name="x"), 1)
    with pytest.raises(InputError, match=words):  # once the data have told
        check_cohort(unknown, 1)
    for kind in ("sign_flip", "gaussian", "min_max"):
        one("under masks again", "attack.kind", privacy=own, attack={"kind": kind})
    assert not conflicts(privacy=own, attack={"kind": "label_flip"})
    assert not conflicts(privacy=own, compression={"kind": "int8"})


@pytest.mark.parametrize("initial", FROM_STATISTICS)
@pytest.mark.parametrize("mechanism", ["central", "local", "example"])
def test_a_warm_start_is_not_covered(mechanism: str, initial: str) -> None:
    own, head = {"mechanism": mechanism, "epsilon": 1.0}, {"initial": initial}
    one("first round sends statistics", "head.initial", privacy=own, head=head)
    assert not conflicts(privacy={"secure_aggregation": "secagg"}, head=head)


def test_example_level_is_for_linear_heads_and_independent_rows() -> None:
    own = {"mechanism": "example", "epsilon": 1.0}
    one("for a linear head only", "head.kind", privacy=own, head={"kind": "mlp"})
    alone = "one example would change what is made of the client's others"
    for adaptation in (
        {"features": "standardise"},
        {"features": "whiten"},
        {"input": "match"},
        {"prior": "balanced_softmax"},
    ):
        (key,) = adaptation
        one(alone, f"adaptation.{key}", privacy=own, adaptation=adaptation)
        assert not conflicts(privacy=central(), adaptation=adaptation)
    assert not conflicts(privacy=own, adaptation={"prior": "logit_adjustment"})
    released = {"mechanism": "release", "epsilon": 1.0}
    rest = {"strategy": {"name": "fed3r"}, "rounds": 1}
    white = {"features": "whiten"}
    one(alone, "adaptation.features", privacy=released, adaptation=white, **rest)
    assert not conflicts(privacy={**released, "unit": "client"}, adaptation=white, **rest)


def test_everybodys_statistics_are_not_covered() -> None:
    one("everybody's features", "adaptation.features", privacy=central(),
        adaptation={"features": "coral"})  # fmt: skip
    one("everybody's confusion matrix", "adaptation.prior", privacy=central(),
        adaptation={"prior": "bbse"})  # fmt: skip
    assert not conflicts(privacy={"secure_aggregation": "secagg"}, adaptation={"features": "coral"})


@pytest.mark.parametrize("kind", ["inner_product", "alie", "min_max"])
def test_liars_who_know_the_others_pass_it_on(kind: str) -> None:
    one("pass on what noise should hide", "attack.kind", privacy=central(), attack={"kind": kind})
    own = {"mechanism": "local", "epsilon": 1.0}
    assert not conflicts(privacy=own, attack={"kind": kind})
    assert not conflicts(privacy=central(), attack={"kind": "sign_flip"})


def test_the_gate_stands_before_statistics() -> None:
    gate = {"min_class_examples": 3}
    one('clients of "fedavg" send none', "privacy.min_class_examples", privacy=gate)
    assert not conflicts(privacy=gate, strategy={"name": "fedncm"})
    for initial in FROM_STATISTICS:
        assert not conflicts(privacy=gate, head={"initial": initial})
    released = {"mechanism": "release", "epsilon": 1.0, **gate}
    rest = {"strategy": {"name": "fed3r"}, "rounds": 1}
    one("bring its whole class in or out", "privacy.min_class_examples", privacy=released, **rest)
    assert not conflicts(privacy={**released, "unit": "client"}, **rest)


def test_flowers_qfedavg_also_sends_losses() -> None:
    for name in ("QFedAvg", "flwr.serverapp.strategy:QFedAvg", "flwr.serverapp.strategy.QFedAvg"):
        one("also send their loss", "strategy.class", strategy={"name": "flower", "class": name},
            privacy={"mechanism": "local", "epsilon": 1.0})  # fmt: skip


def test_compression_goes_with_all() -> None:
    for privacy in (
        central(),
        central(secure_aggregation="secagg"),
        {"mechanism": "local", "epsilon": 1.0},
        {"mechanism": "example", "epsilon": 1.0},
    ):
        assert not conflicts(privacy=privacy, compression={"kind": "int8"})


def test_what_real_clients_cannot_do() -> None:
    made = Scenario.model_validate(
        {"name": "x", "privacy": {"secure_aggregation": "arithmetic", "canaries": 3}}
    )
    found = {problem.where: problem.line() for problem in real_problems(made)}
    assert "hides nothing from the server" in found["privacy.secure_aggregation"]
    assert "nobody's real examples are left out" in found["privacy.canaries"]
    real = Scenario.model_validate({"name": "x", "privacy": {"secure_aggregation": "secagg"}})
    assert not list(real_problems(real))

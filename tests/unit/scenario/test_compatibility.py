"""Pairs of strategies, attacks and other keys that cannot work are refused with the reason."""

import pytest

from fedtl.errors import InputError
from fedtl.planning import cohort_size
from fedtl.scenario.compatibility import (
    CLOSED_FORMS,
    UPDATE_ATTACKS,
    check_cohort,
    find_conflicts,
    least_clients,
)
from fedtl.scenario.schema import Scenario
from fedtl.scenario.transfer import FROM_STATISTICS


def scenario(**tables) -> Scenario:
    raw = {"name": "x", "strategy": {"name": "fedavg"}, **tables}
    if raw["strategy"]["name"] == "flower":
        raw["strategy"].setdefault("class", "FedAvg")
    return Scenario.model_validate(raw)


def conflicts(**tables) -> dict[str, str]:
    return {problem.where: problem.line() for problem in find_conflicts(scenario(**tables))}


def rule(name: str, **parameters) -> dict[str, object]:
    return {"name": name, **parameters}


@pytest.mark.parametrize(
    ("strategy", "least"),
    [
        (rule("krum", malicious=0), 3),
        (rule("krum", malicious=2), 7),
        (rule("multikrum", malicious=4), 11),
        (rule("bulyan", malicious=0), 3),
        (rule("bulyan", malicious=2), 11),
    ],
)
def test_too_few_clients_for_that_many_liars(strategy, least: int) -> None:
    assert conflicts(strategy=strategy, clients={"num": least}) == {}
    found = conflicts(strategy=strategy, clients={"num": least - 1})
    assert list(found) == ["strategy.malicious"]
    formula = "n >= 4 f + 3" if strategy["name"] == "bulyan" else "n > 2 f + 2"
    line = found["strategy.malicious"]
    assert f"{strategy['name']} needs {formula}" in line
    assert f"got f = {strategy['malicious']}, {least - 1} clients a round" in line
    assert f"at least {least} clients a round" in line


def test_sampled_cohorts_are_what_counts() -> None:
    krum = rule("krum", malicious=2)
    assert conflicts(strategy=krum, clients={"num": 14, "fraction": 0.5}) == {}
    assert conflicts(strategy=krum, clients={"num": 13, "fraction": 0.5}) == {}  # 6.5 rounds up
    assert "6 clients a round" in str(
        conflicts(strategy=krum, clients={"num": 12, "fraction": 0.5})
    )


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.5, 0.75, 1.0])
def test_the_cohort_is_the_one_that_rounds_have(fraction: float) -> None:
    for num in range(1, 60):
        given = scenario(clients={"num": num, "fraction": fraction}, strategy=rule("krum"))
        enough = cohort_size(given, num) >= least_clients("krum", 1)
        assert (find_conflicts(given) == []) == enough


def test_data_that_decide_the_number_of_clients_are_told_the_same() -> None:
    open_number = scenario(strategy=rule("bulyan", malicious=3))
    assert find_conflicts(open_number) == []
    check_cohort(open_number, 15)
    with pytest.raises(InputError) as caught:
        check_cohort(open_number, 14)
    said = conflicts(strategy=rule("bulyan", malicious=3), clients={"num": 14})
    assert caught.value.line() == said["strategy.malicious"]


def test_multikrum_averages_no_more_than_can_be_honest() -> None:
    def found(selected: int) -> dict[str, str]:
        return conflicts(
            strategy=rule("multikrum", malicious=2, selected=selected), clients={"num": 10}
        )

    assert found(8) == {}
    assert (
        "9 of 10 clients a round, of which 2 may lie; allowed: at most 8"
        in found(9)["strategy.selected"]
    )


def test_a_trim_that_cuts_nobody_is_refused() -> None:
    def found(trim: float, num: int) -> dict[str, str]:
        return conflicts(strategy=rule("trimmed_mean", trim=trim), clients={"num": num})

    assert found(0.1, 10) == found(0.0, 9) == found(0.34, 3) == {}
    assert "cuts nobody off of 9 clients a round" in found(0.1, 9)["strategy.trim"]
    assert "at least 0.1112" in found(0.1, 9)["strategy.trim"]
    assert found(0.1112, 9) == {}
    assert "only 0" in found(0.49, 2)["strategy.trim"]


@pytest.mark.parametrize("name", ["krum", "bulyan", "median", "trimmed_mean"])
def test_rules_that_treat_all_alike_take_no_weights(name: str) -> None:
    with pytest.raises(ValueError, match="uniform"):
        scenario(strategy=rule(name, weighting="examples"))


def test_fltrust_needs_its_client_in_every_round_and_honest() -> None:
    trust = rule("fltrust", root="client-0")
    assert conflicts(strategy=trust) == {}
    assert list(conflicts(strategy=trust, clients={"fraction": 0.5})) == ["clients.fraction"]
    lying = {"kind": "alie", "clients": ["client-1", "client-0"]}
    assert list(conflicts(strategy=trust, attack=lying)) == ["attack.clients"]
    assert conflicts(strategy=trust, attack={**lying, "kind": "none"}) == {}
    assert conflicts(strategy=trust, attack={"kind": "alie", "clients": ["client-1"]}) == {}


@pytest.mark.parametrize("name", [*CLOSED_FORMS, "lbfgs"])
def test_updates_cannot_be_falsified_where_none_are_sent(name: str) -> None:
    for kind in UPDATE_ATTACKS:
        found = conflicts(strategy=rule(name), attack={"kind": kind})
        assert list(found) == ["attack.kind"]
        assert f'clients of "{name}" send' in found["attack.kind"]
    for kind in ("none", "label_flip", "backdoor"):
        assert conflicts(strategy=rule(name), attack={"kind": kind}) == {}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms_have_no_hidden_layers(name: str) -> None:
    found = conflicts(strategy=rule(name), head={"kind": "mlp"})
    assert "hidden layers have no closed form" in found["head.kind"]
    assert conflicts(strategy=rule(name)) == {}
    assert conflicts(head={"kind": "mlp"}) == {}


@pytest.mark.parametrize("initial", FROM_STATISTICS)
def test_a_closed_form_is_handed_over_only_to_plain_iterative_heads_with_a_second_round(
    initial: str,
) -> None:
    start = {"initial": initial}
    assert conflicts(head=start) == conflicts(head=start, rounds=2) == {}
    assert list(conflicts(head={**start, "kind": "mlp"})) == ["head.initial"]
    assert list(conflicts(head=start, rounds=1)) == ["head.initial"]
    for name in CLOSED_FORMS:
        found = conflicts(head=start, strategy=rule(name))
        assert "its head is a closed form already" in found["head.initial"]
        assert f'got "{initial}"' in found["head.initial"]


@pytest.mark.parametrize("name", [*CLOSED_FORMS, "lbfgs", "flower", "mime"])
def test_only_trained_heads_are_packed(name: str) -> None:
    for kind in ("top_k", "int8", "sign"):
        found = conflicts(strategy=rule(name), compression={"kind": kind})
        assert f'it packs trained heads, and "{name}"' in found["compression.kind"]
    assert conflicts(strategy=rule(name)) == {}
    assert conflicts(strategy=rule("scaffold"), compression={"kind": "int8"}) == {}


def test_mimes_momentum_is_the_servers() -> None:
    found = conflicts(strategy=rule("mime"), training={"momentum": 0.9})
    assert "clients take plain steps" in found["training.momentum"]
    for name in ("scaffold", "feddyn", "fednova", "fedprox"):
        assert conflicts(strategy=rule(name), training={"momentum": 0.9}) == {}


@pytest.mark.parametrize("name", [*CLOSED_FORMS, "lbfgs"])
def test_exact_strategies_drop_no_answers(name: str) -> None:
    found = conflicts(strategy=rule(name), participation={"over_selection": 1.5})
    assert list(found) == ["participation.over_selection"]
    assert conflicts(participation={"over_selection": 1.5}) == {}
    sampled = conflicts(strategy=rule(name), clients={"fraction": 0.5})
    assert list(sampled) == (["clients.fraction"] if name == "lbfgs" else [])

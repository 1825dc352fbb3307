"""What personalised strategies ask for, and what they do with answers that leave tensors out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedtl.engines import wire
from fedtl.errors import InputError
from fedtl.plans import RoundPlan
from fedtl.scenario.schema import Scenario
from fedtl.strategies import STRATEGIES, make_strategy
from fedtl.strategies.averaging import FedAvg
from fedtl.strategies.base import ServerState, personal_of
from fedtl.strategies.personal import (
    APFL,
    Ditto,
    FedBABU,
    FedPer,
    FedRep,
    LGFedAvg,
    PersonalRidge,
    PFedMe,
    client_prior,
    degenerate,
)
from fedtl.types import LocalTraining

NAMES = (
    "finetune", "fedper", "lgfedavg", "fedrep", "fedbabu", "ditto", "pfedme", "apfl", "knnper",
    "personal_ridge",
)  # fmt: skip
LAST = {"weight", "bias"}


def head_of(kind: str):
    random = np.random.default_rng(0)
    shapes = {"weight": (3, 5 if kind == "mlp" else 4), "bias": (3,)}
    if kind == "mlp":
        shapes = {"hidden.0.weight": (5, 4), "hidden.0.bias": (5,), **shapes}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def asked(strategy, kind: str, **training) -> RoundPlan:
    ids = np.arange(2, dtype=np.int64)
    sgd = LocalTraining(**{"epochs": 2, "batch_size": 5, "learning_rate": 0.1, **training})
    plan = RoundPlan(1, ids, ids.astype(np.uint64), sgd)
    return strategy.plan(strategy.init(head_of(kind), 2), plan)


def answer(updates, plan, head, seed: int = 1):
    random = np.random.default_rng(seed)
    shapes = plan.reply(head)
    filler = {"weight": np.zeros((2, 3))}  # the fixture counts its clients by a tensor
    found = updates(filler | {n: random.normal(size=(2, *s)) for n, (s, _) in shapes.items()},
                    examples=[1, 3])  # fmt: skip
    return dataclasses.replace(found, tensors={n: found.tensors[n] for n in shapes})


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_travels(name: str, kind: str) -> None:
    if (name, kind) == ("personal_ridge", "mlp"):
        with pytest.raises(InputError, match="linear head"):
            asked(STRATEGIES[name](), kind)
        return
    strategy, head = STRATEGIES[name](), head_of(kind)
    plan = asked(strategy, kind)
    at_the_end = dataclasses.replace(plan, personal=personal_of(strategy, ServerState(head)))
    for one in (plan, at_the_end):
        facts, tensors = wire.unpack(wire.pack(*wire.train_request(one, head)), 10**6)
        assert wire.read_plan(facts, tensors)[0].personal == one.personal
    assert at_the_end.personal is not None


@pytest.mark.parametrize(
    ("strategy", "kind", "sent"),
    [
        (FedPer(), "linear", set()),
        (FedPer(), "mlp", {"hidden.0.weight", "hidden.0.bias"}),
        (LGFedAvg(), "linear", LAST),
        (LGFedAvg(), "mlp", LAST),
        (FedRep(), "linear", set()),
        (FedRep(), "mlp", {"hidden.0.weight", "hidden.0.bias"}),
        (FedBABU(), "linear", set()),
        (FedBABU(), "mlp", {"hidden.0.weight", "hidden.0.bias"}),
        (Ditto(), "linear", LAST),
        (APFL(), "mlp", {*LAST, "hidden.0.weight", "hidden.0.bias"}),
    ],
)
def test_only_what_is_shared_is_sent_and_moves(strategy, kind: str, sent, updates) -> None:
    state = strategy.init(head_of(kind), 2)
    plan = asked(strategy, kind)
    assert set(plan.reply(state.head)) == sent
    given = answer(updates, plan, state.head)
    after = strategy.step(state, given)
    assert list(after.head) == list(state.head)
    assert after.slots == {}
    for name, tensor in state.head.items():
        if name in sent:
            expected = 0.25 * given.tensors[name][0] + 0.75 * given.tensors[name][1]
            np.testing.assert_allclose(after.head[name], expected, rtol=1e-5, atol=1e-6)
        else:
            assert after.head[name].tobytes() == tensor.tobytes()


def test_what_is_sent_is_averaged_as_fedavg_does(updates) -> None:
    head, plan = head_of("mlp"), asked(Ditto(), "mlp")
    given = answer(updates, plan, head)
    settings = {"weighting": "uniform", "server_learning_rate": 0.7}
    a = Ditto(**settings).step(ServerState(head), given)
    b = FedAvg(**settings).step(ServerState(head), given)
    assert all(a.head[name].tobytes() == b.head[name].tobytes() for name in head)


def test_pfedmes_beta_mixes_with_the_head_before(updates) -> None:
    head, plan = head_of("linear"), asked(PFedMe(), "linear")
    given = answer(updates, plan, head)
    all_of_it = PFedMe().step(ServerState(head), given).head
    half = PFedMe(beta=0.5).step(ServerState(head), given).head
    for name in head:
        np.testing.assert_allclose(half[name], (head[name] + all_of_it[name]) / 2, rtol=1e-5)


def test_fedbabus_last_layer_is_random_seeded_and_frozen() -> None:
    zero = {**head_of("mlp"), "weight": np.zeros((3, 5), np.float32)}
    one, again, other = (FedBABU(seed=seed).init(zero, 2).head for seed in (1, 1, 2))
    assert one["weight"].tobytes() == again["weight"].tobytes() != other["weight"].tobytes()
    assert 0 < np.abs(one["weight"]).max() <= 5**-0.5
    assert one["hidden.0.weight"].tobytes() == zero["hidden.0.weight"].tobytes()
    assert asked(FedBABU(), "mlp").training.layers == "hidden"
    linear = head_of("linear")
    assert FedBABU().init(linear, 2).head["weight"].tobytes() == linear["weight"].tobytes()


@pytest.mark.parametrize("name", ["ditto", "pfedme"])
def test_a_pull_that_overshoots_is_refused(name: str) -> None:
    strategy = STRATEGIES[name](strength=19.0)
    assert asked(strategy, "linear").personal.strength == 19.0
    with pytest.raises(InputError, match=r"strategy.strength.*\n?.*below 2"):
        asked(strategy, "linear", weight_decay=1.0)


def test_ridge_reports_statistics_and_tells_its_scale(updates) -> None:
    for bias, local in ((True, ("weight", "bias")), (False, ("weight",))):
        strategy = PersonalRidge(bias=bias, temperature=0.3, pulls=[1.0, 2.0])
        assert asked(strategy, "linear").task == "statistics"
        assert not strategy.normalise
        personal = personal_of(strategy, ServerState(head_of("linear")))
        assert (personal.method, personal.local) == ("ridge", local)
        assert (personal.scale, personal.choices) == (0.3, (1.0, 2.0))


def test_the_servers_prior_is_that_of_the_lda_bias() -> None:
    assert client_prior(np.array([1, 3, 0])).choices == (np.log(0.25), np.log(0.75), 0.0)


def test_others_make_nothing_of_their_own() -> None:
    assert personal_of(FedAvg(), ServerState(head_of("linear"))) is None


def test_same_things_are_named_where_they_are_the_same() -> None:
    named = {name for name in NAMES if degenerate(name, "linear")}
    assert named == {"fedper", "fedrep", "lgfedavg", "fedbabu"}
    assert "fedavg" in degenerate("lgfedavg", "linear")
    assert all("trains alone" in degenerate(name, "linear") for name in ("fedper", "fedrep"))
    assert not any(degenerate(name, "mlp") for name in NAMES)
    assert degenerate("fedavg", "linear") is None


@pytest.mark.parametrize("name", NAMES)
def test_a_scenarios_defaults_are_the_classes(name: str) -> None:
    scenario = Scenario.model_validate({"name": "x", "strategy": {"name": name}})
    seeded = {"seed": scenario.seed} if name in ("fedbabu", "personal_ridge") else {}
    assert make_strategy(scenario, ("a",)) == STRATEGIES[name](**seeded)

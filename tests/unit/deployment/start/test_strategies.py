"""What strategies ask of real clients: the simulation's head, and nothing that is theirs leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedtl import seeding
from fedtl.build import make_federation, open_data
from fedtl.clients.personal import judge_personal
from fedtl.clients.personal_store import PersonalStore
from fedtl.conduct import Outcome
from fedtl.deployment.judging import judge_remotely
from fedtl.engines import wire
from fedtl.engines.flower_engine import FlowerEngine
from fedtl.errors import SecurityRefusal
from fedtl.interrupts import Interrupts
from fedtl.judging import Judging
from fedtl.planning import local_training
from fedtl.plans import RoundPlan, Statistics
from fedtl.results.runs import RunFolder
from fedtl.rounds import Federation, run_rounds
from fedtl.strategies.base import ServerState, personal_of
from fedtl.strategies.warm_start import start_of
from fedtl.types import ClientMetrics

NAMES = ("north", "east", "west")


@pytest.fixture
def together(make_site: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Makes three clients with features of their own, and the same in simulation."""
    rng = np.random.default_rng(1)
    whose = np.array(NAMES)[rng.integers(0, 3, 150)]
    y = rng.integers(0, 3, 150)
    x = rng.normal(size=(150, 5)).astype(np.float32)
    x[np.arange(150), y] += 1.5
    np.savez(tmp_path / "all.npz", x=x, y=y, client=whose)

    def make(**tables: Any) -> tuple[Any, Any, FlowerEngine, PersonalStore]:
        site = make_site(
            data={"source": "arrays", "path": str(tmp_path / "all.npz"), "domains": False},
            clients={"partition": "natural", **tables.pop("clients", {})},
            backbone={"name": "identity", "weights": "default", "image_size": None},
            training={"local_epochs": 2, "batch_size": 8, "learning_rate": 0.1},
            **tables,
        )
        for name in NAMES:
            mine = whose == name
            np.savez(tmp_path / f"{name}.npz", x=x[mine], y=y[mine])
            site.add(name, tmp_path / f"{name}.npz", keeps=tmp_path / "kept" / name)
        for node in site.nodes.values():
            node.kinds = []
            node.before = node.kinds.append
        store = PersonalStore(tmp_path / "simulated")
        built = make_federation(open_data(site.scenario), store=store)
        gathering = site.gathering()
        gathered = gathering.gather()
        engine = FlowerEngine(
            site.exchange, gathered.roster, gathering.seat, gathered.seats, real=True
        )
        return site, built, engine, store

    return make


def trained(federation: Federation, place: Path) -> ServerState:
    folder = RunFolder.create(place, "")
    try:
        federation.engine.start(federation.head)
        return run_rounds(federation, folder, lambda row, updates: None, Interrupts())[0]
    finally:
        folder.release()


def same_state(a: ServerState, b: ServerState) -> None:
    for mine, theirs in ((a.head, b.head), (a.slots, b.slots)):
        assert {n: t.tobytes() for n, t in mine.items()} == {
            n: t.tobytes() for n, t in theirs.items()
        }


def asked(site: Any) -> list[tuple[str, set[str], bytes]]:
    """What kind of answer left a client, with which tensors, and all of it."""
    found = []
    for node in site.nodes.values():
        for kind, reply in zip(node.kinds, node.replies, strict=True):
            found.append((kind, set(wire.unpack(reply, 10**7)[1]), reply))
    return found


@pytest.mark.parametrize("options", [{}, {"random_features": 7, "scale": 0.2}])
def test_statistics_give_the_simulations_head(
    options: dict[str, Any], together: Callable[..., Any], tmp_path: Path
) -> None:
    site, built, engine, _ = together(
        strategy={"name": "fed3r", **options}, clients={"fraction": 0.67}, rounds=6
    )
    real = trained(replace(built.federation, engine=engine), tmp_path / "real")
    same_state(real, trained(built.federation, tmp_path / "run"))
    assert real.slots["reported"].tolist() == [1, 1, 1]
    idle = {"head.weight", "head.bias"}  # the start: a head of no epoch, as it was sent
    sums = {"head.counts", "head.sums", "head.gram"}
    sent = [tensors for kind, tensors, _ in asked(site) if kind == "train"]
    assert {frozenset(n for n in one if n.startswith("head.")) for one in sent} <= {
        frozenset(idle), frozenset(sums)
    }  # fmt: skip
    assert sum(sums <= one for one in sent) == 3, "each client reports once"


def test_who_joined_for_statistics_does_not_train(together: Callable[..., Any]) -> None:
    site, _, _, _ = together(strategy={"name": "fed3r"})
    ids, keys = np.zeros(1, np.int64), np.zeros(1, np.uint64)
    plan = RoundPlan(1, ids, keys, local_training(site.scenario, 1))
    for host in site.hosts.values():
        host.consent(replace(plan, task="statistics", statistics=Statistics()))
        with pytest.raises(SecurityRefusal, match="asks for train"):
            host.consent(plan)


MLP = {"kind": "mlp", "hidden": [4]}
MEANS = {"kind": "prototype", "initial": "class_means"}
HIDDEN = {"hidden.0.weight", "hidden.0.bias"}


@pytest.mark.parametrize(
    ("name", "head", "shared"),
    [
        ("ditto", {"kind": "linear"}, {"weight", "bias"}),
        ("fedper", MLP, HIDDEN),
        ("fedrep", MLP, HIDDEN),
    ],
)
def test_what_is_the_clients_own_stays_there(
    name: str, head: dict[str, Any], shared: set[str], together: Callable[..., Any], tmp_path: Path
) -> None:
    site, built, engine, store = together(strategy={"name": name}, head=head, rounds=3)
    federation = built.federation
    state = trained(replace(federation, engine=engine), tmp_path / "real")
    same_state(state, trained(federation, tmp_path / "run"))
    personal = personal_of(federation.strategy, state)
    assert personal is not None
    ids = np.arange(3)
    keys = seeding.client_keys(site.scenario.seed, "personal", 4, ids)
    plan = RoundPlan(4, ids, keys, local_training(site.scenario, 1), personal=personal)
    mine: ClientMetrics = engine.judge_personal(state.result, plan)
    theirs, _ = judge_personal(built.population, state.result, plan, store=store)
    assert mine.loss_sum.tobytes() == theirs.loss_sum.tobytes()
    assert mine.correct.tolist() == theirs.correct.tolist()

    kept = sorted((tmp_path / "kept").rglob("*.safetensors"))
    assert {path.relative_to(tmp_path / "kept").parts[0] for path in kept} == set(NAMES)
    own = [row for path in kept for row in rows(load_file(path))]
    assert len(own) > 3 * 3 * 3
    replies = asked(site)
    for kind, tensors, content in replies:
        assert not any(row in content for row in own), kind
        heads = {n.removeprefix("head.") for n in tensors if n.startswith("head.")}
        everything = kind == "train" and heads == set(federation.head)  # the start, of no epoch
        assert heads == (shared if kind == "train" else set()) or everything
    assert sum(kind == "train" and f"head.{min(shared)}" in t for kind, t, _ in replies) >= 9
    last = [tensors for kind, tensors, _ in replies if kind == "personal"]
    assert last == [{"clients", "loss_sum", "correct", "count"}] * 3


def rows(tensors: dict[str, np.ndarray]) -> list[bytes]:
    """Pieces that a reply would hold, were one of these tensors in it."""
    return [row.tobytes() for tensor in tensors.values() for row in np.atleast_2d(tensor)]


COMPARED = {"references": ["local_only", "fine_tuned", "centralised", "best_client", "start"]}


@pytest.mark.parametrize(
    ("strategy", "head", "heads"),
    [
        ({"name": "fedavg"}, {"kind": "linear"}, {"federated", "fine_tuned"}),
        ({"name": "fed3r"}, {"kind": "linear"}, {"federated", "fine_tuned"}),
        ({"name": "personal_ridge"}, {"kind": "linear"}, {"federated", "fine_tuned", "personal"}),
        ({"name": "fedper"}, MLP, {"federated", "personal"}),
        ({"name": "fedavg"}, MEANS, {"federated", "fine_tuned"}),
    ],
)
def test_the_clients_count_the_pairs_that_a_simulation_counts(
    strategy: dict[str, Any], head: dict[str, Any], heads: set[str], together: Any, tmp_path: Path
) -> None:
    site, built, engine, store = together(
        strategy=strategy, head=head, rounds=3, evaluation=COMPARED
    )
    real = replace(built.federation, engine=engine)
    state = trained(real, tmp_path / "real")
    same_state(state, trained(built.federation, tmp_path / "run"))
    personal = personal_of(built.federation.strategy, state)
    outcome = Outcome(state.result, personal, 3, start=start_of(state))
    told: list[str] = []
    there = judge_remotely(real, engine, told.append)(outcome, print, lambda: None)
    here = Judging(built, 1, store)(outcome, print, lambda: None)
    assert set(there.compared) == set(here.compared) == heads
    for name in heads:
        mine, theirs = here.compared[name].home, there.compared[name].home
        for column in ("beats", "loses", "examples"):
            np.testing.assert_array_equal(getattr(mine, column), getattr(theirs, column))
        assert there.compared[name].everyone is None
        assert here.compared[name].everyone is not None
    assert set(there.heads) == set(here.heads) - {"centralised", "best_client"}
    for name, judgement in there.heads.items():
        assert judgement.own.accuracy.tolist() == here.heads[name].own.accuracy.tolist()
    assert there.calibration is None
    assert len(told) == 2  # why two references are not here
    replies = [tensors for kind, tensors, _ in asked(site) if kind == "alone"]
    assert replies == [{"clients", "loss_sum", "correct", "count", "beats", "loses"}] * 3

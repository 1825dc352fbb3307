"""Adaptation at real clients: the same bits as in simulation, or a refusal that says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.build import make_federation, open_data
from fedtl.clients.personal import judge_personal
from fedtl.engines.flower_engine import FlowerEngine
from fedtl.errors import InputError
from fedtl.evaluation.personalised import last_plan
from fedtl.planning import local_training, personal_at_end, plan_round
from fedtl.scenario.adaptation_rules import check_real
from fedtl.types import Population

NAMES = ("north", "east", "west")


def same(mine: Population, simulated: Population, client: int) -> None:
    for split in ("train", "test"):
        own, other = mine.client(0, split), simulated.client(client, split)
        assert own.features.tobytes() == other.features.tobytes()
        assert own.labels.tobytes() == other.labels.tobytes()


def engine_of(site: Any) -> tuple[FlowerEngine, Any]:
    gathering = site.gathering()
    gathered = gathering.gather()
    engine = FlowerEngine(site.exchange, gathered.roster, gathering.seat, gathered.seats, real=True)
    return engine, gathered


@pytest.fixture
def together(make_site: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Three clients with features and labels of their own, and the same in simulation."""
    rng = np.random.default_rng(1)
    whose = np.array(NAMES)[rng.integers(0, 3, 150)]
    y = (rng.integers(0, 4, 150) // (1 + (whose == "west"))) % 3
    x = (rng.normal(size=(150, 5)) + 3 * (whose == "east")[:, None]).astype(np.float32)
    x[np.arange(150), y] += 1.5
    np.savez(tmp_path / "all.npz", x=x, y=y, client=whose)

    def make(**adaptation: Any) -> Any:
        site = make_site(
            data={"source": "arrays", "path": str(tmp_path / "all.npz"), "domains": False},
            clients={"partition": "natural"},
            backbone={"name": "identity", "weights": "default", "image_size": None},
            training={"local_epochs": 2, "batch_size": 8, "learning_rate": 0.1},
            adaptation=adaptation,
        )
        for name in NAMES:
            mine = whose == name
            np.savez(tmp_path / f"{name}.npz", x=x[mine], y=y[mine])
            site.add(name, tmp_path / f"{name}.npz", keeps=tmp_path / "kept" / name)
        return site, make_federation(open_data(site.scenario))

    return make


@pytest.mark.parametrize("kind", ["standardise", "whiten"])
def test_features_are_aligned_where_they_are(kind: str, together: Callable[..., Any]) -> None:
    site, built = together(features=kind, allow_label_skew=True)
    _, gathered = engine_of(site)
    raw = make_federation(open_data(unadapted(site.scenario))).population
    for node, clients in gathered.seats.items():
        host = site.hosts[site.names[node]]
        same(host.population(), built.population, int(clients[0]))
        assert np.abs(host.population().client(0).features.mean(axis=0)).max() < 1e-6
        assert np.abs(raw.client(int(clients[0])).features.mean(axis=0)).max() > 0.1


def unadapted(scenario: Any) -> Any:
    none = scenario.adaptation.model_copy(update={"features": "none", "input": "none"})
    return scenario.model_copy(update={"adaptation": none})


def test_pixels_are_matched_where_they_are(
    make_site: Callable[..., Any], draw: Callable[..., Path], tmp_path: Path
) -> None:
    # one with more training images than are sampled, one with an image that cannot be read
    counts = {"bern/cat": 45, "bern/dog": 40, "oslo/dog": 5, "oslo/cat": 6}
    root = draw(tmp_path / "all", counts)
    (root / "oslo/cat/bad.png").write_bytes(b"not an image")
    site = make_site(
        data={"path": str(root), "on_bad_file": "skip"},
        backbone={"extraction": "torch"},
        adaptation={"input": "match"},
    )
    built = make_federation(open_data(site.scenario))
    for domain in ("bern", "oslo"):
        site.add(domain, root / domain)
    _, gathered = engine_of(site)
    for node, clients in gathered.seats.items():
        host = site.hosts[site.names[node]]
        same(host.population(), built.population, int(clients[0]))
    assert built.features.examples.fingerprint != open_data(site.scenario).examples.fingerprint
    assert "left out 1 image" in " ".join(built.features.notes)


def test_balanced_softmax_needs_nobody_elses_frequencies(together: Callable[..., Any]) -> None:
    site, built = together(prior="balanced_softmax", prior_strength=1.5)
    engine, _ = engine_of(site)
    federation = built.federation
    state = federation.strategy.init(federation.head, 3)
    plan = plan_round(site.scenario, 3, federation.strategy, state, 1)
    assert plan.training.prior_strength == 1.5
    [here] = federation.engine.run_clients(plan, federation.head)
    for reply in engine.run_clients(plan, federation.head):
        for i, client in enumerate(reply.clients.tolist()):
            for name, tensor in reply.tensors.items():
                assert tensor[i].tobytes() == here.tensors[name][client].tobytes()
    training = dataclasses.replace(plan.training, prior_strength=0.0)
    [plain] = federation.engine.run_clients(
        dataclasses.replace(plan, training=training), federation.head
    )
    assert not np.allclose(plain.tensors["bias"], here.tensors["bias"], atol=1e-3)


def test_logit_adjustment_is_judged_at_home(together: Callable[..., Any]) -> None:
    site, built = together(prior="logit_adjustment")
    engine, _ = engine_of(site)
    assert all("personal" in host._session.tasks for host in site.hosts.values())
    federation, clients = built.federation, np.arange(3)
    state = federation.strategy.init(federation.head, 3)
    plan = plan_round(site.scenario, 3, federation.strategy, state, 1)
    state = federation.strategy.step(state, trained(federation, plan))
    personal = personal_at_end(site.scenario, federation.strategy, state, 3)
    last = last_plan(personal, local_training(site.scenario, 1), 1, 5, clients)
    mine = engine.judge_personal(state.head, last)
    here, _ = judge_personal(built.population, state.head, last)
    assert (mine.correct == here.correct).all()
    assert mine.loss_sum.tobytes() == here.loss_sum.tobytes()
    assert mine.loss_sum.tobytes() != engine.evaluate(state.head, clients).loss_sum.tobytes()


def trained(federation: Any, plan: Any) -> Any:
    [updates] = federation.engine.run_clients(plan, federation.head)
    return dataclasses.replace(updates, training=plan.training)


@pytest.mark.parametrize(
    ("adaptation", "message"),
    [
        ({"features": "coral", "allow_label_skew": True}, "everybody's features"),
        ({"features": "whiten"}, "nobody knows real clients' class frequencies"),
        ({"prior": "bbse"}, "confusion matrix"),
        ({"adversarial": 0.5}, "which domain they are of"),
    ],
)
def test_what_needs_everybodys_data_is_refused(
    adaptation: dict[str, Any], message: str, make_site: Callable[..., Any]
) -> None:
    site = make_site(adaptation=adaptation)
    with pytest.raises(InputError, match=message) as error:
        check_real(site.scenario)
    assert error.value.where.startswith("adaptation.")
    check_real(unadapted(make_site().scenario))


def test_a_server_that_asks_for_it_all_the_same(together: Callable[..., Any]) -> None:
    site, _ = together(features="coral", allow_label_skew=True)
    with pytest.raises(Exception, match=r"everybody's covariance|no client|left"):
        engine_of(site)
    assert any("everybody's covariance" in reason for _, reason in site.watcher.of("left"))

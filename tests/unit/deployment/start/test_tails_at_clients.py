"""What is trained behind the cut at real clients is, to the last bit, what a simulation trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fedtl.build import make_federation, open_data
from fedtl.clients.personal_store import PersonalStore
from fedtl.conduct import Outcome
from fedtl.deployment.judging import judge_remotely
from fedtl.deployment.terms import make_terms
from fedtl.engines import wire
from fedtl.engines.flower_engine import FlowerEngine
from fedtl.interrupts import Interrupts
from fedtl.judging import Judging
from fedtl.results.runs import RunFolder
from fedtl.rounds import Federation, run_rounds
from fedtl.strategies.base import ServerState, personal_of
from fedtl.strategies.local_norms import norms_of
from tests.killed import killed_at

NAMES = ("north", "east", "west")


def gathered_engine(site: Any, **changes: Any) -> FlowerEngine:
    """The server's way to the clients that are there."""
    gathering = site.gathering(**changes)
    found = gathering.gather()
    return FlowerEngine(site.exchange, found.roster, gathering.seat, found.seats, real=True)


def trained(federation: Federation, folder: RunFolder) -> ServerState:
    try:
        federation.engine.start(federation.head)
        return run_rounds(federation, folder, lambda row, updates: None, Interrupts())[0]
    finally:
        folder.release()


@pytest.mark.parametrize("norms", ["local", "aggregated"])
def test_pictures(
    norms: str, make_site: Callable[..., Any], draw: Callable[..., Path], tmp_path: Path
) -> None:
    """The head warms up, then a block of the network is trained. Server and clients are killed when
    clients have kept what is theirs of a round that is not committed, and come back."""
    counts = {f"{name}/{kind}": 3 + i for i, name in enumerate(NAMES) for kind in ("cat", "dog")}
    root = draw(tmp_path / "all", counts)
    site = make_site(
        rounds=3,
        seed=2,
        data={"path": str(root)},
        clients={"fraction": 0.67},
        backbone={"name": "shufflenet_v2_x0_5", "weights": "none", "extraction": "torch"},
        transfer={"mode": "last_blocks", "cut": 1, "batch_norm": norms, "warmup_rounds": 1},
        training={"local_epochs": 2, "batch_size": 3, "learning_rate": 0.1},
        evaluation={"references": ["local_only"]},
    )
    for name in NAMES:
        site.add(name, root / name, keeps=tmp_path / "kept" / name)
    store = PersonalStore(tmp_path / "simulated")
    built = make_federation(open_data(site.scenario), store=store)
    here = trained(built.federation, RunFolder.create(tmp_path / "run", ""))
    real = replace(built.federation, engine=gathered_engine(site))
    with killed_at("before_commit:kill:3"):
        trained(real, RunFolder.create(tmp_path / "real", ""))
    replies = [reply for node in site.nodes.values() for reply in node.replies]
    for node, name in site.names.items():
        site.hosts[name].close()
        site.add(name, root / name, node, keeps=tmp_path / "kept" / name)
    engine = gathered_engine(site, expected=NAMES)
    real = replace(real, engine=engine)
    there = trained(real, RunFolder.reopen(tmp_path / "real"))
    assert {n: t.tobytes() for n, t in there.head.items()} == {
        n: t.tobytes() for n, t in here.head.items()
    }
    own = set(norms_of(built.federation.head))
    moved = {n for n, t in there.head.items() if (t != built.federation.head[n]).any()}
    assert own
    assert moved == set(there.head) - (own if norms == "local" else set())

    outcome = Outcome(there.result, personal_of(real.strategy, there), 3)
    mine = judge_remotely(real, engine, print)(outcome, print, lambda: None)
    theirs = Judging(built, 32, store)(outcome, print, lambda: None)
    assert set(mine.heads) == set(theirs.heads)
    for name, judgement in mine.heads.items():
        assert judgement.own.accuracy.tolist() == theirs.heads[name].own.accuracy.tolist()
        assert judgement.own.loss.tolist() == theirs.heads[name].own.loss.tolist()

    kept = sorted((tmp_path / "kept").rglob("*.safetensors"))
    assert bool(kept) == (norms == "local")
    if not kept:
        return
    secret = {t.tobytes() for path in kept for n, t in load_file(path).items() if "running" in n}
    secret -= {built.federation.head[n].tobytes() for n in own}
    assert secret
    for reply in [*replies, *(reply for node in site.nodes.values() for reply in node.replies)]:
        assert not any(one in reply for one in secret)
        sent = {n.removeprefix("head.") for n in wire.unpack(reply, 10**8)[1]}
        assert not sent & own or sent >= set(there.head)  # the start: as it was sent, untrained


def test_from_scratch_no_weights_are_looked_for_or_sent(
    make_site: Callable[..., Any], draw: Callable[..., Path], tmp_path: Path
) -> None:
    """Although backbone.weights is left at its default, which means pretrained ones elsewhere."""
    root = draw(tmp_path / "all", {"north/cat": 4, "north/dog": 4})
    site = make_site(
        data={"path": str(root)},
        backbone={"name": "shufflenet_v2_x0_5", "extraction": "torch"},
        transfer={"mode": "scratch", "batch_norm": "group"},
    )
    site.add("north", root / "north")
    gathering = site.gathering()
    roster = gathering.gather().roster
    assert make_terms(site.scenario, gathering.backbone)["backbone"]["weights"] == "random"
    assert site.watcher.of("weights") == []
    built = make_federation(open_data(site.scenario))
    assert gathering.backbone.weights_hash == built.federation.identity["weights_sha256"]
    assert roster.width == built.population.width

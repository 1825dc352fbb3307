"""A real client's data are, to the last bit, those of the same client in simulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.build import Built, make_federation, open_data
from fedtl.engines.flower_engine import FlowerEngine
from fedtl.plans import RoundPlan
from fedtl.types import LocalTraining, Population

TRUNKS = {
    "efficientnet_lite0": {"name": "efficientnet_lite0", "weights": "default"},
    "mobilenet_v2": {"name": "mobilenet_v2", "weights": "mobilenet_v2-b0353104.pth"},
}


def same(mine: Population, simulated: Population, client: int) -> None:
    """Every row of one client: features' bits, labels, order and split."""
    for split in ("train", "test"):
        own, other = mine.client(0, split), simulated.client(client, split)
        assert own.features.dtype == other.features.dtype
        assert own.features.tobytes() == other.features.tobytes()
        assert own.labels.tobytes() == other.labels.tobytes()
        assert len(np.unique(own.features)) > 20
    assert mine.classes == simulated.classes
    assert mine.names == (simulated.names[client],)


def gathered_like(site: Any, built: Built) -> None:
    """All clients of a site against the simulation, by name."""
    gathered = site.gathering().gather()
    roster, simulated = gathered.roster, built.population.roster()
    assert (roster.names, roster.domains, roster.classes, roster.width) == (
        simulated.names,
        simulated.domains,
        simulated.classes,
        simulated.width,
    )
    assert (roster.train == simulated.train).all()
    assert (roster.test == simulated.test).all()
    for node, clients in gathered.seats.items():
        host = site.hosts[site.names[node]]
        same(host.population(), built.population, int(clients[0]))
    trains_alike(site, gathered, built)


def trains_alike(site: Any, gathered: Any, built: Built) -> None:
    """A round and an evaluation through the nodes, and through the local engine."""
    federation = built.federation
    clients = np.arange(gathered.roster.num_clients)
    training = LocalTraining(epochs=2, batch_size=4, learning_rate=0.1, momentum=0.9)
    plan = RoundPlan(1, clients, clients.astype(np.uint64) + 7, training)
    engine = FlowerEngine(site.exchange, gathered.roster, lambda nodes: {}, gathered.seats)
    replies = [r for r in engine.run_clients(plan, federation.head) if len(r.clients)]
    [local] = [r for r in federation.engine.run_clients(plan, federation.head) if len(r.clients)]
    assert sorted(int(r.clients[0]) for r in replies) == clients.tolist()
    for reply in replies:
        place = int(reply.clients[0])
        for name, tensor in reply.tensors.items():
            assert tensor[0].tobytes() == local.tensors[name][place].tobytes()
    mine = engine.evaluate(federation.head, clients)
    theirs = federation.engine.evaluate(federation.head, clients)
    assert (mine.correct == theirs.correct).all()
    assert mine.loss_sum.tobytes() == theirs.loss_sum.tobytes()


@pytest.mark.parametrize("way", ["onnx", "torch"])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_pacs(
    trunk: str,
    way: str,
    make_site: Callable[..., Any],
    unpack: Callable[..., Path],
    own_cache: Callable[[str], Path],
    shared_data: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    backbone = {**TRUNKS[trunk], "image_size": 96, "extraction": way}
    if backbone["weights"] != "default":
        backbone["weights"] = str(shared_data(f"weights/{backbone['weights']}"))
    archive = shared_data("pacs/pacs96_full.zip")
    root = unpack(archive, tmp_path / "pacs", classes=3, each=5)
    site = make_site(
        backbone=backbone, data={"path": str(root), "leakage": "allow"}, engine={"threads": 2}
    )
    own_cache("server")
    built = make_federation(open_data(site.scenario))
    own_cache("clients")
    for domain in ("sketch", "photo", "cartoon", "art_painting"):
        site.add(domain, root / domain)
    gathered_like(site, built)
    # MobileNet's weights are not at the clients: each piece came once, to one cache they share
    weights = site.watcher.of("weights")
    assert bool(weights) == (trunk == "mobilenet_v2")
    if weights:
        kept = [path.name for path in (tmp_path / "clients/weights").iterdir()]
        assert kept == [site.gathering().backbone.weights_hash + ".pth"]


def test_ragged_classes_and_a_split_of_their_own(
    make_site: Callable[..., Any], draw: Callable[..., Path], tmp_path: Path
) -> None:
    """A client of one class, classes that others lack, names beyond ASCII, a bad image skipped."""
    root = draw(
        tmp_path / "all",
        {
            "bern/cat": 9, "bern/dog": 4, "bern/élan": 3, "oslo/dog": 11, "rom/cat": 3,
            "rom/dog": 2, "rom/zebra": 17,
        },
    )  # fmt: skip
    (root / "rom/cat/secret 1.png").write_bytes(b"not an image")
    site = make_site(
        data={"path": str(root), "on_bad_file": "skip", "test_fraction": 0.35},
        backbone={"feature_dtype": "float16", "extraction": "torch"},
    )
    built = make_federation(open_data(site.scenario))
    for domain in ("rom", "bern", "oslo"):
        site.add(domain, root / domain)
    gathered_like(site, built)
    assert "left out 1 image: cat/secret 1.png" in " ".join(site.told["rom"])


@pytest.mark.parametrize("kind", ["npz", "csv"])
@pytest.mark.parametrize("split", [False, True])
def test_features_in_tables(
    kind: str, split: bool, make_site: Callable[..., Any], tmp_path: Path
) -> None:
    """Labels 0 to 11 stay in numeric order although no client has them all."""
    rng = np.random.default_rng(1)
    columns = {
        "x": rng.normal(size=(240, 5)).astype(np.float32),
        "y": rng.integers(0, 12, 240),
        "client": np.array(["north", "east", "west"])[rng.integers(0, 3, 240)],
    }
    columns["y"][columns["client"] == "east"] %= 7
    if split:
        columns["split"] = rng.random(240) < 0.3
    np.savez(tmp_path / "all.npz", **columns)
    site = make_site(
        data={"source": "arrays", "path": str(tmp_path / "all.npz"), "domains": False},
        clients={"partition": "natural"},
        backbone={"name": "identity", "weights": "default", "image_size": None},
    )
    built = make_federation(open_data(site.scenario))
    for name in ("west", "north", "east"):
        rows = columns["client"] == name
        mine = {key: column[rows] for key, column in columns.items() if key != "client"}
        path = tmp_path / f"{name}.{kind}"
        if kind == "npz":
            np.savez(path, **mine)
        else:
            write_csv(path, mine)
        site.add(name, path)
    gathered_like(site, built)


def write_csv(path: Path, columns: dict[str, np.ndarray]) -> None:
    words = [key for key in columns if key != "x"]
    lines = [",".join([f"f{i}" for i in range(5)] + words)]
    for i, row in enumerate(columns["x"]):
        values = [str(value) for value in row] + [str(columns[key][i]) for key in words]
        lines.append(",".join(values))
    path.write_text("\n".join(lines))

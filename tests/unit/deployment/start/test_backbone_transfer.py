"""The backbone travels once, in pieces, and only as what was announced."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.deployment import backbone_transfer
from fedtl.deployment.backbone_transfer import (
    PIECE_BYTES,
    Announcement,
    Reception,
    announce,
    find_weights,
    read_announcement,
    read_piece,
)
from fedtl.errors import EnvironmentFault, FedtlError, InputError, PolicyStop, SecurityRefusal
from fedtl.scenario import schema
from fedtl.transfer.backbones import open_backbone

CLASSES = {"cat": 6, "dog": 5}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file of five pieces, the last one short."""
    from safetensors.torch import save_file
    from torchvision import models

    path = tmp_path_factory.mktemp("server") / "squeezenet.safetensors"
    save_file(models.squeezenet1_1(weights=None).state_dict(), path)
    assert 4 * PIECE_BYTES < path.stat().st_size < 5 * PIECE_BYTES
    return path


def section(weights: Path, **changes: Any) -> schema.Backbone:
    return schema.Backbone(name="squeezenet1_1", weights=str(weights), image_size=32, **changes)


@pytest.fixture
def wanted(weights: Path) -> Announcement:
    backbone = open_backbone(section(weights), 0)
    return read_announcement(announce(backbone, section(weights)))


@pytest.fixture
def site(
    weights: Path, make_site: Callable[..., Any], own_cache: Callable[[str], Path], draw: Any,
    tmp_path: Path,
) -> Any:  # fmt: skip
    """Two clients with data; every test has its own cache."""
    own_cache("clients")
    site = make_site(backbone=section(weights).model_dump())
    for name in ("a", "b"):
        draw(tmp_path / name, CLASSES, ord(name))
        site.add(name, tmp_path / name)
    return site


def kept(tmp_path: Path) -> list[str]:
    """What lies in the clients' folder of weights."""
    folder = tmp_path / "clients/weights"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def pieces_sent(site: Any) -> int:
    return sum(t.messages for (_, kind), t in site.exchange.traffic().items() if kind == "weights")


def test_what_is_announced(wanted: Announcement, weights: Path) -> None:
    facts = announce(open_backbone(section(weights), 0), section(weights))
    assert facts["num_bytes"] == weights.stat().st_size
    assert str(weights.parent) not in str(facts)
    assert wanted.count == 5


def test_once_in_pieces_and_never_again(
    site: Any, weights: Path, tmp_path: Path, draw: Any
) -> None:
    gathered = site.gathering().gather()
    sha = site.gathering().backbone.weights_hash
    assert kept(tmp_path) == [f"{sha}.safetensors"]
    assert (tmp_path / "clients/weights" / kept(tmp_path)[0]).read_bytes() == weights.read_bytes()
    for node, name in site.names.items():
        travelled = site.exchange.traffic()[node, "weights"]
        own = [done for who, done, _ in site.watcher.of("weights") if who == name]
        assert own == [1, 2, 3, 4, 5]
        assert weights.stat().st_size < travelled.sent < weights.stat().st_size + 5 * 1000
    # both restarted, the server too; then another client on the same machine
    before = pieces_sent(site)
    for node, name in list(site.names.items()):
        site.add(name, tmp_path / name, node)
    site.add("c", draw(tmp_path / "c", CLASSES, 9))
    again = site.gathering().gather()
    assert pieces_sent(site) == before == 10
    assert [again.facts[n]["fingerprint"] for n in "ab"] == [
        gathered.facts[n]["fingerprint"] for n in "ab"
    ]


def test_a_file_that_torch_keeps_is_not_sent(site: Any, weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clients/torch/hub/checkpoints"
    folder.mkdir(parents=True)
    (folder / "other.pth").write_bytes(b"another")
    (folder / "mine.safetensors").write_bytes(weights.read_bytes())
    (folder / "same size.pth").write_bytes(bytes(weights.stat().st_size))
    site.gathering().gather()
    assert pieces_sent(site) == 0
    assert kept(tmp_path) == []


def test_a_kept_file_that_changed_is_sent_anew(site: Any, weights: Path, tmp_path: Path) -> None:
    site.gathering().gather()
    path = tmp_path / "clients/weights" / kept(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    for node, name in list(site.names.items()):
        site.add(name, tmp_path / name, node)
    site.gathering().gather()
    assert path.read_bytes() == weights.read_bytes()


def test_a_restart_on_the_way(site: Any, weights: Path, tmp_path: Path) -> None:
    del site.nodes[99], site.names[99]
    asked: list[str] = []

    def die(kind: str) -> None:
        asked.append(kind)
        if asked.count("weights") == 3 and kind == "weights":
            asking = site.nodes[100]
            site.hosts["a"]._reception._file.close()  # killed: its part stays
            site.add("a", tmp_path / "a", 100)
            asking.node = site.nodes[100].node

    site.nodes[100].before = die
    site.gathering().gather()
    assert kept(tmp_path) == [f"{site.gathering().backbone.weights_hash}.safetensors"]
    assert pieces_sent(site) == 3 + 5


def test_another_content_is_discarded(site: Any, weights: Path, tmp_path: Path) -> None:
    """The server's file changed after it was announced: right size, other bytes."""
    gathering = site.gathering()
    content = bytearray(weights.read_bytes())
    try:
        weights.write_bytes(bytes(len(content)))
        with pytest.raises(PolicyStop, match="do not have the announced hash"):
            gathering.gather()
    finally:
        weights.write_bytes(content)
    assert kept(tmp_path) == []


def test_a_server_that_lies_gets_nowhere(
    wanted: Announcement, own_cache: Callable[[str], Path], tmp_path: Path
) -> None:
    own_cache("clients")
    good = {"sha256": wanted.sha256, "index": 0, "count": 5, "num_bytes": wanted.num_bytes}
    whole = np.zeros(PIECE_BYTES, np.uint8)
    lies = [
        ({**good, "num_bytes": 7}, whole),
        ({**good, "count": 10**9}, whole),
        ({**good, "sha256": "0" * 64}, whole),
        (good, None),
        (good, np.zeros(PIECE_BYTES + 1, np.uint8)),
        (good, np.zeros(PIECE_BYTES - 1, np.uint8)),
        (good, np.zeros(PIECE_BYTES, np.float32)),
        (good, np.zeros((1, PIECE_BYTES), np.uint8)),
    ]
    for facts, piece in lies:
        reception = Reception(wanted, "a")
        with pytest.raises(SecurityRefusal):
            reception.take(facts, piece)
        reception.close()
        assert kept(tmp_path) == []


def test_pieces_out_of_order_are_passed_over(
    wanted: Announcement, weights: Path, own_cache: Callable[[str], Path], tmp_path: Path
) -> None:
    own_cache("clients")
    reception = Reception(wanted, "a")
    good = {"sha256": wanted.sha256, "count": 5, "num_bytes": wanted.num_bytes}
    following = [
        reception.take({**good, "index": index}, piece_of(weights, index))
        for index in (3, 0, 0, True, -1, None, 1, 2, 10**30, 3, 2)
    ]
    assert following == [0, 1, 1, 1, 1, 1, 2, 3, 3, 4, 4]
    assert reception.take({**good, "index": 4}, read_piece(weights, 4)) == 5
    assert find_weights(wanted) is not None


def piece_of(weights: Path, index: Any) -> Any:
    return read_piece(weights, index if type(index) is int and 0 <= index < 5 else 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_bytes": 10**13}, {"num_bytes": 0}, {"num_bytes": -1}, {"num_bytes": 5.0},
        {"num_bytes": None}, {"num_bytes": True}, {"suffix": ".py"}, {"suffix": "/../x.pth"},
        {"sha256": "../../../../tmp/x"}, {"sha256": "A" * 64}, {"sha256": "a" * 63},
        {"sha256": 7}, {"sha256": "a" * 64 + "\n"},
    ],
    ids=str,
)  # fmt: skip
def test_announcements_that_are_refused(weights: Path, changes: dict[str, Any]) -> None:
    facts = announce(open_backbone(section(weights), 0), section(weights))
    if "sha256" in changes:
        facts["identity"]["weights"] = changes["sha256"]
    else:
        facts |= changes
    with pytest.raises(SecurityRefusal, match="the announced weights"):
        read_announcement(facts)


def test_nothing_is_written_elsewhere(site: Any, tmp_path: Path) -> None:
    written: list[str] = []
    watching = True

    def watch(event: str, arguments: Any) -> None:
        if not watching:  # a hook stays for ever
            return
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            written.append(str(arguments[0]))
        if event in ("os.rename", "os.link", "os.symlink", "os.mkdir"):
            written.append(str(arguments[0 if event == "os.mkdir" else 1]))

    sys.addaudithook(watch)
    try:
        site.gathering().gather()
    finally:
        watching = False
    weights = [path for path in written if "/weights" in path]
    assert weights
    assert all(path.startswith(str(tmp_path / "clients/weights")) for path in weights)
    elsewhere = [path for path in written if not path.startswith((str(tmp_path), "/dev/null"))]
    assert elsewhere == []


@pytest.mark.parametrize(
    "own",
    [
        {"name": "efficientnet_lite0"},
        {"name": "efficientnet_lite0", "weights": "none"},
        {"name": "squeezenet1_1", "weights": "none"},
    ],
    ids=str,
)
def test_packaged_and_random_weights_are_never_sent(
    own: dict[str, str], make_site: Callable[..., Any], own_cache: Any, draw: Any, tmp_path: Path
) -> None:
    own_cache("clients")
    site = make_site(backbone={"image_size": 32, "weights": "default", **own})
    site.add("a", draw(tmp_path / "a", CLASSES))
    site.gathering().gather()
    assert pieces_sent(site) == 0
    assert not (tmp_path / "clients/weights").exists()


def test_no_room_for_them(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = shutil.disk_usage("/")
    monkeypatch.setattr(backbone_transfer.shutil, "disk_usage", lambda _: used._replace(free=10**6))
    with pytest.raises(PolicyStop, match="not enough disk for the weights: 1,000,000 bytes are"):
        site.gathering().gather()
    assert kept(tmp_path) == []


def test_a_full_disk_on_the_way(wanted: Announcement, own_cache: Any, tmp_path: Path) -> None:
    own_cache("clients")
    reception = Reception(wanted, "a")
    reception._file.close()
    reception._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    good = {"sha256": wanted.sha256, "count": 5, "num_bytes": wanted.num_bytes, "index": 0}
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        reception.take(good, np.zeros(PIECE_BYTES, np.uint8))
    reception.close()
    assert kept(tmp_path) == []


def test_closing_a_client_leaves_no_part(site: Any, weights: Path, tmp_path: Path) -> None:
    def stop(kind: str) -> None:
        if site.watcher.of("weights")[-1:] == [("a", 2, 5)]:
            raise KeyboardInterrupt

    for node in site.nodes.values():
        node.before = stop
    with pytest.raises(KeyboardInterrupt):
        site.gathering().gather()
    assert kept(tmp_path) != []
    site.close()
    assert kept(tmp_path) == []


def test_another_backbone_is_named(wanted: Announcement, weights: Path) -> None:
    other = dict(wanted.identity)
    other["preprocessing"] = {**other["preprocessing"], "crop": 33}
    changed = Announcement(wanted.section, "file", other, wanted.sha256, ".safetensors", 1)
    with pytest.raises(InputError, match=r"preprocessing\.crop: 33 there, 32 here"):
        changed.open(weights, 0)


def test_weights_that_are_no_weights(
    make_site: Callable[..., Any], own_cache: Any, draw: Any, tmp_path: Path
) -> None:
    """A pickle that would run code: sent with its true hash, and still not run."""

    class Evil:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {tmp_path / 'canary'}",))

    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps(Evil(), 2))
    own_cache("clients")
    site = make_site(backbone={"name": "squeezenet1_1", "weights": str(path), "image_size": 32})
    site.add("a", draw(tmp_path / "a", CLASSES))
    with pytest.raises(PolicyStop, match="more than tensors"):
        site.gathering().gather()
    assert not (tmp_path / "canary").exists()


def test_errors_are_ours(tmp_path: Path) -> None:
    for odd in (None, 3, {}, {"identity": 3}, {"identity": {}, "weights": "file"}):
        with pytest.raises(FedtlError):
            read_announcement(odd)
    with pytest.raises(FedtlError):
        read_piece(tmp_path / "none", 0)

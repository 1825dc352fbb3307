"""What a client with private data says, and what it never says."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.data.images import FileImages
from fedtl.deployment.host import PrivateHost
from fedtl.deployment.private_data import load_private
from fedtl.deployment.terms import make_terms
from fedtl.engines.node import NotPrepared
from fedtl.errors import FedtlError, InputError, PolicyStop, SecurityRefusal
from fedtl.plans import Personal, RoundPlan, Statistics
from fedtl.transfer.backbones import open_backbone
from fedtl.types import LocalTraining

PRIVATE = ("topsecret", "secret", "smith", "31337", "/")
"""What stands in paths, file names and cells here; no reply may hold any of it."""


def spilled(site: Any) -> list[str]:
    """What of the private words is in any reply of any node."""
    texts = [reply.decode("latin-1") for node in site.nodes.values() for reply in node.replies]
    assert texts
    facts = [json.loads(json.loads(text[8:])["__metadata__"]["fedtl"]) for text in texts]
    for fact in facts:
        fact.pop("cpu", None)  # a processor's name may have a slash
    return [word for word in PRIVATE if word in json.dumps(facts)]


def test_nothing_private_is_told(
    make_site: Callable[..., Any], draw: Callable[..., Path], tmp_path: Path
) -> None:
    site = make_site()
    site.add("a", draw(tmp_path / "topsecret" / "a", {"cat": 6, "dog": 5}))
    site.add("b", draw(tmp_path / "topsecret" / "b", {"dog": 7}, 1))
    gathered = site.gathering().gather()
    assert gathered.roster.names == ("a", "b")
    assert spilled(site) == []
    assert set(gathered.facts["b"]) == {
        "name", "classes", "numbered", "examples", "versions", "cpu", "device", "threads",
        "has_backbone", "free_disk_bytes", "train", "test", "width", "domain",
        "left_out", "leaks", "way", "seconds", "fingerprint", "backbone",
    }  # fmt: skip


def spoil_image(root: Path) -> Path:
    (root / "cat/secret 1.png").write_bytes(b"31337")
    (root / "dog/secret 0.png").write_bytes(b"")
    return root


def leak(root: Path) -> Path:
    for path in sorted((root / "cat").iterdir()):
        (root / "cat" / f"smith {path.name}").write_bytes(path.read_bytes())
    return root


def stray(root: Path) -> Path:
    (root / "smith").mkdir()
    (root / "cat/secret 0.png").rename(root / "secret 0.png")
    return root


def link_out(root: Path) -> Path:
    (root / "cat/smith.png").symlink_to("/etc/hostname")
    return root


def table(text: str) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        path = root / "secret.csv"
        path.write_text(text)
        return path

    return write


def pickled(root: Path) -> Path:
    np.savez(root / "secret.npz", x=np.array([{"smith": 31337}] * 4), y=np.arange(4))
    return root / "secret.npz"


def odd_arrays(root: Path) -> Path:
    np.savez(root / "secret.npz", x=np.zeros((4, 2)), y=["a"] * 4, smith=np.arange(4))
    return root / "secret.npz"


BROKEN = {
    "images": (spoil_image, "2 examples cannot be read", "cat/secret 1.png"),
    "leak": (leak, "of its contents are in both train and test", "cat/smith secret"),
    "layout": (stray, "its data cannot be used", "smith"),
    "link": (link_out, "links that lead out of the data folder", "cat/smith.png"),
    "none": (lambda root: root / "smith", "its data cannot be used", "topsecret"),
    "pickle": (pickled, "Python objects", "secret.npz"),
    "arrays": (odd_arrays, "its data cannot be used", "smith"),
    "cell": (table("smith,y\n1,a\n31337x,b\n"), "its data cannot be used", "column 'smith'"),
    "kind": (table("smith,y\n1,a\n2,b\n"), "its data are features", ""),
}


@pytest.mark.parametrize(("spoil", "told", "here"), BROKEN.values(), ids=BROKEN)
def test_why_data_are_refused_is_said_here_and_not_there(
    spoil: Callable[[Path], Path],
    told: str,
    here: str,
    make_site: Callable[..., Any],
    draw: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    site = make_site()
    root = draw(tmp_path / "topsecret" / "a", {"cat": 9, "dog": 5})
    site.add("a", spoil(root))

    def clock() -> float:  # time is over once somebody was refused
        return 1e9 if site.watcher.of("refused") else time.monotonic()

    with pytest.raises(PolicyStop) as caught:
        site.gathering(clock=clock).gather()
    reasons = [why for _, why in site.watcher.of("refused") + site.watcher.of("left")]
    assert len(reasons) == 1
    assert told in reasons[0]
    assert spilled(site) == []
    assert not any(word in caught.value.line() for word in PRIVATE)
    shown = "\n".join([*site.told["a"], caplog.text])
    assert here in shown
    assert "Traceback" not in shown


def test_bad_images_are_skipped_where_the_scenario_says_so(
    make_site: Callable[..., Any], draw: Callable[..., Path], tmp_path: Path
) -> None:
    site = make_site(data={"on_bad_file": "skip"})
    site.add("a", spoil_image(draw(tmp_path / "topsecret" / "a", {"cat": 6, "dog": 5})))
    gathered = site.gathering().gather()
    assert gathered.facts["a"]["left_out"] == 2
    assert gathered.roster.train[0] + gathered.roster.test[0] == 9
    assert "cat/secret 1.png" in " ".join(site.told["a"])
    assert spilled(site) == []


def test_too_few_examples(
    make_site: Callable[..., Any], draw: Callable[..., Path], tmp_path: Path
) -> None:
    site = make_site(clients={"min_examples": 12})
    site.add("a", draw(tmp_path / "a", {"cat": 9, "dog": 5}))
    site.add("b", draw(tmp_path / "b", {"cat": 1, "cow": 3}))
    gathered = site.gathering().gather()
    why = "it has 4 examples, and the scenario wants 12 at least"
    assert gathered.left_out == {"b": why}
    assert gathered.roster.classes == ("cat", "dog")  # the cow went with b


def terms(site: Any, **changes: Any) -> dict[str, Any]:
    backbone = open_backbone(site.scenario.backbone, site.scenario.seed)
    return {**make_terms(site.scenario, backbone), "key_name": "a", "run": "1", **changes}


@pytest.fixture
def host(make_site: Callable[..., Any], draw: Callable[..., Path], tmp_path: Path) -> Any:
    site = make_site()
    host = site.add("a", draw(tmp_path / "a", {"cat": 6, "dog": 5}))
    return site, host


def test_another_name_is_refused(host: Any) -> None:
    site, mine = host
    with pytest.raises(SecurityRefusal, match="calls itself 'a', and its key is approved as 'b'"):
        mine.join(terms(site, key_name="b"))


@pytest.mark.parametrize("version", ["0.99.3", "0.0.9", None, 7])
def test_another_version_is_refused(host: Any, version: Any) -> None:
    site, mine = host
    with pytest.raises(
        FedtlError, match=r"pip install \"fedtl==.*\"' at this client|at the server"
    ):
        mine.join(terms(site, versions={"fedtl": version}))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": -1}, {"seed": "x"}, {"test_fraction": 1.5}, {"max_pixels": 0},
        {"leakage": "perhaps"}, {"min_examples": None}, {"scenario": "../x"}, {"backbone": None},
        {"backbone": {"identity": {}, "weights": "odd"}},
    ],
    ids=str,
)  # fmt: skip
def test_odd_terms_are_refused(host: Any, changes: dict[str, Any]) -> None:
    site, mine = host
    with pytest.raises(InputError, match=r"the server('s terms| announces)"):
        mine.join(terms(site, **changes))


def test_steps_out_of_order(host: Any) -> None:
    site, mine = host
    order = {"classes": ["cat", "dog"], "data_key": "00" * 32}
    for step in (mine.population, lambda: mine.prepare(order), lambda: mine.weights({}, {})):
        with pytest.raises(NotPrepared):
            step()
    mine.join(terms(site))
    with pytest.raises(SecurityRefusal, match="needs none"):
        mine.weights({}, {})
    for wrong in ({"classes": "cat"}, {"classes": ["cat"]}, {"data_key": "zz"}, {"data_key": 3}):
        with pytest.raises(InputError, match="the server"):
            mine.prepare({**order, **wrong})
    with pytest.raises(InputError, match="not the federation's") as caught:
        ready(mine, {**order, "classes": ["cat", "cow"]})
    assert "dog" not in caught.value.what
    facts = ready(mine, order)
    assert facts["train"] + facts["test"] == 11
    assert mine.ids(np.array([41])).tolist() == [0]
    with pytest.raises(InputError, match="one client"):
        mine.ids(np.array([0, 1]))
    # another run of the server: everything anew
    mine.join(terms(site, run="2"))
    with pytest.raises(NotPrepared):
        mine.population()


def ready(host: PrivateHost, order: dict[str, Any]) -> Any:
    for _ in range(30):
        facts = host.prepare(order)
        if facts["ready"]:
            return facts
    raise AssertionError("never ready")


def test_the_fingerprint_is_of_data_and_key(host: Any, draw: Any, tmp_path: Path) -> None:
    site, mine = host
    twin = PrivateHost("a", draw(tmp_path / "twin", {"cat": 6, "dog": 5}), threads=1)
    other = PrivateHost("a", draw(tmp_path / "other", {"cat": 6, "dog": 5}, 1), threads=1)
    prints = []
    for who, key in ((mine, 1), (twin, 1), (mine, 2), (other, 1)):
        who.join(terms(site))
        order = {"classes": ["cat", "cow", "dog"], "data_key": f"{key:02}" * 32}
        prints.append(ready(who, order)["fingerprint"])
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_a_reply_comes_while_features_are_made(
    host: Any, own_cache: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, mine = host
    own_cache("mine")
    going_on, load = threading.Event(), FileImages.load
    monkeypatch.setattr(FileImages, "load", lambda self, i: (going_on.wait(20), load(self, i))[1])
    monkeypatch.setattr("fedtl.deployment.host.REPLY_SECONDS", 0.05)
    mine.join(terms(site))
    order = {"classes": ["cat", "dog"], "data_key": "00" * 32}
    assert mine.prepare(order) == {"ready": False, "done": 0, "total": 11}
    with pytest.raises(NotPrepared):
        mine.population()
    going_on.set()
    monkeypatch.setattr("fedtl.deployment.host.REPLY_SECONDS", 1.0)
    assert ready(mine, order)["width"] == 1280


def test_a_reply_comes_while_data_are_read(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site, mine = host
    going_on = threading.Event()
    monkeypatch.setattr(
        "fedtl.deployment.host.load_private",
        lambda *arguments: (going_on.wait(20), load_private(*arguments))[1],
    )
    monkeypatch.setattr("fedtl.deployment.host.REPLY_SECONDS", 0.05)
    for _ in range(2):
        assert mine.join(terms(site)) == {"name": "a", "reading": True}
    with pytest.raises(NotPrepared):
        mine.prepare({})
    going_on.set()
    monkeypatch.setattr("fedtl.deployment.host.REPLY_SECONDS", 5.0)
    assert mine.join(terms(site))["examples"] == 11


def test_closing_stops_the_work(
    host: Any, own_cache: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    site, mine = host
    cache = own_cache("mine")
    load = FileImages.load
    monkeypatch.setattr(FileImages, "load", lambda self, i: (time.sleep(0.05), load(self, i))[1])
    monkeypatch.setattr("fedtl.deployment.host.REPLY_SECONDS", 0.1)
    mine.join(terms(site))
    mine.prepare({"classes": ["cat", "dog"], "data_key": "00" * 32})
    mine.close()
    assert not [t for t in threading.enumerate() if t.name == "prepare"]
    assert not list((cache / "features").glob(".building*"))


def test_load_private_for_the_clients_own_eyes(draw: Any, tmp_path: Path) -> None:
    only = load_private(draw(tmp_path / "one", {"cat": 3}))
    assert only.classes == ("cat",)
    with pytest.raises(InputError, match="no image lies as <class>/<image>") as caught:
        load_private(draw(tmp_path / "two", {"train/cat": 3, "train/dog": 1}))
    assert "--set" not in caught.value.line()


def test_only_what_was_told_before_joining_is_done(host: Any) -> None:
    site, mine = host
    with pytest.raises(InputError, match="what it will ask for"):
        mine.join(terms(site, tasks=["upload"]))
    given = terms(site)
    assert any("reading" not in mine.join(given) for _ in range(100))
    ids, keys = np.zeros(1, np.int64), np.zeros(1, np.uint64)
    trained = RoundPlan(1, ids, keys, LocalTraining(1, 4, 0.1))
    mine.consent(trained)
    with pytest.raises(SecurityRefusal, match="asks for statistics"):
        mine.consent(replace(trained, task="statistics", statistics=Statistics()))
    with pytest.raises(SecurityRefusal, match="gradient"):
        mine.consent(replace(trained, reports=("start_gradient",)))
    with pytest.raises(SecurityRefusal, match="of one's own"):
        mine.consent(replace(trained, personal=Personal("finetune")))


def test_doing_nothing_is_no_pretext(host: Any) -> None:
    site, mine = host
    given = terms(site, tasks=["statistics"])
    assert any("reading" not in mine.join(given) for _ in range(100))
    ids, keys = np.zeros(1, np.int64), np.zeros(1, np.uint64)
    idle = RoundPlan(1, ids, keys, LocalTraining(0, 1, 0.1))
    mine.consent(idle)
    for more in ({"reports": ("start_loss",)}, {"personal": Personal("pfedme")}):
        with pytest.raises(SecurityRefusal):
            mine.consent(replace(idle, **more))

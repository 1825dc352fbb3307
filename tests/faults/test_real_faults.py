"""What befalls real clients and their server: killed, stopped, cut off, slow, mistaken, lying.

A SuperLink and SuperNodes under TLS, each client behind a cable (a TCP proxy) that can lose bytes.
Numbers are those of the fault list. The tests follow each other: the clients stay.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from fedtl.deployment.federation import create_federation
from fedtl.deployment.keys import make_keys
from fedtl.engines.flower_app import build_app

LYING = Path(__file__).with_name("lying_client.py")

SCENARIO = """name = "real"
seed = 3
rounds = {rounds}
[data]
source = "arrays"
path = "all.npz"
[clients]
partition = "natural"
fraction = {fraction}
[backbone]
name = "identity"
[training]
local_epochs = 1
batch_size = 8
learning_rate = 0.0003
[strategy]
name = "fedavgm"
[participation]
quorum = {quorum}
patience = {patience}
over_selection = {over}
[evaluation]
references = []
every = 1000
[engine]
deadline_seconds = {deadline}
join_seconds = {join}
"""

LONG = 68.0
"""Seconds: longer than Flower believes in a node that is silent."""


FALSE_CLOCK = """
import fedtl.deployment.knock as knock
from datetime import datetime, timedelta
class Clock(datetime):
    @classmethod
    def now(cls, zone=None):
        return datetime.now(zone) + timedelta(seconds=612)
knock.datetime = Clock
"""
OLD_VERSION = """
from fedtl import machine
found = machine.versions()
machine.versions = lambda: {**found, "fedtl": "0.0.9"}
"""
RUN = "\nimport sys\nfrom fedtl.cli import run_command\nsys.exit(run_command(sys.argv[1:]))"


def scenario(
    rounds: int = 1000, quorum: int = 1, patience: int = 1000, over: float = 1.0,
    fraction: float = 1.0, deadline: float = 5.0, join: float = 60.0,
) -> str:  # fmt: skip
    return SCENARIO.format(**locals())


def compare(server: Any, simulate: Callable[..., Any], **participation: Any) -> None:
    """The last commit is that of the simulation with the same participation."""
    head, facts = server.committed()
    same = simulate(server, facts["round"], **participation)
    assert head == same["head_sha256"]
    assert facts["cohorts"] == same["cohorts_blake2b"]
    assert facts["batches"] == same["batches_blake2b"]
    assert facts["bytes_up"] == same["bytes_up"]


@pytest.fixture(scope="module")
def away(make_fleet: Any) -> Iterator[Any]:
    """A run in which one client is cut off and another stopped, while other tests work: x stays,
    y is behind a cut cable, z is stopped."""
    fleet = make_fleet("xyz")
    fleet.start()
    server = fleet.begin(scenario(deadline=2.0), "away")
    since: list[float] = []

    def part() -> None:
        server.reaches(2, 120)
        fleet.sites["y"].cable.cut()
        fleet.sites["z"].stop()
        since.append(time.monotonic())

    thread = threading.Thread(target=part)
    thread.start()
    yield fleet, server, thread, since
    thread.join()


@pytest.fixture(scope="module")
def abc(request: pytest.FixtureRequest, make_fleet: Any) -> Any:
    if any(item.name.startswith("test_11") for item in request.session.items):
        request.getfixturevalue("away")  # it needs its time: begin now
    return make_fleet("abc")


@pytest.fixture
def fleet(abc: Any) -> Iterator[Any]:
    """Clients a, b and c for one run after the other."""
    yield abc
    abc.calm()


def test_8_13_16_18_killed_in_mid_fit_lost_acks_flapping_terminated(
    fleet: Any, simulate: Any, eventually: Any
) -> None:
    a, b, c = fleet.sites.values()
    marks = {name: fleet.place / f"mark-{name}" for name in "bc"}
    a.start()
    b.start(FEDTL_FAIL=f"client_after_train:kill:2:once={marks['b']}")
    c.start(FEDTL_FAIL=f"client_before_train:stop:4:once={marks['c']}")
    server = fleet.begin(scenario(quorum=2, deadline=10.0), "storm")
    assert b.ends(seconds=120) == -signal.SIGKILL  # 8: it has trained and says nothing any more
    b.start()
    eventually(marks["c"].exists, 60, "round 4")
    c.cable.lose(2, at_least=8000)  # 13: the update itself arrives, twice without an answer
    c.go_on()
    eventually(lambda: c.cable.lost == 2, 20, "lost acks")
    server.reaches(4)
    c.cable.lose(3)  # and whatever is asked next
    eventually(lambda: c.cable.lost == 5, 30, "lost answers")
    lines = len(a.out.splitlines())
    for _ in range(3):  # 16
        os.kill(eventually(a.supernode, 30), signal.SIGKILL)
        time.sleep(0.3)
    flapped = server.round()
    for site in (a, b, c):
        eventually(lambda site=site: max(site.trained()) > flapped + 2, 60, f"{site.name} is back")
    server.reaches(max(max(site.trained()) for site in (a, b, c)) + 2)
    assert server.ends(signal.SIGTERM) == 143  # 18
    fleet.clean()
    assert re.search(r"saved round \d+ of 1000", server.text)
    assert f"fedtl server resume {server.run.name}" in server.text
    missed = {name: server.missed(name) for name in "abc"}
    assert missed["b"][2] == "unused: its node went away"
    assert 4 not in missed["c"]
    for name in "abc":
        assert server.round() not in missed[name]
        # How long a busy machine takes to start a client again is not asked, but how often.
        away = [number for number in missed[name] if number - 1 not in missed[name]]
        assert len(away) < 5, missed
    told = [line for line in a.out.splitlines()[lines:] if "round" not in line]
    assert len(told) < 12, told
    compare(server, simulate)


def test_9_10_12_below_quorum_the_model_stays_and_the_run_stops_resumably(
    fleet: Any, simulate: Any, eventually: Any
) -> None:
    c = fleet.sites["c"]
    assert c.ends(signal.SIGTERM) == 143
    c.start(FEDTL_FAIL=f"client_before_train:stop:2:once={fleet.place / 'mark-few'}")
    fleet.start()
    server = fleet.begin(scenario(quorum=3, patience=3, deadline=5.0), "few")
    eventually(lambda: server.abandoned() > 0, 90, "an abandoned round")
    c.go_on()
    eventually(lambda: server.abandoned() == 0, 30, "a round with everybody")
    c.cable.cut()  # 12: for ever
    assert server.ends() == 4
    fleet.clean()
    assert "3 rounds in a row missed the quorum, the last with 2 of 3 updates" in server.text
    assert "c: no answer within 5 s" in server.text
    assert "Bring the clients back and resume" in server.text
    heads = [load_file(path) for path in sorted((server.run / "checkpoints").glob("*.safetensors"))]
    assert len(heads) == 3
    for head in heads[1:]:  # 10: not a bit of the model has changed
        assert all(np.array_equal(head[name], heads[0][name]) for name in head)
    compare(server, simulate, patience=1000)

    c.cable.mend()
    stopped = server.round()
    server = fleet.resume("few")
    server.reaches(stopped + 2)
    for site in fleet.sites.values():  # 9
        assert site.ends(signal.SIGKILL) == -signal.SIGKILL
    began = time.monotonic()
    assert server.ends() == 4
    assert time.monotonic() - began > 8  # it waited for them before it gave up
    assert "missed the quorum, the last with 0 of 3 updates" in server.text
    fleet.clean()
    compare(server, simulate, patience=1000)


def test_30_to_42_what_is_wrong_at_the_door_is_told(
    away: Any, make_cable: Any, tmp_path: Path
) -> None:
    """The command line, against a server that is in the middle of a run."""
    fleet, server, *_ = away
    server.says("here x", 120)
    place, site = fleet.place / "door", fleet.sites["x"]
    place.mkdir()
    for name in ("x.key", "x.pub", "data.npz"):
        shutil.copy2(site.place / name, place)
    good = f"127.0.0.1:{site.cable.port}"

    def check(code: int, name: str = "x", program: str = "") -> str:
        return str(
            fleet.call(
                "client", "check", "--folder", "door", "--join", "door/join.toml",
                "--name", name, "--data", "door/data.npz", code=code, program=program + RUN,
            )
        )  # fmt: skip

    fleet.join(place, good)
    assert "is approved" in check(0)
    assert re.search(r"clock differs by 61[0-4] s", check(3, program=FALSE_CLOCK))  # 38
    said = check(3, program=OLD_VERSION)  # 42
    assert "fedtl 0.0.9" in said
    assert "pip install" in said
    make_keys(place, "stranger")
    said = check(5, "stranger")  # 34
    assert "SHA256:" in said
    assert "fedtl server approve stranger.pub" in said
    (place / "x.key").chmod(0o644)
    assert "x.key" in check(5)  # 37
    (place / "x.key").chmod(0o600)
    elsewhere = make_cable(site.cable.server, "127.0.0.2")
    fleet.join(place, f"127.0.0.2:{elsewhere.port}")
    said = check(5)  # 32
    assert "the server's certificate is for other names" in said
    assert "127.0.0.2" in said
    other = create_federation(tmp_path / "other", good, [], build_app())
    shutil.copy(other.join_path, place)
    assert "not signed by the authority of this join file" in check(5)  # 30
    (fleet.place / "second.toml").write_text(scenario())
    said = fleet.call("server", "run", "second.toml", "--out", "second", code=3)  # 41
    assert re.search(r"port \d+ .*process \S+ \(\d+\)", " ".join(said.split())), said
    assert not (fleet.place / "second").exists()
    shutil.rmtree(place)
    assert server.process.poll() is None


def test_11_15_17_away_for_longer_than_the_server_believes(
    away: Any, simulate: Any, eventually: Any
) -> None:
    fleet, server, thread, since = away
    thread.join()
    y, z = fleet.sites["y"], fleet.sites["z"]
    time.sleep(max(0.0, since[0] + LONG - time.monotonic()))
    assert server.process.poll() is None, server.text
    z.go_on()
    y.cable.mend()
    back = server.round()
    for site in (y, z):
        eventually(lambda site=site: max(site.trained()) > back + 1, 60, f"{site.name} is back")
    server.reaches(max(max(site.trained()) for site in (y, z)) + 2)
    assert server.ends(signal.SIGINT) == 130  # 17
    fleet.clean()
    for name in "yz":
        why = set(server.missed(name).values())
        assert "unused: no answer within 2 s" in why, why
        assert "unused: its node is not there" in why, why
        assert server.round() not in server.missed(name)
    assert len(server.missed("x")) < 3  # on a busy machine
    compare(server, simulate)


def test_14_17_a_slow_client_is_late_and_two_interrupts_stop_at_once(
    fleet: Any, simulate: Any, eventually: Any
) -> None:
    slow, mark = fleet.sites["c"], fleet.place / "mark-slow"
    slow.start(FEDTL_FAIL=f"client_before_train:stop:2:once={mark}")
    fleet.start("ab")
    server = fleet.begin(scenario(fraction=0.67, over=1.5, deadline=30.0), "late")
    eventually(mark.exists, 60, "round 2")
    server.reaches(4, 20)  # nobody waits for it

    def told() -> list[dict[str, Any]]:
        return [e for e in server.events("late") if (e["client"], e["round"]) == ("c", 2)]

    assert told() == []
    slow.go_on()
    eventually(told, 30, "the late answer")
    fleet.sites["b"].cable.cut()
    slow.cable.cut()
    time.sleep(1)  # the round waits for them now
    server.process.send_signal(signal.SIGINT)  # 17
    server.says("once more stops at once", 5)
    began = time.monotonic()
    assert server.ends(signal.SIGINT) == 130
    assert time.monotonic() - began < 15
    fleet.sites["b"].cable.mend()
    slow.cable.mend()
    fleet.clean()
    assert "the last commit is valid" in server.text
    assert f"fedtl server resume {server.run.name}" in server.text
    assert [event["asked"] for event in told()] == ["train"]
    assert "c answered late in round 2; not used" in server.text
    assert server.missed("c")[2] == "unused: late: the round had its 2 answers"
    compare(server, simulate)


def test_19_to_26_a_client_that_lies_is_refused_by_name(
    fleet: Any, simulate: Any, eventually: Any
) -> None:
    fleet.start()
    c = fleet.sites["c"]
    assert c.ends(signal.SIGTERM) == 143
    with open(c.place / "out", "ab") as out:
        c.process = subprocess.Popen(
            [sys.executable, str(LYING), "c"], stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, cwd=c.place,
        )  # fmt: skip
    server = fleet.begin(scenario(rounds=13), "lies")
    try:
        assert server.ends() == 0
    finally:
        assert c.ends(signal.SIGTERM) == 143
    fleet.clean()
    expected = [
        "weight has a value that is not finite",
        r"weight has shape \(1, 1000\) instead of \(3, 1000\)",
        "weight is float64 instead of float32",
        r"tensors \['weight'\] instead of",
        "times the cohort's median, allowed 10000",
        r"trained on 1\d{12} examples, declared",
        "trained on -9 examples, declared",
        "refused: it answers another round",
        "refused: it answers another run",
        "refused: it answers another round",  # the reply to the first round, once more
        "refused: a malformed message",
    ]
    missed = server.missed("c")
    assert list(missed) == list(range(1, 12))
    for (round, reason), why in zip(missed.items(), expected, strict=True):
        assert re.search(why, reason), (round, reason)
    assert server.missed("a") == server.missed("b") == {}
    compare(server, simulate)


def test_36_59_another_machines_name_and_classes_of_other_names(fleet: Any) -> None:
    """c has an approved key and calls itself a; b has another name for a class of a's."""
    b, c = fleet.sites["b"], fleet.sites["c"]
    shutil.copy(c.place / "c.key", c.place / "a.key")
    kept = dict(np.load(b.place / "data.npz"))
    renamed = np.where(kept["y"] == "cat", "catt", kept["y"])
    np.savez(b.place / "data.npz", x=kept["x"], y=renamed)
    fleet.start("ab")
    c.start("a")
    server = fleet.begin(scenario(rounds=2, join=15.0), "names", "--min-clients", "2")
    try:
        assert server.ends() == 2
    finally:
        assert c.ends(signal.SIGTERM) == 143
        np.savez(b.place / "data.npz", **kept)
    fleet.clean()
    assert not server.run.exists()
    said = " ".join(server.text.split())
    assert re.search("refused c: a request to 'c'.* calls itself 'a'", said), said  # 36
    assert "class 'catt' is only in b and 'cat' only in a: did you mean 'cat'?" in said  # 59
    assert "cat: held by a; missing at b" in said
    assert "Traceback" not in c.out


def test_1_4_6_the_server_is_killed_before_between_and_after_the_rounds(
    fleet: Any, simulate: Any
) -> None:
    fleet.start()
    server = fleet.begin(scenario(rounds=3), "killed")
    server.says("here a")
    assert server.ends(signal.SIGKILL) == -signal.SIGKILL  # 1
    server = fleet.resume("killed", FEDTL_FAIL="before_summary:kill")  # 6
    assert server.ends() == -signal.SIGKILL
    assert server.round() == 3
    newest = max((server.run / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-7])  # 4, 7: what was written last is not all there
    server = fleet.resume("killed")
    assert server.ends() == 0
    assert "damaged" in server.text
    fleet.clean()
    compare(server, simulate)
    rounds = pd.read_parquet(server.run / "rounds.parquet")["round"].tolist()
    assert rounds == [1, 2, 3]

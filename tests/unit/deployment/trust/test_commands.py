"""``fedtl server`` and ``fedtl client`` as people type them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest

from fedtl.deployment.certificates import issue_server
from fedtl.deployment.federation import Federation


@pytest.fixture
def ready(fedtl, tmp_path: Path, open_door, authority, join_to) -> Path:
    """A client that has all it needs, and a door that lets it in."""
    fedtl("client", "keys", "--name", "hospital-a")
    door = open_door(issue_server(authority, []))
    (tmp_path / "join.toml").write_bytes(join_to(door.port).dump())
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)).astype(np.float32), np.arange(30) % 3
    np.savez(tmp_path / "data.npz", x=x, y=np.array(["cat", "dog", "owl"])[y])
    return tmp_path


CHECK = ("client", "check", "--join", "join.toml", "--name", "hospital-a", "--data", "data.npz")


def test_from_init_to_approval(fedtl, tmp_path: Path) -> None:
    made = fedtl("server", "init", "--address", "fl.example.org:8443", "--name", "10.1.2.3")
    assert made.returncode == 0, made.stderr
    assert "federation/join.toml" in made.stdout
    keys = fedtl("client", "keys", "--name", "hospital-a")
    assert keys.returncode == 0, keys.stderr
    approved = fedtl("server", "approve", "hospital-a.pub")
    assert approved.returncode == 0, approved.stderr
    shown = next(word for word in keys.stdout.split() if word.startswith("SHA256:"))
    assert shown in approved.stdout
    assert fedtl("server", "approve", "hospital-a.pub").returncode == 2
    refused = fedtl("server", "approve", "hospital-a.key")
    assert refused.returncode == 5
    assert "must never leave" in refused.stderr
    assert list(Federation(tmp_path / "federation").approved()) == ["hospital-a"]


def test_json_of_every_command(fedtl) -> None:
    made = json.loads(fedtl("server", "init", "--json").stdout)
    assert made["join"] == "federation/join.toml"
    keys = json.loads(fedtl("client", "keys", "--name", "a", "--json").stdout)
    approved = json.loads(fedtl("server", "approve", "a.pub", "--json").stdout)
    assert approved == {"name": "a", "fingerprint": keys["fingerprint"], "approved": 1}
    renewed = json.loads(fedtl("server", "init", "--renew", "--json").stdout)
    assert renewed == made


def test_a_second_init_changes_nothing(fedtl, tmp_path: Path) -> None:
    fedtl("server", "init")
    before = (tmp_path / "federation" / "join.toml").read_bytes()
    again = fedtl("server", "init")
    assert again.returncode == 2
    assert "--renew" in again.stderr
    assert (tmp_path / "federation" / "join.toml").read_bytes() == before


def test_a_ready_client(fedtl, ready: Path) -> None:
    done = fedtl(*CHECK)
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("join file", "key", "connection", "certificate", "clock", "versions", "approval"):
        assert what in done.stdout
    assert "30 examples in 3 classes" in done.stdout
    assert "owl" in done.stdout
    assert "fedtl client start" in done.stdout
    found = json.loads(fedtl(*CHECK, "--json").stdout)
    assert found["ready"] is True
    assert found["classes"] == {"cat": 10, "dog": 10, "owl": 10}


def test_all_problems_are_told_at_once(fedtl, ready: Path) -> None:
    (ready / "hospital-a.key").chmod(0o644)
    (ready / "data.npz").unlink()
    text = (ready / "join.toml").read_text()
    (ready / "join.toml").write_text(text.replace("127.0.0.1:", "no-such-host.invalid:"))
    done = fedtl(*CHECK)
    assert done.returncode == 5
    for word in ("chmod 600", "data.npz", "cannot be resolved"):
        assert word in "".join(done.stdout.split()) or word in " ".join(done.stdout.split())
    assert "not ready: key, name, data" in done.stderr
    found = json.loads(fedtl(*CHECK, "--json").stdout)
    assert found["ready"] is False
    assert [f["what"] for f in found["findings"] if not f["ok"]] == ["key", "name", "data"]


def test_a_certificate_near_its_end_is_a_warning(
    fedtl, ready: Path, open_door, authority, join_to
) -> None:
    door = open_door(issue_server(authority, [], days=9.5))
    (ready / "join.toml").write_bytes(join_to(door.port).dump())
    done = fedtl(*CHECK)
    assert done.returncode == 0, done.stdout
    assert "only 9 days" in " ".join(done.stdout.split()) or "only 10 days" in done.stdout


def test_start_refuses_what_check_refuses(fedtl, ready: Path) -> None:
    (ready / "hospital-a.key").chmod(0o644)
    start = ("client", "start", *CHECK[2:])
    done = fedtl(*start)
    assert done.returncode == 5
    assert "chmod 600" in done.stderr
    unknown = fedtl(*start, "--require", "secagg", "--require", "trust")
    assert unknown.returncode == 2
    assert "--require: nothing that can be required (got 'trust'; allowed: secagg, dp)" in (
        " ".join(unknown.stderr.split())
    )
    assert not list(ready.glob(".*"))


def test_audit_tells_what_left(fedtl, tmp_path: Path) -> None:
    from fedtl.deployment.audit import AuditLog
    from fedtl.engines.node import Sent

    path = tmp_path / "a.audit.jsonl"
    log = AuditLog(path)
    for round in (1, 2):
        log.sent(Sent("train", round, {}, {"weight": (1, 7, 1280)}, 36_000, "0" * 64))
    log.sent(Sent("train", 3, {"masked": True}, {"ring": (1, 5)}, 200, "0" * 64))
    log.close()
    done = fedtl("client", "audit", str(path))
    assert done.returncode == 0, done.stderr
    assert "17,920" in done.stdout
    assert "the chain is whole" in done.stdout
    assert json.loads(fedtl("client", "audit", str(path), "--json").stdout)["messages"] == {
        "train": 2,
        "train, under masks": 1,
    }
    path.write_bytes(path.read_bytes().replace(b"36000", b"36001", 1))
    broken = fedtl("client", "audit", str(path))
    assert broken.returncode == 5
    assert "line 2" in broken.stderr


def test_a_server_without_a_federation(fedtl, small: Path) -> None:
    done = fedtl("server", "run", str(small))
    assert done.returncode == 2
    assert "fedtl server init" in done.stderr


def test_a_client_with_one_key_need_not_say_its_name(fedtl, tmp_path: Path) -> None:
    fedtl("server", "init", "--address", "localhost:8443")
    (tmp_path / "join.toml").write_bytes((tmp_path / "federation" / "join.toml").read_bytes())
    nobody = fedtl("client", "check", "--join", "join.toml", "--data", "data.npz")
    assert nobody.returncode == 2
    assert "fedtl client keys" in nobody.stderr
    assert fedtl("client", "keys").returncode == 0
    (key,) = tmp_path.glob("*.key")
    one = fedtl("client", "check", "--join", "join.toml", "--data", "data.npz")
    assert key.name in one.stdout
    fedtl("client", "keys", "--name", "hospital-b")
    two = fedtl("client", "check", "--join", "join.toml", "--data", "data.npz")
    assert two.returncode == 2
    assert "--name" in two.stderr


def test_each_kind_of_run_is_resumed_by_its_own_command(fedtl, small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fedtl("server", "init").returncode == 0
    assert fedtl("run", str(small), "--out", str(run)).returncode == 0
    (run / "summary.json").unlink()
    wrong = fedtl("server", "resume", str(run))
    assert wrong.returncode == 2
    assert f"Type 'fedtl resume {run}'" in wrong.stderr
    (run / "party.json").write_text("{}")
    for arguments in (("resume", str(run)), ("run", str(small), "--out", str(run))):
        wrong = fedtl(*arguments)
        assert wrong.returncode == 2
        assert f"Type 'fedtl server resume {run}'" in wrong.stderr


def test_consent_is_checked_and_passed_on(fedtl, ready: Path) -> None:
    (ready / "mine.csv").write_text("age,sex,ill\n" + "1,0,1\n2,1,0\n" * 5)
    check = (*CHECK[:-1], "mine.csv", "--label", "ill")
    done = fedtl(*check, "--columns", "age,sex")
    assert done.returncode == 0, done.stdout + done.stderr
    words = " ".join(done.stdout.split())
    assert "column 'ill' as the class, and besides columns 'age', 'sex'; else" in words
    assert "--data mine.csv --label ill --columns age,sex" in words
    typed = shlex.split(words.partition("Next: fedtl ")[2])
    typed[-1] = "age,sec"
    wrong = fedtl(*typed)
    assert wrong.returncode == 2
    assert "Did you mean 'sex'?" in " ".join(wrong.stderr.split())

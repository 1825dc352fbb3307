"""The audit log: appended to, chained, and honest about crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtl.deployment.audit import START, AuditLog, verify
from fedtl.engines.node import Sent
from fedtl.errors import EnvironmentFault, InputError, SecurityRefusal


def sent(round: int, kind: str = "train") -> Sent:
    shapes = {"weight": (1, 7, 1280), "bias": (1, 7)}
    return Sent(kind, round, {"clients": 1}, shapes, 36_000 + round, f"{round:064x}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.audit.jsonl"


def write(path: Path, rounds: int) -> None:
    log = AuditLog(path, name="a")
    for round in range(1, rounds + 1):
        log.sent(sent(round))
    log.close()


def test_what_left_is_summed_up(path: Path) -> None:
    write(path, 3)
    log = AuditLog(path)
    log.sent(sent(0, "join"))
    log.close()
    tally = verify(path)
    assert tally.lines == 6
    assert tally.messages == {"train": 3, "join": 1}
    assert tally.numbers["train"] == 3 * (7 * 1280 + 7)
    assert tally.num_bytes["train"] == 3 * 36_000 + 6
    assert tally.torn == 0
    assert tally.head == json.loads(path.read_bytes().splitlines()[-1])["hash"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_entry_says_what_left(path: Path) -> None:
    write(path, 1)
    entry = json.loads(path.read_bytes().splitlines()[1])
    assert entry["kind"] == "train"
    assert entry["round"] == 1
    assert entry["tensors"] == {"weight": [1, 7, 1280], "bias": [1, 7]}
    assert entry["numbers"] == 7 * 1280 + 7
    assert entry["sha256"] == f"{1:064x}"


def _edit(line: bytes) -> bytes:
    entry = json.loads(line)
    entry["bytes"] = 1
    return json.dumps(entry).encode() + b"\n"


def _forge(line: bytes) -> bytes:
    from fedtl.deployment.audit import _hash

    entry = json.loads(line)
    entry["bytes"] = 1
    entry["hash"] = _hash(entry)
    return json.dumps(entry).encode() + b"\n"


@pytest.mark.parametrize(
    ("tamper", "where"),
    [
        (lambda lines: [*lines[:2], _edit(lines[2]), *lines[3:]], "line 3"),
        (lambda lines: [*lines[:2], _forge(lines[2]), *lines[3:]], "line 4"),
        (lambda lines: lines[:2] + lines[3:], "line 3"),
        (lambda lines: lines[1:], "line 1"),
        (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "line 2"),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], "line 4"),
        (lambda lines: [*lines[:3], b"{}\n", *lines[3:]], "line 4"),
        (lambda lines: [*lines[:3], b"garbage\n", *lines[3:]], "line 4"),
        (lambda lines: [*lines, b"garbage\n"], "line 6"),
        (lambda lines: [*lines, b"[1]\n"], "line 6"),
        (lambda lines: [b"\xff\x00" * 10 + b"\n", *lines], "line 1"),
    ],
)
def test_every_change_is_found(path: Path, tamper, where: str) -> None:
    write(path, 4)
    path.write_bytes(b"".join(tamper(path.read_bytes().splitlines(keepends=True))))
    for look in (verify, AuditLog):
        with pytest.raises(SecurityRefusal, match=rf"{where}\b.*changed"):
            look(path)


@pytest.mark.parametrize("cut", [2, 40, 200])
def test_a_torn_line_is_told_kept_and_continued_after(path: Path, cut: int) -> None:
    write(path, 2)
    torn = path.read_bytes()[:-cut]
    path.write_bytes(torn)
    assert verify(path).torn == 1
    log = AuditLog(path)
    assert log.torn == torn.splitlines()[-1]
    log.sent(sent(9))
    log.close()
    assert path.read_bytes().startswith(torn)
    tally = verify(path)
    assert (tally.torn, tally.messages["train"]) == (1, 2)


def test_where_only_the_line_end_is_missing_nothing_is_torn(path: Path) -> None:
    write(path, 2)
    path.write_bytes(path.read_bytes()[:-1])
    assert verify(path).lines == 3
    write(path, 1)
    tally = verify(path)
    assert (tally.lines, tally.torn, tally.messages["train"]) == (5, 0, 3)


def test_a_torn_line_cannot_hide_a_change(path: Path) -> None:
    write(path, 2)
    path.write_bytes(path.read_bytes()[:-20])
    AuditLog(path).close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"another": 1}\n', *lines[3:]]))
    with pytest.raises(SecurityRefusal, match="no crash explains"):
        verify(path)


def test_it_lasts_through_a_kill(path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from fedtl.deployment.audit import AuditLog;"
        "log = AuditLog(Path(sys.argv[1])); log.note('x'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True)
    assert done.returncode == -9
    assert verify(path).lines == 2


def test_one_process_writes(path: Path) -> None:
    log = AuditLog(path)
    with pytest.raises(EnvironmentFault, match="another client of this name"):
        AuditLog(path)
    log.close()
    AuditLog(path).close()


def test_what_cannot_be_written_down_does_not_leave(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(path)
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr("os.write", lambda fd, content: real(fd, content[:10]))
        with pytest.raises(EnvironmentFault, match="disk is full"):
            log.sent(sent(1))
    log.sent(sent(2))
    log.close()
    tally = verify(path)
    assert (tally.lines, tally.messages["train"], tally.torn) == (2, 1, 0)


def test_an_empty_file_and_none(path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        verify(path)
    path.touch()
    assert verify(path).head == START


def test_a_line_without_end_is_not_read_into_memory(path: Path) -> None:
    write(path, 1)
    with open(path, "ab") as file:
        file.truncate(2**40)
    with pytest.raises(SecurityRefusal, match="too long"):
        verify(path)

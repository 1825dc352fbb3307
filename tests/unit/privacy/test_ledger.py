"""The ledger: written before it is used, never shorter, and the same noise charged once."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from fedtl.errors import EnvironmentFault, SecurityRefusal
from fedtl.privacy.ledger import LEDGER, Entry, Ledger

FIRST = Entry(1, "updates", 1.1, "poisson", 0.25, clients=(0, 3), noise_id="seeded:1")


def entry(round: int, noise_id: str = "") -> Entry:
    return replace(FIRST, round=round, noise_id=noise_id or f"seeded:{round}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / LEDGER


def test_what_is_charged_is_there_again(path: Path) -> None:
    ledger = Ledger(path)
    assert ledger.entries == ()
    assert not path.exists()
    for round in (1, 2, 3):
        ledger.charge(entry(round))
        assert Ledger(path).entries == ledger.entries
    assert Ledger(path).entries == (entry(1), entry(2), entry(3))
    assert Ledger(path).damaged is None
    assert [json.loads(line)["round"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_it_is_safe_before_charge_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path.read_bytes()))
    Ledger(path).charge(FIRST)
    assert synced[0] == FIRST.line().encode() + b"\n"
    assert len(synced) == 2  # and the folder that names it


def test_a_resumed_round_with_the_same_noise_costs_nothing(path: Path) -> None:
    Ledger(path).charge(entry(1))
    Ledger(path).charge(entry(2))  # killed after this: round 2 is done again
    resumed = Ledger(path)
    assert resumed.holds(2, "seeded:2")
    resumed.charge(entry(2))
    resumed.charge(entry(3))
    assert Ledger(path).entries == (entry(1), entry(2), entry(3))


def test_other_noise_for_the_same_round_is_another_release(path: Path) -> None:
    Ledger(path).charge(entry(2, "system:a"))
    Ledger(path).charge(entry(2, "system:b"))
    Ledger(path).charge(entry(3, "system:a"))
    assert len(Ledger(path).entries) == 3


def test_a_line_cut_by_a_crash_is_kept_and_told(path: Path) -> None:
    ledger = Ledger(path)
    ledger.charge(entry(1))
    whole = path.read_bytes()
    for cut in (1, 7, len(entry(2).line())):
        path.write_bytes(whole + entry(2).line().encode()[:cut])
        resumed = Ledger(path)
        assert resumed.entries == (entry(1),)
        assert resumed.damaged is not None
        assert f"({cut} bytes)" in resumed.damaged
        before = path.read_bytes()
        resumed.charge(entry(2))
        assert path.read_bytes().startswith(before)  # nothing is taken away
        assert Ledger(path).entries == (entry(1), entry(2))
        assert Ledger(path).damaged is None


def test_crashes_at_any_byte_lose_nothing_that_was_charged(path: Path) -> None:
    """Also while the mark behind a cut line is written, as often as one likes."""
    Ledger(path).charge(entry(1))
    path.write_bytes(path.read_bytes() + b'{"round":2,"ki')
    start = path.read_bytes()
    Ledger(path).charge(entry(2))
    added = path.read_bytes()[len(start) :]
    for cut in range(len(added)):
        path.write_bytes(start + added[:cut])
        resumed = Ledger(path)
        assert resumed.entries == (entry(1),)
        resumed.charge(entry(3))
        assert Ledger(path).entries == (entry(1), entry(3))


@pytest.mark.parametrize(
    "line",
    [
        b"rubbish",
        b"[1, 2]",
        b'{"round": 1}',
        b"\xff\xfe",
        FIRST.line().replace("1.1", '"1.1"').encode(),
        FIRST.line().replace("[0,3]", '["a"]').encode(),
        b"",
    ],
)
def test_a_whole_line_that_is_no_entry_is_refused(path: Path, line: bytes) -> None:
    path.write_bytes(FIRST.line().encode() + b"\n" + line + b"\n" + entry(2).line().encode())
    with pytest.raises(SecurityRefusal, match="nobody knows what was spent") as refusal:
        Ledger(path)
    assert "line 2" in refusal.value.line()


def test_a_disk_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "missing" / LEDGER)
    with pytest.raises(EnvironmentFault, match="privacy ledger"):
        ledger.charge(FIRST)
    assert ledger.entries == ()  # so the noise is not used either

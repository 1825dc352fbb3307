"""A commit is whole or it is not there."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedtl.results.commits import KEEP, Commit, read_commit, write_commit


def commit(round: int) -> Commit:
    tensors = {"head.bias": np.full(3, round, np.float32), "slots.v": np.array([0.1 * round])}
    return Commit(round, tensors, {"identity": {"a": 1}, "round": round})


def test_what_was_committed_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write_commit(tmp_path, commit(4))
    found, notes = read_commit(tmp_path)
    assert notes == []
    assert found is not None
    assert (found.round, found.facts) == (4, commit(4).facts)
    for name, tensor in commit(4).tensors.items():
        assert found.tensors[name].tobytes() == tensor.tobytes()
        assert found.tensors[name].dtype == tensor.dtype


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for round in range(10):
        write_commit(tmp_path, commit(round))
    assert len(list(tmp_path.iterdir())) == 2 * KEEP
    found, _ = read_commit(tmp_path)
    assert found is not None
    assert found.round == 9


def test_nothing_there(tmp_path: Path) -> None:
    assert read_commit(tmp_path) == (None, [])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("suffix", [".safetensors"])
def test_a_damaged_commit_gives_way_to_the_one_before(tmp_path: Path, damage, suffix: str) -> None:
    write_commit(tmp_path, commit(1))
    write_commit(tmp_path, commit(2))
    damage(tmp_path / f"round-000002{suffix}")
    found, notes = read_commit(tmp_path)
    assert found is not None
    assert found.round == 1
    assert len(notes) == 1
    assert "round-000002" in notes[0]


def test_a_torn_or_strange_manifest_gives_way_too(tmp_path: Path) -> None:
    write_commit(tmp_path, commit(1))
    for round, text in ((2, '{"format": 1'), (3, json.dumps({"format": 99}))):
        write_commit(tmp_path, commit(round))
        (tmp_path / f"round-{round:06d}.json").write_text(text)
    found, notes = read_commit(tmp_path)
    assert found is not None
    assert found.round == 1
    assert len(notes) == 2


def test_tensors_without_a_manifest_are_not_committed(tmp_path: Path) -> None:
    write_commit(tmp_path, commit(1))
    write_commit(tmp_path, commit(2))
    (tmp_path / "round-000002.json").unlink()
    found, notes = read_commit(tmp_path)
    assert found is not None
    assert (found.round, notes) == (1, [])

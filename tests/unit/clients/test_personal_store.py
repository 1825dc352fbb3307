from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from fedtl.clients.personal_store import KEEP, PersonalStore
from fedtl.errors import EnvironmentFault


def number(value: float) -> dict[str, np.ndarray]:
    return {"x": np.full((2, 3), value, np.float32), "n": np.array([value], np.int64)}


def value(store: PersonalStore, before: int, client: str = "ann", purpose: str = "residual") -> int:
    """The round that made the state found; 0 for none. Each state holds its own round."""
    found = store.load(purpose, client, before)
    if found is None:
        return 0
    round, tensors = found
    assert tensors.keys() == {"x", "n"}
    assert tensors["x"].dtype == np.float32
    assert tensors["n"].dtype == np.int64
    assert (tensors["x"] == round).all()
    assert tensors["n"].tolist() == [round]
    return round


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_newest_of_the_earlier_rounds_is_found(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path / "made" / "when needed")
    assert value(store, 9) == 0
    for round in (1, 4, 7):
        store.save("residual", "ann", round, number(round))
    assert [value(store, before) for before in (1, 2, 4, 5, 7, 8, 99)] == [0, 1, 1, 4, 4, 7, 7]


def test_a_round_done_again_reads_what_it_read_and_leaves_the_same(tmp_path: Path) -> None:
    store, unbroken = PersonalStore(tmp_path / "killed"), PersonalStore(tmp_path / "unbroken")
    for round in range(1, 8):
        unbroken.save("residual", "ann", round, number(round))
    for round in range(1, 7):
        store.save("residual", "ann", round, number(round))
    assert value(store, 5) == 4  # two commits were damaged: back to round 5, 6 is on the disk
    store.save("residual", "ann", 5, number(5))
    assert value(store, 99) == 5, "what followed the round that is done again is no part of the run"
    for round in (6, 7):
        assert value(store, round) == round - 1
        store.save("residual", "ann", round, number(round))
    assert files(store.folder)[-1:] == files(unbroken.folder)[-1:]
    assert value(store, 99) == 7


@pytest.mark.parametrize("step", [1, 3])
def test_enough_rounds_stay_for_a_run_that_goes_back_two(tmp_path: Path, step: int) -> None:
    store = PersonalStore(tmp_path)
    taken = list(range(2, 40, step))
    for round in taken:
        store.save("residual", "ann", round, number(round))
    assert KEEP == 4
    assert files(tmp_path) == [f"round-{round:06d}.safetensors" for round in taken[-4:]]
    # Saved by the client in round r, killed before its commit, and the two newest are damaged:
    # the run begins again with round r - 2.
    assert value(store, taken[-1] - 2) == max(r for r in taken if r < taken[-1] - 2)


def test_a_round_is_overwritten(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path)
    for content in (1.0, 2.0):
        store.save("residual", "ann", 3, {"x": np.array([content])})
    found = store.load("residual", "ann", 4)
    assert found is not None
    assert found[1]["x"].tolist() == [2.0]
    assert len(files(tmp_path)) == 1


NAMES = ["ann", "Ann", "ann ", "a/nn", "../ann", "..", ".", "", "änn", "\udc80", "a\x00b"]
NAMES += ["n" * 300, "n" * 299 + "m"]


def test_neither_clients_nor_purposes_see_each_other(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path / "store")
    keys = [(purpose, name) for purpose in ("residual", "personal") for name in NAMES]
    for round, (purpose, name) in enumerate(keys, 1):
        store.save(purpose, name, round, number(round))
    for round, (purpose, name) in enumerate(keys, 1):
        assert value(store, 999, name, purpose) == round
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    lowered = {path.name.lower() for path in store.folder.iterdir()}
    assert len(lowered) == len(keys), "two clients share a folder where case does not count"


@pytest.mark.parametrize("position", [0, 3, 9, 100, -1])
def test_a_changed_byte_is_found(tmp_path: Path, position: int) -> None:
    store = PersonalStore(tmp_path)
    store.save("residual", "ann", 3, number(3))
    path = next(tmp_path.rglob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(EnvironmentFault) as caught:
        store.load("residual", "ann", 4)
    assert str(path) in caught.value.line()
    assert str(tmp_path) not in caught.value.what, "a path is private: only 'where' may have it"


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"pickle", None])
def test_what_is_no_state_is_refused(tmp_path: Path, content: bytes | None) -> None:
    store = PersonalStore(tmp_path)
    store.save("residual", "ann", 2, number(2))
    store.save("residual", "ann", 3, number(3))
    path = max(tmp_path.rglob("*.safetensors"))
    if content is None:
        content = path.read_bytes()[:-1]
    path.write_bytes(content)
    with pytest.raises(EnvironmentFault) as caught:
        store.load("residual", "ann", 4)
    assert str(path) in caught.value.line()
    path.unlink()  # what the error says to do
    assert value(store, 4) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda x: {"renamed": x},
        lambda x: {"x": x.reshape(2, 3)},
        lambda x: {"x": x.view(np.int32)},
        lambda x: {"x": x, "more": x[:0]},
    ],
)
def test_the_same_bytes_as_something_else_are_found(
    change: Callable[[np.ndarray], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    store, x = PersonalStore(tmp_path), np.arange(6, dtype=np.float32)
    store.save("residual", "ann", 1, {"x": x})
    path = next(tmp_path.rglob("*.safetensors"))
    with safe_open(path, "np") as file:
        told = file.metadata()
    path.write_bytes(save(change(x), metadata=told))
    with pytest.raises(EnvironmentFault, match="hash"):
        store.load("residual", "ann", 2)


def test_other_files_are_let_be(tmp_path: Path) -> None:
    store = PersonalStore(tmp_path)
    store.save("residual", "ann", 1, number(1))
    folder = next(tmp_path.iterdir())
    for name in ("round-x.safetensors", "round-000009.txt", ".round-000008.safetensors.1.tmp"):
        (folder / name).write_bytes(b"not ours")
    assert value(store, 99) == 1
    for round in range(2, 8):
        store.save("residual", "ann", round, number(round))
    assert len(list(folder.iterdir())) == KEEP + 3


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentFault, match="ann"):
        PersonalStore(tmp_path / "file").save("residual", "ann", 1, number(1))


def test_a_crash_while_writing_leaves_the_state_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PersonalStore(tmp_path)
    store.save("residual", "ann", 1, {"x": np.zeros(3)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(EnvironmentFault, match="disk is full"):
            store.save("residual", "ann", 2, {"x": np.ones(3)})
    found = store.load("residual", "ann", 9)
    assert found is not None
    assert found[0] == 1
    assert files(tmp_path) == ["round-000001.safetensors"]

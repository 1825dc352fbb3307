from pathlib import Path

import numpy as np
import pytest

from fedtl.errors import EnvironmentFault, InputError
from fedtl.results.commits import Commit
from fedtl.results.runs import RunFolder


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        RunFolder.create(tmp_path / "mine", "")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_an_unfinished_run_points_to_resume(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", 'name = "x"').release()
    with pytest.raises(InputError, match=r"fedtl resume .*run"):
        RunFolder.create(tmp_path / "run", 'name = "x"')


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", 'name = "x"').release()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot write"):
        RunFolder.create(tmp_path / "file" / "run", "")


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path / "run", "")
    with pytest.raises(EnvironmentFault, match="another process"):
        RunFolder.reopen(tmp_path / "run")
    first.release()
    RunFolder.reopen(tmp_path / "run").release()


def test_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        RunFolder.reopen(tmp_path)


def test_records_are_cut_back_to_the_commit(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "")
    assert folder.begin() == (None, [])
    row = {name: [None] for name in folder.rounds.schema.names}
    one = folder.rounds.append({**row, "round": [1]})
    empty = folder.clients.path.stat().st_size
    facts = {"rounds_bytes": one, "clients_bytes": empty}
    folder.commit(Commit(1, {"head.bias": np.zeros(2, np.float32)}, facts))
    folder.rounds.append({**row, "round": [2]})
    folder.release()
    again = RunFolder.reopen(tmp_path / "run")
    commit, _ = again.begin()
    assert commit is not None
    assert commit.round == 1
    assert again.rounds.read()["round"].to_pylist() == [1]
    again.release()


def test_finishing_leaves_the_names_of_the_design(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", 'name = "x"')
    folder.begin()
    folder.write_tables()
    folder.write_head({"bias": np.zeros(2, np.float32)}, {"classes": "a\nb"})
    folder.event("finished")
    folder.finish({"seed": 7})
    folder.release()
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "checkpoints",
        "clients.parquet",
        "events.jsonl",
        "head.safetensors",
        "rounds.parquet",
        "scenario.toml",
        "summary.json",
    ]
    assert folder.finished() == {"seed": 7}

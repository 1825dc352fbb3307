"""Runs are read back whole, cut off, or as an older version left them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedtl.errors import InputError
from fedtl.results.commits import Commit, write_commit
from fedtl.results.page import run_page
from fedtl.results.records import CLIENTS, ROUNDS
from fedtl.results.runs import RunFolder
from fedtl.results.tables import conform, number, read_run, seed_folders


def interrupt(made: Path, path: Path, rounds: int) -> Path:
    """The same run as if killed: records and commits up to ``rounds``, then half of another."""
    frame = {name: pq.read_table(made / f"{name}.parquet") for name in ("rounds", "clients")}
    folder = RunFolder.create(path, (made / "scenario.toml").read_text())
    folder.rounds.start()
    folder.clients.start()
    for round in range(1, rounds + 1):
        sizes = {}
        for name, stream in (("rounds", folder.rounds), ("clients", folder.clients)):
            rows = frame[name].filter(pa.compute.equal(frame[name]["round"], round))
            for split in sorted(set(rows["split"].to_pylist())) if name == "clients" else [None]:
                part = (
                    rows if split is None else rows.filter(pa.compute.equal(rows["split"], split))
                )
                size = stream.append(part.to_pydict())
            sizes[f"{name}_bytes"] = size
        folder.commit(Commit(round, {"w": np.zeros(1)}, sizes))
    late = frame["clients"].filter(pa.compute.equal(frame["clients"]["round"], rounds + 1))
    folder.clients.append(late.to_pydict())  # not committed
    with open(folder.rounds.path, "ab") as file:
        file.write(b"\xff\xff\xff\xff\x10\x00")  # torn
    folder.release()
    return path


def test_a_whole_run(made: Path) -> None:
    run = read_run(made)
    assert run.name == "made"
    assert not run.interrupted
    assert run.done_rounds == run.planned_rounds == 8
    assert run.heads[0] == "federated"
    assert set(run.heads) >= {"local_only", "centralised", "fine_tuned", "personal"}
    assert len(run.own) == len(run.everyone) == 12
    assert run.own["round"].eq(8).all()
    assert len(run.clients) == pq.read_metadata(made / "clients.parquet").num_rows
    assert run.unused == {"unused: <i>answered late</i>": 1}
    assert run.training["used"].tolist() == [7] + [8] * 11


def test_curves_are_those_of_a_slow_loop(made: Path) -> None:
    rows = pq.read_table(made / "clients.parquet").to_pylist()
    curves = read_run(made).curves.set_index("round")
    for round in (1, 5, 8):
        each = [row["accuracy"] for row in rows if row["round"] == round and row["split"] == "test"]
        assert curves["mean"][round] == pytest.approx(np.mean(each), abs=1e-12)
        assert curves["low"][round] == pytest.approx(np.quantile(each, 0.1), abs=1e-12)
        assert curves["high"][round] == pytest.approx(np.quantile(each, 0.9), abs=1e-12)


def test_an_interrupted_run_counts_to_its_last_commit(made: Path, tmp_path: Path) -> None:
    run = read_run(interrupt(made, tmp_path / "cut", 3))
    assert run.interrupted
    assert run.done_rounds == 3
    assert run.own["round"].eq(3).all()
    assert run.everyone.empty
    whole = read_run(made)
    before = whole.curves[whole.curves["round"] <= 3].reset_index(drop=True)
    assert run.curves.equals(before)
    page = run_page(run)
    assert "interrupted at round 3 of 8" in page
    assert "No verdict yet" in page
    assert "fedtl resume cut" in page


def test_a_resumed_run_is_read_from_its_newer_records(made: Path, tmp_path: Path) -> None:
    path = interrupt(made, tmp_path / "cut", 3)
    for name in ("rounds", "clients"):
        table = pq.read_table(made / f"{name}.parquet")
        old = table.filter(pa.compute.less_equal(table["round"], 2))
        pq.write_table(old, path / f"{name}.parquet")  # of an earlier stop
    assert read_run(path).done_rounds == 3


def test_records_without_a_commit_are_read_as_far_as_they_go(made: Path, tmp_path: Path) -> None:
    path = interrupt(made, tmp_path / "cut", 3)
    shutil.rmtree(path / "checkpoints")
    assert read_run(path).done_rounds == 3


def test_an_older_run_lacks_what_it_did_not_write(made: Path, tmp_path: Path) -> None:
    old = shutil.copytree(made, tmp_path / "old")
    for path in (old / "classes.parquet", old / "gap.json"):
        path.unlink()
    clients = pq.read_table(old / "clients.parquet")
    kept = ["round", "client", "name", "domain", "split", "examples", "loss", "accuracy", "status"]
    pq.write_table(clients.select([*kept, "local_only_accuracy"]), old / "clients.parquet")
    summary = json.loads((old / "summary.json").read_text())
    for key in ("verdict", "references", "data", "versions", "seconds", "epsilon"):
        del summary[key]
    (old / "summary.json").write_text(json.dumps(summary))
    (old / "scenario.toml").write_text('name = "old"\nrounds = 8\n')
    run = read_run(old)
    assert run.own["advice"].isna().all()
    assert run.classes is None
    page = run_page(run)
    assert "older version" in page
    assert "fedtl report old --gap" in page


def test_conform_adds_nulls_and_drops_strangers() -> None:
    table = conform(pa.table({"accuracy": [0.5], "stranger": ["x"]}), ROUNDS)
    assert table.schema.names == ROUNDS.names
    assert table["accuracy"].to_pylist() == [0.5]
    assert table["loss"].to_pylist() == [None]


def test_folders_of_seeds(made: Path, tmp_path: Path) -> None:
    for seed in (10, 9):
        shutil.copytree(made, tmp_path / "many" / f"seed-{seed}")
    assert [p.name for p in seed_folders(tmp_path / "many")] == ["seed-9", "seed-10"]
    with pytest.raises(InputError, match="2 runs, one for each seed"):
        read_run(tmp_path / "many")


def test_what_is_no_run_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        read_run(tmp_path)
    (tmp_path / "scenario.toml").write_text('name = "x"')
    with pytest.raises(InputError, match="no round of this run was recorded"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "gap.json", "scenario.toml", "clients.parquet"])
def test_damage_is_told(name: str, made: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(made, tmp_path / "broken")
    (broken / name).write_bytes(b"[[[ \xff")
    with pytest.raises(InputError, match=name):
        read_run(broken)


def edit(path: Path, key: str, value: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clients", None),
        ("clients", ["too", "few"]),
        ("kinds", {"js": 5}),
        ("pairs", {"js": [[0.0]]}),
        ("rest", {"js": ["<b>"] * 12}),
        ("rest", {"js": [float("inf")] * 12}),
        ("checks", "<b>"),
    ],
)
def test_a_gap_of_other_shape_is_damaged(
    key: str, value: object, made: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(made, tmp_path / "broken")
    edit(broken / "gap.json", key, value)
    with pytest.raises(InputError, match=r"gap\.json: is damaged\. Delete it"):
        read_run(broken)


def test_unknown_entries_of_a_summary_are_as_if_left_out(made: Path, tmp_path: Path) -> None:
    old = shutil.copytree(made, tmp_path / "old")
    for key in ("data", "notes", "versions", "references", "backbone", "seconds"):
        edit(old / "summary.json", key, None)
    assert "How to make it again" in run_page(read_run(old))
    edit(old / "summary.json", "data", 5)
    with pytest.raises(InputError, match=r"summary\.json: is damaged"):
        read_run(old)


@pytest.mark.parametrize("verdict", ["verdict = 5", '[verdict]\nlevel = "high"'])
def test_a_scenario_of_other_shape_is_damaged(verdict: str, made: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(made, tmp_path / "broken")
    (broken / "scenario.toml").write_text(f'name = "x"\n{verdict}\n')
    with pytest.raises(InputError, match=r"scenario\.toml: is damaged"):
        read_run(broken)


@pytest.mark.parametrize(("name", "key"), [("rounds", "round"), ("classes", "name")])
def test_a_table_without_its_keys_or_of_other_types_is_damaged(
    name: str, key: str, made: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(made, tmp_path / "broken")
    whole = pq.read_table(made / f"{name}.parquet")
    pq.write_table(whole.drop([key]), broken / f"{name}.parquet")
    with pytest.raises(InputError, match=f"is damaged: it has no column '{key}'"):
        read_run(broken)
    last = whole.num_columns - 1
    text = pa.array(["secret"] * whole.num_rows)
    pq.write_table(
        whole.set_column(last, whole.schema.names[last], text), broken / f"{name}.parquet"
    )
    with pytest.raises(InputError, match="a column is of another type") as caught:
        read_run(broken)
    assert "secret" not in str(caught.value)


def test_a_gap_of_another_format_is_not_read(made: Path, tmp_path: Path) -> None:
    other = shutil.copytree(made, tmp_path / "other")
    (other / "gap.json").write_text('{"format": 2}')
    assert read_run(made).gap is not None
    assert read_run(other).gap is None
    assert "fedtl report other --gap" in run_page(read_run(other))


def test_number() -> None:
    assert number(np.float32(0.5)) == 0.5
    assert number(3) == 3.0
    for value in (None, float("nan"), float("inf"), "1"):
        assert number(value) is None


def test_commits_that_do_not_count_bytes(tmp_path: Path) -> None:
    """The stream of a run whose manifest is silent about it is read as far as it goes."""
    folder = RunFolder.create(tmp_path / "run", 'name = "x"')
    for stream in (folder.rounds, folder.clients):
        stream.start()
    row = {**{key: [None] for key in ROUNDS.names}, "round": [1]}
    folder.rounds.append(row)
    folder.clients.append({**{key: [None] for key in CLIENTS.names}, "round": [1], "client": [0]})
    folder.release()
    write_commit(tmp_path / "run" / "checkpoints", Commit(1, {"w": np.zeros(1)}, {}))
    run = read_run(tmp_path / "run")
    assert run.done_rounds == 1
    assert run.own.empty
    assert "No verdict yet" in run_page(run)

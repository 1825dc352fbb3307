"""The stream of rows: append, cut back to a commit, end as Parquet."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedtl.results.records import CLIENTS, ROUNDS, RecordStream

SCHEMA = pa.schema([("round", pa.int32()), ("accuracy", pa.float64())])


@pytest.fixture
def stream(tmp_path: Path) -> RecordStream:
    made = RecordStream(tmp_path / "rows.arrows", SCHEMA)
    made.start()
    return made


def test_rows_come_back_and_nulls_stay_null(stream: RecordStream) -> None:
    stream.append({"round": [1, 1], "accuracy": [0.5, None]})
    stream.append({"round": [2], "accuracy": [0.25]})
    assert stream.read().to_pylist() == [
        {"round": 1, "accuracy": 0.5},
        {"round": 1, "accuracy": None},
        {"round": 2, "accuracy": 0.25},
    ]


@pytest.mark.parametrize("torn", [0, 1, 40])
def test_what_came_after_the_commit_is_cut_off(stream: RecordStream, torn: int) -> None:
    committed = stream.append({"round": [1], "accuracy": [0.5]})
    stream.append({"round": [2], "accuracy": [0.6]})
    if torn:
        stream.path.write_bytes(stream.path.read_bytes()[:-torn])
    stream.start(committed)
    stream.append({"round": [2], "accuracy": [0.7]})
    assert stream.read()["accuracy"].to_pylist() == [0.5, 0.7]


def test_an_empty_stream_is_an_empty_table(stream: RecordStream, tmp_path: Path) -> None:
    stream.write_parquet(tmp_path / "rows.parquet")
    table = pq.read_table(tmp_path / "rows.parquet")
    assert (table.num_rows, table.schema.names) == (0, SCHEMA.names)


def test_parquet_holds_all_rows_in_few_groups(stream: RecordStream, tmp_path: Path) -> None:
    for round in range(50):
        stream.append({"round": [round] * 3, "accuracy": [0.1, 0.2, None]})
    stream.write_parquet(tmp_path / "rows.parquet")
    assert pq.read_table(tmp_path / "rows.parquet") == stream.read()
    assert pq.ParquetFile(tmp_path / "rows.parquet").num_row_groups == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.arrows", "rows.parquet"]


def test_columns_that_others_rely_on() -> None:
    assert {"round", "accuracy", "loss", "bytes_up", "bytes_down"} <= set(ROUNDS.names)
    assert {"round", "client", "split", "accuracy", "examples", "local_only_accuracy"} <= set(
        CLIENTS.names
    )

"""Columns and rows that are known only at the end."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedtl.evaluation.advice import Compared
from fedtl.evaluation.columns import beside, class_table, of_pairs
from fedtl.evaluation.significance import Pairs
from fedtl.results.records import CLASSES, CLIENTS
from fedtl.results.runs import RunFolder
from fedtl.types import ClientMetrics

COLUMNS = {"name": ["a", "b"], "domain": ["x", ""]}


def metrics(clients: list[int], correct: list[list[int]], count: list[list[int]]) -> ClientMetrics:
    return ClientMetrics(
        np.array(clients), np.zeros(len(clients)), np.array(correct), np.array(count)
    )


def test_a_row_per_client_and_class_that_it_has() -> None:
    mine = metrics([2, 7], [[1, 0, 0], [0, 3, 0]], [[2, 0, 0], [0, 3, 0]])
    alone = metrics([7], [[0, 2, 0]], [[0, 3, 0]])
    train = np.array([[4, 1, 0], [0, 9, 0]])
    rows = class_table(mine, alone, COLUMNS, ("cat", "dog", "owl"), train).to_pylist()
    first = {"client": 2, "name": "a", "domain": "x", "class": "cat", "train": 4, "test": 2}
    assert rows[0] == {**first, "correct": 1, "local_only_correct": None}
    assert [(row["class"], row["train"], row["test"]) for row in rows] == [
        ("cat", 4, 2), ("dog", 1, 0), ("dog", 9, 3),
    ]  # fmt: skip
    assert rows[2]["local_only_correct"] == 2


def test_of_real_clients_training_counts_are_not_known(tmp_path) -> None:
    mine = metrics([0, 1], [[1, 0], [0, 0]], [[2, 0], [0, 0]])
    table = class_table(mine, None, COLUMNS, ("cat", "dog"), None)
    assert table.schema == CLASSES
    assert table.to_pylist() == [
        {
            "client": 0, "name": "a", "domain": "x", "class": "cat", "train": None, "test": 2,
            "correct": 1, "local_only_correct": None,
        }
    ]  # fmt: skip
    folder = RunFolder.create(tmp_path / "run", "")
    folder.begin()
    folder.write_tables(classes=table)
    assert pq.read_table(tmp_path / "run" / "classes.parquet").equals(table)


def test_pairs_go_into_the_last_rounds_rows_and_no_tests_are_null() -> None:
    pairs = Pairs(np.array([3, 0]), np.array([1, 0]), np.array([9, 0]))
    values = of_pairs(np.array([0, 1]), {"federated": Compared(pairs, None)})
    blank = dict.fromkeys(CLIENTS.names, [None] * 2)
    for round, split, wanted in ((4, "test", [3, None]), (3, "test", [None] * 2)):
        batch = pa.RecordBatch.from_pydict(
            {**blank, "round": [round] * 2, "client": [0, 1], "split": [split] * 2}, CLIENTS
        )
        assert beside(4, values)(batch)["beats_local_only"].to_pylist() == wanted
    assert not [name for split, name in values if split == "everyone"]

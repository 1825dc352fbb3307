"""Split files: written, read back to the same clients, refused where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtl.data import clients as dealing
from fedtl.data.clients import split_clients
from fedtl.data.examples import Examples
from fedtl.data.partitions import assign_clients
from fedtl.data.split_files import KEY, with_split_file, write_split
from fedtl.errors import InputError
from fedtl.scenario.schema import Clients

BY_FILE = Clients(partition="file")


def examples_of(size: int = 200, domains: int = 12) -> Examples:
    return Examples(
        (np.arange(size) % 5).astype(np.int32),
        tuple("abcde"),
        "ab12",
        features=np.zeros((size, 1), np.float32),
        domains=(np.arange(size) % domains).astype(np.int32),
        domain_names=tuple(f'd, "{i}"' for i in range(domains)),
    )


def written(path: Path, clients: Clients, seed: int = 0, **changes: Any) -> Examples:
    examples = replace(examples_of(), **changes)
    assignment = assign_clients(examples, clients, seed)
    write_split(path, examples, assignment, dealing.test_rows(assignment, examples, 0.3, seed))
    return examples


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(["iid", "dirichlet", "domain", "label_quantity"]),
    st.integers(0, 10**9),
    st.sampled_from([1, 5]),
)
def test_the_same_clients_in_the_same_order_with_the_same_tests(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, partition: str, seed: int, least: int
) -> None:
    path = tmp_path_factory.mktemp("split") / f"split.{suffix}"
    clients = Clients(partition=partition, num=15, alpha=0.2, min_examples=least)
    examples = written(path, clients, seed)
    first = split_clients(assign_clients(examples, clients, seed), examples, clients, 0.3, seed)
    named = with_split_file(examples, path)
    again = clients.model_copy(update={"partition": "file"})
    second = split_clients(assign_clients(named, again, 99), named, again, 0.3, 99)
    assert second.names == first.names
    assert second.domains == first.domains
    for part in ("train", "test"):
        assert (getattr(first, part).index == getattr(second, part).index).all()
        assert (getattr(first, part).offsets == getattr(second, part).offsets).all()
    assert [e for e in first.excluded if e[1]] == list(second.excluded)


def test_the_content_is_in_the_identity_and_not_in_the_fingerprint(tmp_path: Path) -> None:
    path, other = tmp_path / "a.csv", tmp_path / "a.parquet"
    examples = written(path, Clients(num=4))
    named = with_split_file(examples, path)
    assert named.fingerprint == examples.fingerprint
    assert named.identity != examples.identity
    written(other, Clients(num=4))
    assert with_split_file(examples, other).identity == named.identity
    written(path, Clients(num=4), seed=1)
    assert with_split_file(examples, path).identity != named.identity


def test_nothing_is_in_it_but_rows_clients_and_splits(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    written(path, Clients(num=2))
    lines = path.read_text().splitlines()
    assert lines[:2] == [f"# {KEY} ab12", '"row","client","split"']
    assert len(lines) == 202
    assert {line.split(",")[1] for line in lines[2:]} == {'"client-0000"', '"client-0001"'}
    written(path, Clients(num=3))  # another of ours is replaced
    assert "client-0002" in path.read_text()
    written(tmp_path / "split.parquet", Clients(num=2))
    table = pq.read_table(tmp_path / "split.parquet")
    assert table.column_names == ["row", "client", "split"]


def test_a_file_that_is_something_else_is_not_overwritten(tmp_path: Path) -> None:
    for name in ("data.csv", "data.parquet"):
        (tmp_path / name).write_text("y,a\n1,2\n")
        with pytest.raises(InputError, match="no split file"):
            written(tmp_path / name, Clients(num=2))
        assert (tmp_path / name).read_text() == "y,a\n1,2\n"
    with pytest.raises(InputError, match="not a name for a split file"):
        written(tmp_path / "split.txt", Clients(num=2))


HEAD = f"# {KEY} ab12\nrow,client,split\n"
GOOD = [f"{i},c{i % 3},{'test' if i % 4 == 0 else 'train'}" for i in range(200)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (HEAD.replace("ab12", "cd34") + "\n".join(GOOD), "of other data"),
        (HEAD + "\n".join(GOOD[:-1]), "199 rows"),
        (HEAD + "\n".join([*GOOD, "200,c1,train"]), "201 rows"),
        (HEAD + "\n".join([*GOOD[:-1], "200,c1,train"]), "row numbers"),
        (HEAD + "\n".join([*GOOD[:-1], "-1,c1,train"]), "row numbers"),
        (HEAD + "\n".join([*GOOD[:-1], "0,c1,train"]), "1 rows more than once"),
        (HEAD + "\n".join([*GOOD[:-1], "199,c1,validation"]), "split 'validation'"),
        (HEAD + "\n".join([*GOOD[:-1], "199, ,train"]), "client names"),
        (HEAD + "\n".join([*GOOD[:-1], "199,a\x1bb,train"]), "client names"),
        (HEAD + "\n".join([*GOOD[:-1], ",c1,train"]), "empty cells"),
        (HEAD + "\n".join([*GOOD[:-1], "x,c1,train"]), "damaged"),
        (HEAD + "\n".join([*GOOD[:-1], "199,c1"]), "damaged"),
        (HEAD.replace("split\n", "split,age\n") + "\n".join(f"{g},7" for g in GOOD), "columns"),
        (HEAD.replace("client", "who") + "\n".join(GOOD), "columns"),
        ("row,client,split\n" + "\n".join(GOOD), "no split file"),
        (HEAD, "0 rows"),
        ("", "no split file"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "split.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        with_split_file(examples_of(), path)
    path.write_text(HEAD + "\n".join(GOOD))
    named = with_split_file(examples_of(), path)
    assert named.client_names == ("c0", "c1", "c2")
    assert assign_clients(named, BY_FILE, 0).client[:5].tolist() == [0, 1, 2, 0, 1]


def test_what_is_no_parquet_and_what_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "split.parquet"
    with pytest.raises(InputError, match="no such file"):
        with_split_file(examples_of(), path)
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match="no split file"):
        with_split_file(examples_of(), path)
    table = pa.table({"row": [0], "client": ["a"], "split": ["test"]})
    pq.write_table(table.replace_schema_metadata({KEY: "ab12"}), path)
    with pytest.raises(InputError, match="1 rows"):
        with_split_file(examples_of(), path)
    path.write_bytes(path.read_bytes()[:-20] + b"\0" * 20)
    with pytest.raises(InputError, match="split file"):
        with_split_file(examples_of(), path)


def test_the_number_of_clients_may_count_those_without_anything(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    named = with_split_file(written(path, Clients(num=4)), path)
    assert len(assign_clients(named, Clients(partition="file", num=9), 0).names) == 4
    with pytest.raises(InputError, match="another number of clients"):
        assign_clients(named, Clients(partition="file", num=3), 0)

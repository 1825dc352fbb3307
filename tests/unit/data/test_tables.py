"""Tables from csv and Parquet: what is a number, a name, missing, or wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedtl import machine
from fedtl.data.examples import Examples, Table
from fedtl.data.leakage import row_hashes
from fedtl.data.tables import load_table
from fedtl.errors import EnvironmentFault, InputError
from fedtl.scenario.schema import Data

TEXT = """age,kind,ill,hospital
63,a,yes,rome
,b,no,rome
41.5,,yes,oslo
NaN,a,no,oslo
"""
Load = Callable[..., Examples]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def read(text: str = TEXT, one_client: bool = False, **keys: Any) -> Examples:
        path = tmp_path / "people.csv"
        path.write_text(text)
        given = {"label": "ill", "client": "hospital", "categorical": ["kind"]} | keys
        data = Data(source="table", path=str(path), **given)
        return load_table(data, one_client=one_client)

    return read


def table(examples: Examples) -> Table:
    assert examples.table is not None
    return examples.table


def test_columns_have_their_roles(load: Load) -> None:
    examples = load()
    found = table(examples)
    assert found.numeric_names == ("age",)
    assert found.categorical_names == ("kind",)
    assert found.categories == (("a", "b"),)
    np.testing.assert_array_equal(found.numeric, [[63], [np.nan], [41.5], [np.nan]])
    assert found.codes.tolist() == [[0], [1], [-1], [0]]
    assert examples.classes == ("no", "yes")
    assert examples.labels.tolist() == [1, 0, 1, 0]
    assert examples.client_names == ("oslo", "rome")
    assert examples.kind == "rows"


def test_parquet_is_read_like_csv(load: Load, tmp_path: Path) -> None:
    wanted = load()
    frame = pd.DataFrame(
        {
            "age": [63, None, 41.5, np.nan],
            "kind": pd.Categorical(["a", "b", None, "a"]),
            "ill": ["yes", "no", "yes", "no"],
            "hospital": ["rome", "rome", "oslo", "oslo"],
        }
    )
    frame.to_parquet(tmp_path / "people.parquet")
    given: dict[str, Any] = {"label": "ill", "client": "hospital", "categorical": ["kind"]}
    path = str(tmp_path / "people.parquet")
    assert load_table(Data(source="table", path=path, **given)).fingerprint == wanted.fingerprint


def test_numbers_and_truths_of_parquet(tmp_path: Path) -> None:
    columns = {
        "small": pa.array([1, None, 3], pa.int8()),
        "true": pa.array([True, False, None]),
        "half": pa.array([0.1, 2.5, None], pa.float32()),
        "label": pa.array([1, 0, 1]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    examples = load_table(Data(source="table", path=str(tmp_path / "a.parquet")))
    wanted = [[1, 1, 0.1], [np.nan, 0, 2.5], [3, np.nan, np.nan]]
    np.testing.assert_allclose(table(examples).numeric, wanted, rtol=1e-7)
    assert examples.classes == ("0", "1")


def test_whole_numbers_that_a_program_wrote_as_floats(load: Load) -> None:
    text = "x,kind,ill,hospital\n1,1.0,0.0,2\n2,2,1.0,2.0\n3,10.00,1,2\n"
    examples = load(text)
    assert examples.classes == ("0", "1")
    assert examples.client_names == ("2",)
    assert table(examples).categories == (("1", "2", "10"),)
    stated = load(text, categories={"kind": ["10", "2.0", "1"]})
    assert table(stated).categories == (("10", "2", "1"),)
    assert table(stated).codes.tolist() == [[2], [1], [0]]


def test_roles_by_default(load: Load) -> None:
    text = "b,label,a,client,domain,split,id\n1,u,2,p,d,train,x7\n3,v,4,q,d,test,x8\n"
    examples = load(text, label="label", client=None, categorical=[], ignore=["id"])
    assert table(examples).numeric_names == ("b", "a")  # in the file's order
    assert examples.client_names == ("p", "q")
    assert examples.domain_names == ("d",)
    assert examples.is_test is not None
    assert examples.is_test.tolist() == [False, True]
    ordered = load(text, label="label", client=None, categorical=[], numeric=["a", "b"])
    assert table(ordered).numeric_names == ("a", "b")  # in the scenario's
    assert ordered.fingerprint != examples.fingerprint


def test_who_a_client_is_may_also_be_its_domain(load: Load) -> None:
    examples = load(domain="hospital")
    assert examples.domain_names == examples.client_names == ("oslo", "rome")


@pytest.mark.parametrize("value", ["31337x", "inf", "-Infinity", "1e39", "true"])
def test_no_finite_number(load: Load, value: str) -> None:
    with pytest.raises(InputError) as caught:
        load(TEXT.replace("41.5", value), numeric=["age"])
    line = caught.value.line()
    assert "column 'age': no finite number in 1 row: 4" in line
    assert value not in line.partition("people.csv")[2]


def test_text_among_columns_that_nobody_named(load: Load) -> None:
    with pytest.raises(
        InputError, match=r"column 'kind': no finite number in 3 rows: 2, 3, 5; is "
    ):
        load(categorical=[])


def test_unknown_categories_are_counted_and_not_told(load: Load) -> None:
    with pytest.raises(InputError) as caught:
        load(categories={"kind": ["a", "c"]})
    line = caught.value.line()
    assert "column 'kind': a value that is not in data.categories.kind in 1 row: 3" in line
    assert "'b'" not in line


def test_columns_that_are_missing_come_with_the_nearest_name(load: Load) -> None:
    with pytest.raises(InputError) as caught:
        load(numeric=["Age", "chol"], categorical=["kinds"], label="ilness")
    line = caught.value.line()
    assert "column 'Age' is missing; is it 'age'?" in line
    assert "column 'kinds' is missing; is it 'kind'?" in line
    assert "column 'ilness' is missing" in line
    assert "column 'chol' is missing\n" in line
    with pytest.raises(InputError, match="column 'a' is missing; is it 'age'"):
        load(numeric=["a"])  # one begins like the other


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("age,ill\n1,yes\n2,\n3,no\n", "column 'ill': no value in 1 row: 3"),
        ("age,ill\n1,0.25\n2,0.5\n", "neither a whole number nor a name"),
        ("age,ill\n1,a\n2,a\n", "column 'ill' has only one class"),
        ("age,ill\n", "no row below the header"),
        ("ill\na\nb\n", "no column of features"),
        ("age;ill\n1;a\n", "use commas"),
        ("age,age,ill\n1,2,a\n", "columns twice: 'age'"),
        ("age,ill\n1,a,9\n2,b,9\n", "more values than the header"),
        ("age,ill\n1,a,9,9\n2,b\n3\n", "more values than the header"),
        ('age,ill\n1,"a\n', "damaged table"),
        ("age,ill\n1,a\n2,b\x1b[31m\n", "some that cannot be shown, in 1 row: 3"),
    ],
)
def test_what_is_refused(load: Load, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        load(text, client=None, categorical=[])
    assert "\x1b" not in caught.value.line()


def test_one_client_may_have_one_class(load: Load) -> None:
    only = load("age,ill\n1,yes\n2,yes\n", client=None, categorical=[], one_client=True)
    assert only.classes == ("yes",)


def test_identifiers_are_no_categories(load: Load) -> None:
    text = "age,kind,ill,hospital\n" + "".join(f"1,id{i},{i % 2},r\n" for i in range(1001))
    with pytest.raises(InputError, match=r"column 'kind' has 1001 different values.*data.ignore"):
        load(text)


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Examples:
        return load_table(Data(source="table", path=str(tmp_path / name)))

    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    (tmp_path / "latin.csv").write_bytes(b"a,label\n1,caf\xe9\n")
    pq.write_table(pa.table({"a": [[1], [2]], "label": ["u", "v"]}), tmp_path / "lists.parquet")
    (tmp_path / "ok.csv").write_text("a,label\n1,u\n2,v\n")
    pq.write_table(pa.table({"a": [1, 2], "label": ["u", "v"]}), tmp_path / "ok.parquet")
    for name, says in (
        ("a.parquet", "damaged .parquet"),
        ("a.xlsx", "not a table"),
        ("no.csv", "no such"),
        ("latin.csv", "UTF-8"),
        ("lists.parquet", "column 'a' is list"),
    ):
        with pytest.raises(InputError, match=says):
            load(name)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 100)
    for name in ("ok.csv", "ok.parquet"):
        with pytest.raises(EnvironmentFault, match="does not fit into memory"):
            load(name)


def test_what_the_fingerprint_knows(load: Load) -> None:
    seen = {
        load().fingerprint,
        load(TEXT.replace("63", "64")).fingerprint,
        load(TEXT.replace("age", "years")).fingerprint,
        load(TEXT.replace("rome", "oslo")).fingerprint,
        load(TEXT.replace("63,a", "63,b")).fingerprint,
        load(categories={"kind": ["b", "a"]}).fingerprint,
        load(categories={"kind": ["a", "b", "c"]}).fingerprint,
    }
    assert len(seen) == 7


def test_rows_are_the_same_content_whatever_is_missing_in_them(load: Load) -> None:
    text = "x,kind,ill,hospital\n,a,0,r\nnan,a,1,o\n0,a,1,o\n-0,a,0,o\n0,,1,r\n"
    hashes = [bytes(row) for row in row_hashes(load(text))]
    assert hashes[0] == hashes[1]
    assert hashes[2] == hashes[3]
    assert len(set(hashes)) == 3


def test_subsets_keep_rows_together(load: Load) -> None:
    some = load().subset(np.array([0, 2]))
    assert table(some).numeric[:, 0].tolist() == [63, 41.5]
    assert table(some).codes[:, 0].tolist() == [0, -1]
    assert some.where(1) == "row 1"

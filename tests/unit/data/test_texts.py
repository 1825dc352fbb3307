"""Texts from csv, Parquet and Hugging Face's library: the same rows whichever it is."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedtl.data.examples import Examples
from fedtl.data.hub_sets import load_datasets
from fedtl.data.texts import MAX_CHARACTERS, load_texts
from fedtl.errors import EnvironmentFault, InputError, SecurityRefusal
from fedtl.scenario.schema import Data

SECRET = "the patient Zaphod"
TABLE = pd.DataFrame(
    {
        "text": ["good, really", "bad", 'a "quoted"\nline', "  blanks around  ", "grün", "é"],
        "label": ["pos", "neg", "pos", "neg", "pos", "neg"],
        "domain": ["films", "films", "food", "food", "food", "films"],
        "client": ["c2", "c1", "c1", "c2", "c1", "c2"],
    }
)


def csv(folder: Path, table: pd.DataFrame, name: str = "t.csv") -> Path:
    table.to_csv(folder / name, index=False)
    return folder / name


def load(path: Path, **keys: Any) -> Examples:
    return load_texts(Data(source="texts", path=str(path), **keys))


def same(one: Examples, other: Examples) -> None:
    assert one.texts is not None
    assert other.texts is not None
    assert [one.texts[i] for i in range(len(one))] == [other.texts[i] for i in range(len(other))]
    np.testing.assert_array_equal(one.labels, other.labels)
    assert one.classes == other.classes
    assert one.domain_names == other.domain_names
    assert one.client_names == other.client_names


def test_a_csv_is_read_as_it_stands(tmp_path: Path) -> None:
    found = load(csv(tmp_path, TABLE))
    assert found.kind == "texts"
    assert found.texts is not None
    assert [found.texts[i] for i in range(6)] == [text.strip() for text in TABLE["text"]]
    assert found.classes == ("neg", "pos")
    assert found.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert found.domain_names == ("films", "food")
    assert found.clients is not None
    assert [found.client_names[i] for i in found.clients] == TABLE["client"].tolist()
    assert found.where(2) == "row 4"
    assert found.subset(np.array([4, 5])).where(0) == "row 6"


def test_parquet_and_datasets_give_the_same(tmp_path: Path) -> None:
    import datasets

    from_csv = load(csv(tmp_path, TABLE))
    TABLE.to_parquet(tmp_path / "t.parquet")
    same(load(tmp_path / "t.parquet"), from_csv)
    datasets.Dataset.from_pandas(TABLE).save_to_disk(str(tmp_path / "d"))
    same(load_datasets(Data(source="datasets", path=str(tmp_path / "d"))), from_csv)


def test_parts_and_class_labels_of_a_data_set(tmp_path: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["1.0", "better"])  # a name that is a number
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names})

    def part(texts: list[str], labels: list[int]) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"sentence": texts, "label": labels}, features=features)

    whole = datasets.DatasetDict({"train": part(["a", "b"], [1, 0]), "test": part(["c"], [1])})
    whole.save_to_disk(str(tmp_path / "d"))

    def read(subset: str) -> Examples:
        keys = {"source": "datasets", "path": str(tmp_path / "d"), "text": "sentence"}
        return load_datasets(Data.model_validate({**keys, "subset": subset}))

    assert read("train").classes == ("1.0", "better")
    assert read("train").labels.tolist() == [1, 0]
    assert len(read("all")) == 3
    with pytest.raises(InputError, match=r"is it 'sentence'"):
        load_datasets(Data(source="datasets", path=str(tmp_path / "d"), text="sentense"))
    part(["a", "b"], [-1, 0]).save_to_disk(str(tmp_path / "unlabelled"))
    with pytest.raises(InputError, match="no value in 1 row"):
        load_datasets(Data(source="datasets", path=str(tmp_path / "unlabelled"), text="sentence"))


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    base = load(csv(tmp_path, TABLE)).fingerprint
    assert load(csv(tmp_path, TABLE, "other.csv")).fingerprint == base
    for column in TABLE.columns:
        changed = TABLE.copy()
        changed.loc[0, column] = {"label": "neg", "domain": "food", "client": "c1"}.get(column, "x")
        assert load(csv(tmp_path, changed)).fingerprint != base


def test_columns_by_other_names(tmp_path: Path) -> None:
    names = {"text": "review", "label": "stars", "domain": "shop", "client": "who"}
    path = csv(tmp_path, TABLE.rename(columns=names))
    same(load(path, **names), load(csv(tmp_path, TABLE, "plain.csv")))
    with pytest.raises(InputError, match=r"'text' is missing\n  column 'label' is missing"):
        load(path)
    with pytest.raises(InputError, match=r"'revew' is missing; is it 'review'\?") as caught:
        load(path, text="revew", label="stars")
    assert "data.text = 'review'" in str(caught.value)


def test_whole_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    table = TABLE.assign(label=[10, 2, 10, 2, 1, 1])
    assert load(csv(tmp_path, table)).classes == ("1", "2", "10")


def test_a_split_that_came_with_the_data(tmp_path: Path) -> None:
    table = TABLE.assign(split=["train", "test"] * 3)
    found = load(csv(tmp_path, table))
    assert found.is_test is not None
    assert found.is_test.tolist() == [False, True] * 3


@pytest.mark.parametrize(
    ("column", "value", "what"),
    [
        ("text", "", "column 'text': no value in 1 row: 4"),
        ("text", " \t\n ", "column 'text': no value in 1 row: 4"),
        ("label", None, "column 'label': no value in 1 row: 4"),
        ("label", "x" * 201, "more than 200 characters"),
        ("domain", "", "column 'domain': no value in 1 row: 4"),
        ("text", "x" * (MAX_CHARACTERS + 1), "more than 1,000,000 characters in 1 row: 4"),
    ],
)
def test_rows_that_will_not_do(column: str, value: Any, what: str, tmp_path: Path) -> None:
    table = TABLE.assign(text=[f"{SECRET} {i}" for i in range(6)])
    table.loc[2, column] = value
    for path in (csv(tmp_path, table), tmp_path / "t.parquet"):
        table.to_parquet(tmp_path / "t.parquet")
        with pytest.raises(InputError, match=what) as caught:
            load(path)
        assert "Zaphod" not in str(caught.value)


def test_rows_without_a_value_can_be_left_out(tmp_path: Path) -> None:
    table = TABLE.copy()
    table.loc[1, "text"], table.loc[3, "label"] = " ", None
    found = load(csv(tmp_path, table), on_bad_file="skip")
    assert len(found) == 4
    assert found.where(3) == "row 7"
    assert len(found.notes) == 2
    assert "column 'text': no value in 1 row: 3" in found.notes[0]


def test_a_long_text_is_read(tmp_path: Path) -> None:
    table = TABLE.copy()
    table.loc[0, "text"] = "good " * 20_000
    assert len(load(csv(tmp_path, table))) == 6


def test_numbers_are_read_as_text_and_na_is_a_word(tmp_path: Path) -> None:
    table = TABLE.assign(text=[1, 2, 3, 4, 5, "NA"])
    found = load(csv(tmp_path, table))
    assert found.texts is not None
    assert found.texts[0] == "1"
    assert found.texts[5] == "NA"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"text;label\na;b\n", "semicolons"),
        (b"text,label\n", "no row"),
        ("text,label\ngr\u00fcn,a\nb,b\n".encode("latin-1"), "UTF-8"),
        (b"text,label\na,b\nc,b\n", "only one class"),
        (b"text,label\na,b,c\nc,b\n", "more values"),
        (b"text,label,text\na,b,c\n", "twice"),
    ],
)
def test_files_that_will_not_do(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=what):
        load(tmp_path / "t.csv")


def test_places_that_will_not_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such"):
        load(tmp_path / "none.csv")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="damaged"):
        load(tmp_path / "t.parquet")
    with pytest.raises(InputError, match="no such folder"):
        load_datasets(Data(source="datasets", path=str(tmp_path / "none")))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "state.json").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match="not a data set"):
        load_datasets(Data(source="datasets", path=str(tmp_path / "d")))


def test_a_name_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refused(name: str) -> None:
        raise ConnectionError(name)

    monkeypatch.setattr(datasets, "load_dataset_builder", refused)
    with pytest.raises(EnvironmentFault, match="cannot be had"):
        load_datasets(Data(source="datasets", name="somebody/some-set"))


def test_a_name_that_is_not_tables_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    class Builder:
        name, repo_id = "pandas", "somebody/some-set"

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: Builder())
    with pytest.raises(SecurityRefusal, match="not made of tables"):
        load_datasets(Data(source="datasets", name="somebody/some-set"))


def test_a_name_is_read_from_its_tables(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    TABLE.to_parquet(tmp_path / "set" / "train.parquet")
    found = load_datasets(Data(source="datasets", name=str(tmp_path / "set")))
    same(found, load(csv(tmp_path, TABLE)))

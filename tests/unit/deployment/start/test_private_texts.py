"""A real client's own texts, read as the server's scenario says."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtl.deployment.private_data import load_private, own_data, told_of
from fedtl.errors import InputError
from fedtl.scenario.schema import Data


@pytest.mark.parametrize(
    "server",
    [
        Data(source="texts", path="/theirs.csv", text="review", label="stars"),
        Data(source="datasets", name="somebody/set", text="review", label="stars"),
    ],
)
def test_columns_are_the_scenarios_and_the_path_the_clients(server: Data, tmp_path: Path) -> None:
    told = told_of(server)
    assert told == {"source": "texts", "label": "stars", "text": "review"}
    (tmp_path / "own.csv").write_text("review,stars\nfine,good\n")
    section = Data.model_validate(own_data(tmp_path / "own.csv", told))
    found = load_private(tmp_path / "own.csv", section)
    assert found.kind == "texts"
    assert found.texts is not None
    assert found.texts[0] == "fine"
    assert found.classes == ("good",)  # one class will do


def test_what_is_wrong_with_them_names_no_text(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("text,label\nzaphod,a\n,b\n")
    section = Data.model_validate(own_data(tmp_path / "own.csv", told_of(Data(source="texts"))))
    with pytest.raises(InputError, match="no value in 1 row: 3") as caught:
        load_private(tmp_path / "own.csv", section)
    assert "zaphod" not in str(caught.value)

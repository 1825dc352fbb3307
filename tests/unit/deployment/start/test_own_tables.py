"""A real client's own table or recordings: the rows of the simulation, and what stays unsaid."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.io import wavfile

from fedtl.build import make_federation, open_data
from fedtl.deployment.private_data import first_look, own_data, told_of
from fedtl.errors import InputError
from fedtl.scenario.schema import Data

IDENTITY = {"name": "identity", "weights": "default", "image_size": None}
COLUMNS = {
    "label": "ill",
    "numeric": ["age", "chol"],
    "categorical": ["kind"],
    "categories": {"kind": ["u", "v", "w"]},
}
NAMES = ("lima", "oslo", "rome")


def people(num: int = 120) -> pd.DataFrame:
    rng = np.random.default_rng(2)
    frame = pd.DataFrame(
        {
            "chol": rng.normal(200, 40, num),
            "age": rng.normal(50, 9, num),
            "kind": rng.choice(["u", "v"], num),
            "ill": rng.integers(0, 2, num),
            "client": [NAMES[i % 3] for i in range(num)],
        }
    )
    frame.loc[(rng.random(num) < 0.2) & (frame["client"] != "oslo"), "age"] = np.nan
    frame.loc[rng.random(num) < 0.2, "kind"] = None
    frame.loc[frame["client"] == "oslo", "chol"] = np.nan  # never measured there
    return frame


@pytest.fixture
def site(make_site: Callable[..., Any], tmp_path: Path) -> Any:
    people().to_csv(tmp_path / "all.csv", index=False)
    data = {"source": "table", "path": str(tmp_path / "all.csv"), "domains": False, **COLUMNS}
    return make_site(data=data, clients={"partition": "natural"}, backbone=IDENTITY)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_rows_are_those_of_the_simulation(site: Any, tmp_path: Path, suffix: str) -> None:
    simulated = make_federation(open_data(site.scenario)).population
    for name in NAMES:
        mine = people().query(f"client == '{name}'").drop(columns="client")
        mine = mine[["ill", *sorted({"chol", "age", "kind"})]]  # in another order
        path = tmp_path / f"{name}.{suffix}"
        mine.to_csv(path, index=False) if suffix == "csv" else mine.to_parquet(path)
        site.add(name, path)
    gathered = site.gathering().gather()
    assert (gathered.roster.names, gathered.roster.width) == (NAMES, 2 + 2 + 3)
    assert gathered.roster.classes == ("0", "1")
    for node, clients in gathered.seats.items():
        mine = site.hosts[site.names[node]].population()
        for split in ("train", "test"):
            own, other = mine.client(0, split), simulated.client(int(clients[0]), split)
            assert own.features.tobytes() == other.features.tobytes()
            assert own.labels.tobytes() == other.labels.tobytes()


SECRET = "31337"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda frame: frame.rename(columns={"chol": "cholesterol"}), "is it 'cholesterol'?"),
        (lambda frame: frame.assign(kind=SECRET), "not in data.categories.kind in 40 rows"),
        (lambda frame: frame.assign(age=SECRET + "x"), "column 'age': no finite number in 40 rows"),
        (lambda frame: frame.assign(ill=None), "column 'ill': no value in 40 rows"),
    ],
)
def test_what_is_wrong_is_said_at_home_alone(
    site: Any, tmp_path: Path, spoil: Callable[[pd.DataFrame], pd.DataFrame], told: str
) -> None:
    mine = people().query("client == 'rome'").drop(columns="client")
    spoil(mine).to_csv(tmp_path / "rome.csv", index=False)
    site.add("rome", tmp_path / "rome.csv")
    with pytest.raises(InputError) as caught:
        site.hosts["rome"].join(site_terms(site, "rome"))
    assert caught.value.what.startswith("its data cannot be used")  # all that travels
    assert told in caught.value.line()
    assert SECRET not in caught.value.line()


def test_classes_that_are_none_are_not_told(site: Any, tmp_path: Path) -> None:
    """The server says which column is the class, and is told all that stands there."""
    mine = people().query("client == 'rome'").drop(columns="client")
    mine.to_csv(tmp_path / "rome.csv", index=False)
    site.add("rome", tmp_path / "rome.csv")
    site.hosts["rome"].join(site_terms(site, "rome"))
    said = "the server is told the names of 2 classes: column 'ill', as its scenario says"
    assert said in site.told["rome"]
    names = [f"{SECRET} {i}" for i in range(len(mine))]
    mine.assign(ill=names).to_csv(tmp_path / "oslo.csv", index=False)
    site.add("oslo", tmp_path / "oslo.csv")
    with pytest.raises(InputError, match="another for most examples"):
        site.hosts["oslo"].join(site_terms(site, "oslo"))
    assert SECRET not in str(site.told["oslo"])


def site_terms(site: Any, name: str) -> dict[str, Any]:
    from fedtl.deployment.terms import make_terms
    from fedtl.transfer.backbones import open_backbone

    backbone = open_backbone(site.scenario.backbone, site.scenario.seed)
    return {**make_terms(site.scenario, backbone), "key_name": name, "run": "r"}


def test_what_is_told_and_what_is_ones_own(tmp_path: Path) -> None:
    given = {"client": "site", "domain": "site", "ignore": ["id"]}
    data = Data.model_validate({"source": "table", "path": "/server/all.csv", **COLUMNS, **given})
    told = told_of(data)
    assert "/server" not in str(told)
    own = own_data(tmp_path / "mine.csv", told)
    assert own["path"] == str(tmp_path / "mine.csv")
    assert own["source"] == "table"
    assert own["categories"] == COLUMNS["categories"]
    assert "client" not in own  # a client's own file has no such column
    assert own_data(tmp_path / "mine.npz", told)["source"] == "arrays"
    assert own_data(tmp_path, told_of(Data())) == {"source": "folder", "path": str(tmp_path)}
    sound = Data(source="sound", path="/server/a.zip", rate=16_000)
    assert own_data(tmp_path, told_of(sound))["rate"] == 16_000
    with pytest.raises(InputError, match="does not say how data are read"):
        own_data(tmp_path, None)


def test_a_first_look_before_anything_is_said(tmp_path: Path) -> None:
    people().drop(columns=["client"]).to_csv(tmp_path / "a.csv", index=False)
    line, classes = first_look(tmp_path / "a.csv")
    assert line == "a table of 4 columns; the scenario says which is what"
    assert classes == {}
    (tmp_path / "b.csv").write_text("a,kind,label\n1,u,yes\n,v,no\n")
    assert "the scenario says what is what" in first_look(tmp_path / "b.csv")[0]
    (tmp_path / "c.csv").write_text("a,label\n1,yes\n2,no\n3,no\n")
    assert first_look(tmp_path / "c.csv") == ("3 examples in 2 classes", {"no": 2, "yes": 1})
    (tmp_path / "said").mkdir()
    for name in ("0_ann.wav", "1_ann.wav"):
        file = io.BytesIO()
        wavfile.write(file, 8000, np.zeros(9, np.float32))
        (tmp_path / "said" / name).write_bytes(file.getvalue())
    assert first_look(tmp_path / "said") == ("2 recordings", {})
    (tmp_path / "empty").mkdir()
    for name in ("none.csv", "empty", "none"):
        with pytest.raises(InputError):
            first_look(tmp_path / name)


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r"(a|a)*b", r"(.*)(.*)(.*)(.*)x", "(", "abc", 7, "(a)" * 100]
)
def test_a_pattern_that_could_take_forever_is_not_run(tmp_path: Path, pattern: Any) -> None:
    told = {**told_of(Data(source="sound", path="x.zip")), "label_pattern": pattern}
    with pytest.raises(InputError, match="pattern"):
        own_data(tmp_path, told)
    assert own_data(tmp_path, {**told, "label_pattern": r"(\d+)_\w+\.wav$"})["source"] == "sound"

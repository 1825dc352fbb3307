"""Tables, series and recordings as people have them: one line, the right code, nothing left."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import wavfile

Fedtl = Callable[..., subprocess.CompletedProcess[str]]

TABLE = """name = "people"
rounds = 1
[data]
source = "table"
path = "people.csv"
label = "ill"
client = "site"
numeric = ["age", "chol"]
categorical = ["kind"]
leakage = "allow"
[clients]
partition = "natural"
[backbone]
name = "identity"
[training]
local_epochs = 1
[evaluation]
references = []
"""


def assert_refused(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in says), done.stderr


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Forty people at two sites, with gaps, and a scenario."""
    rng = np.random.default_rng(0)
    lines = ["age,chol,kind,ill,site"]
    for i in range(40):
        age = "" if i % 7 == 0 else f"{rng.normal(50, 9):.3f}"
        chol = "" if i % 2 else "200"  # one site never measured it, at the other all are alike
        lines.append(f"{age},{chol},{'ab'[i % 3 == 0]},{i % 3 % 2},{('rome', 'oslo')[i % 2]}")
    (tmp_path / "people.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "people.toml").write_text(TABLE)
    return tmp_path / "people.csv"


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_gaps_are_no_fault(fedtl: Fedtl, people: Path) -> None:
    for command in ("check", "split"):
        assert fedtl(command, "people.toml").returncode == 0
    done = fedtl("run", "people.toml", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "note column 'chol' has no value in the training rows of oslo: 0 there" in done.stdout
    assert "note column 'chol' is constant in the training rows of rome: 0 there" in done.stdout
    assert json.loads((people.parent / "out/summary.json").read_text())["num_clients"] == 2


def test_what_was_shared_is_told(fedtl: Fedtl, people: Path) -> None:
    done = fedtl("run", "people.toml", "--out", "out", "--set", "data.scaling=federated")
    assert done.returncode == 0
    notes = " ".join(json.loads((people.parent / "out/summary.json").read_text())["notes"])
    assert "each of 2 clients shares 6 numbers: count, sum and sum of squared" in notes


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("age,chol", "age,cholesterol", "column 'chol' is missing; is it 'cholesterol'?"),
        ("chol,kind", "chol,knid", "column 'kind' is missing; is it 'knid'?"),
        (",ill", ",sick", "column 'ill' is missing"),
        (",200,", ",two hundred,", "column 'chol': no finite number in 20 rows: 2, 4, 6, 8, 10"),
        (",200,", ",inf,", "column 'chol': no finite number"),
        ("rome\n", "\n", "column 'site': no value"),
        ("rome\n", "rome,9\n", "more values than the header names"),
        ("age,chol", "age,age", "columns twice: 'age'"),
    ],
)
def test_tables_that_are_wrong(fedtl: Fedtl, people: Path, old: str, new: str, says: str) -> None:
    people.write_text(people.read_text().replace(old, new))
    before = left(people.parent)
    for command in (["check"], ["run", "--out", "out"]):
        done = fedtl(command[0], "people.toml", *command[1:])
        assert_refused(done, says)
        assert "two hundred" not in done.stderr
    assert left(people.parent) == before


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["data.categories={kind=['a','c']}"], "not in data.categories.kind"),
        (["data.categories={knid=['a']}"], "not in data.categorical"),
        (["data.scaling=none"], "numbers are missing in 2 columns: 'age', 'chol'"),
        (["data.scaling=clients"], "data.scaling"),
        (["data.label=disease"], "column 'disease' is missing"),
        (["data.ignore=['age']"], "'age' is named in data.numeric too"),
        (["data.categorical=[]", "data.numeric=['kind']"], "column 'kind': no finite number"),
        (["data.path=none.csv"], "no such .csv or .parquet file"),
        (["backbone.name=efficientnet_lite0"], "the data are rows of numbers"),
        (["backbone.name=forest"], "public source set"),
        (["backbone.name=forest", "backbone.path=none.csv"], "none.csv"),
        (["backbone.name=windows"], "comes as an array"),
        (["backbone.name=fourrier"], "did you mean 'fourier'"),
    ],
)
def test_scenarios_that_are_wrong(fedtl: Fedtl, people: Path, values: list[str], says: str) -> None:
    words = [word for value in values for word in ("--set", value)]
    done = fedtl("run", "people.toml", *words, "--out", "out")
    assert done.returncode == 2, done.stderr
    assert says.lower() in " ".join(done.stderr.lower().split())
    assert "Traceback" not in done.stderr
    assert not (people.parent / "out").exists()


def test_a_forest_of_other_columns(fedtl: Fedtl, people: Path) -> None:
    lines = people.read_text().splitlines()
    text = "\n".join([lines[0], *(line.replace(",b,", ",c,") for line in lines[1:])])
    (people.parent / "public.csv").write_text(text)
    forest = ["--set", "backbone.name=forest", "--set", "backbone.path=public.csv"]
    done = fedtl("run", "people.toml", *forest, "--out", "out", "--set", "data.numeric=['age']")
    assert done.returncode == 0, done.stderr  # two names as well; the scenario states none
    stated = ["--set", "data.categories={kind=['a','b']}"]
    assert_refused(
        fedtl("run", "people.toml", *forest, *stated, "--out", "two"),
        "public.csv",
        "not in data.categories.kind",
    )


def test_series_of_another_number_of_channels(fedtl: Fedtl, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 12, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(60) % 2)
    text = (
        TABLE.split("[data]")[0] + '[data]\nsource = "arrays"\npath = "a.npz"\n[clients]\nnum = 3'
    )
    text += '\n[backbone]\nname = "windows"\nwindow = 4\nchannels = 3\n[evaluation]\nreferences=[]'
    (tmp_path / "series.toml").write_text(text)
    done = fedtl("run", "series.toml", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "108" not in done.stderr
    other = fedtl("run", "series.toml", "--set", "backbone.channels=2", "--out", "two")
    assert_refused(other, "backbone.channels: the series have another number of channels")


def tone(rate: int, seconds: float) -> bytes:
    file = io.BytesIO()
    samples = np.sin(np.arange(round(rate * seconds)) * 0.3) * 9000
    wavfile.write(file, rate, samples.astype(np.int16))
    return file.getvalue()


@pytest.fixture
def said(tmp_path: Path) -> Path:
    """Two words, six takes each, of several rates and lengths, and a scenario."""
    for word in ("no", "yes"):
        (tmp_path / "said" / word).mkdir(parents=True)
        for i, rate in enumerate((8000, 16_000, 11_025, 8000, 8000, 44_100)):
            seconds = 0.05 + 0.02 * i + 0.01 * (word == "no")
            (tmp_path / "said" / word / f"{i}.wav").write_bytes(tone(rate, seconds))
    text = TABLE.split("[data]")[0] + '[data]\nsource = "sound"\npath = "said"\nseconds = 0.32\n'
    text += '[clients]\nnum = 2\n[backbone]\nname = "squeezenet1_1"\nweights = "none"\n'
    text += "image_size = 32\n[evaluation]\nreferences = []\n"
    (tmp_path / "said.toml").write_text(text)
    return tmp_path / "said"


def test_recordings_of_several_rates(fedtl: Fedtl, said: Path) -> None:
    assert fedtl("check", "said.toml").returncode == 0
    done = fedtl("run", "said.toml", "--out", "out")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (tone(8000, 0), "has no sample"),
        (tone(8000, 0.1)[:20], "cannot be read as wav"),
        (b"RIFF" + bytes(80), "cannot be read as wav"),
    ],
    ids=["empty", "zero", "cut", "none"],
)
def test_recordings_that_are_none(fedtl: Fedtl, said: Path, content: bytes, says: str) -> None:
    (said / "yes" / "3.wav").write_bytes(content)
    done = fedtl("run", "said.toml", "--out", "out")
    assert_refused(done, "yes/3.wav", says)
    if not content:
        skipped = fedtl("run", "said.toml", "--out", "two", "--set", "data.on_bad_file=skip")
        assert skipped.returncode == 0, skipped.stderr


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (r"data.label_pattern=^(\d+)_", "finds no class in 12 of 12 paths"),
        ("data.label_pattern=(", "data.label_pattern"),
        ("data.rate=1", "data.rate"),
        ("data.seconds=0", "data.seconds"),
        ("data.path=people.wav", "no such folder"),
        ("data.domains=true", "no recording lies as <domain>/<class>/<recording>"),
        ("backbone.name=identity", "gives images"),
    ],
)
def test_scenarios_of_sound_that_are_wrong(fedtl: Fedtl, said: Path, value: str, says: str) -> None:
    done = fedtl("run", "said.toml", "--set", value, "--out", "out")
    assert_refused(done, says)


def test_what_tables_come_to_is_one_for_all_threads(fedtl: Fedtl, people: Path) -> None:
    heads: list[Any] = []
    for threads in (1, 2):
        out = f"out{threads}"
        done = fedtl("run", "people.toml", "--out", out, "--set", f"engine.threads={threads}")
        assert done.returncode == 0
        facts = json.loads((people.parent / out / "summary.json").read_text())
        heads.append(facts["head_sha256"])
    assert heads[0] == heads[1]

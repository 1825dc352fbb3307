"""The .csv source: what it takes, and everything it refuses without telling what stands there."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedtl.data import csv_features
from fedtl.data.examples import Examples
from fedtl.data.sources import load_examples
from fedtl.errors import EnvironmentFault, FedtlError, InputError
from fedtl.scenario.schema import Data

Load = Callable[[str | bytes], Examples]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(content: str | bytes) -> Examples:
        path = tmp_path / "Table.CSV"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_examples(Data(source="arrays", path=str(path)))

    return load


def test_same_as_npz(tmp_path: Path, load: Load) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(300, 4)) * 10.0 ** rng.integers(-20, 20, (300, 4))).astype(np.float32)
    y, client = rng.integers(0, 12, 300), rng.choice(["west", "east"], 300)
    np.savez(tmp_path / "a.npz", x=x, y=y, client=client)
    lines = ["f0,client,f1,y,f2,f3"]
    for row, label, who in zip(x, y, client, strict=True):
        a, b, c, d = (np.format_float_scientific(value) for value in row)
        lines.append(f"{a},{who},{b},{label},{c},{d}")
    found = load("\n".join(lines))
    wanted = load_examples(Data(source="arrays", path=str(tmp_path / "a.npz")))
    assert found.fingerprint == wanted.fingerprint
    assert found.features is not None
    assert found.features.tobytes() == x.tobytes()
    assert found.classes == tuple(map(str, range(12)))  # by number, not by letter
    assert found.client_names == ("east", "west")


def test_in_parts(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    # a column that looks whole in one part and not in the next
    text = "a,b,label\n" + "".join(
        f"{i},{i / 7 if i > 20 else i},{'uv'[i % 2]}\n" for i in range(50)
    )
    whole = load(text)
    monkeypatch.setattr(csv_features, "CHUNK_VALUES", 9)
    assert load(text).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("words", "is_test"),
    [("train test train", [0, 1, 0]), ("0 1 1", [0, 1, 1]), ("True FALSE true", [1, 0, 1])],
)
def test_split(load: Load, words: str, is_test: list[int]) -> None:
    a, b, c = words.split()
    examples = load(f"a,y,split\n1,u,{a}\n2,v,{b}\n3,v,{c}\n")
    assert examples.is_test is not None
    assert examples.is_test.tolist() == [bool(value) for value in is_test]


def test_text_as_people_have_it(load: Load) -> None:
    # byte order mark, carriage returns, quotes, spaces, an empty line, names like NA
    examples = load(b'\xef\xbb\xbfage,"label",domain\r\n 1 ,"NA", west\r\n\r\n2,nan,west\r\n')
    assert examples.classes == ("NA", "nan")
    assert examples.domain_names == ("west",)
    assert examples.features is not None
    assert examples.features.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [("2 10 2", ("2", "10")), ("01 1 02", ("01", "02", "1")), ("-1 1 -1", ("-1", "1"))],
)
def test_labels_that_are_numbers(load: Load, labels: str, classes: tuple[str, ...]) -> None:
    assert load("a,y\n" + "\n".join(f"1,{y}" for y in labels.split())).classes == classes


SECRET = "31337"

REFUSED = {
    "missing": (f"age,y\n1,u\n,v\n{SECRET},u\n", r"column 'age': no value in 1 row: 3"),
    "no number": (
        f"age,bmi,y\n1,{SECRET}x,u\nx,1,v\n3,{SECRET}y,u\n",
        r"column 'age': no finite number in 1 row: 3\n"
        r"  column 'bmi': no finite number in 2 rows: 2, 4",
    ),
    "many": (
        "age,y\n" + f"{SECRET}x,u\n" * 9,
        r"in 9 rows: 2, 3, 4, 5, 6, \.\.\.",
    ),
    "not finite": ("age,y\n1,u\ninf,v\nnan,v\n1e39,u\n", r"no finite number in 3 rows: 3, 4, 5"),
    "label missing": ("age,y\n1,u\n2,\n", r"column 'y': no value in 1 row: 3"),
    "label of fractions": (
        f"age,y\n1,2.0\n2,{SECRET}.5\n",
        r"column 'y': neither a whole number nor a name in 2 rows: 2, 3",
    ),
    "long label": (f"age,y\n1,u\n2,{SECRET * 50}\n", r"column 'y': more than 200 .* in 1 row: 3"),
    "escape in a label": (
        f"age,y\n1,u\n2,\x1b[31m{SECRET}\n",
        r"'y': .*cannot be shown, in 1 row: 3",
    ),
    "split": (
        f"age,y,split\n1,u,{SECRET}\n2,v,test\n",
        r"column 'split': neither train.* in 1 row: 2",
    ),
    "short row": (f"age,bmi,y\n{SECRET},2,u\n{SECRET}\n", r"'bmi': no value in 1 row: 3"),
    "long row": (f"age,y\n1,u\n2,v,{SECRET}\n", "Expected 2 fields in line 3, saw 3"),
    "all rows long": (f"age,y\n1,u,{SECRET}\n2,v,{SECRET}\n", "more values than the header names"),
    "quote left open": (f'age,y\n1,"u\n{SECRET},v\n', "EOF inside string"),
    "not UTF-8": (b"age,y\n1,u\n2,\xff31337\n", "not UTF-8"),
    "header not UTF-8": (b"\xff31337,y\n1,u\n", "not UTF-8"),
    "no header": (f"1.5,2\n{SECRET},3\n", "first line holds numbers"),
    "empty": ("", "the file is empty"),
    "only a header": ("age,y\n", "no row below the header"),
    "semicolons": (f"age;y\n{SECRET};u\n", "use commas"),
    "no label": (f"age,Label\n{SECRET},u\n", "no column 'y' or 'label'; rename 'Label'"),
    "two labels": (f"age,y,label\n{SECRET},u,u\n", "both there"),
    "a name twice": (f"age,age,y\n1,{SECRET},u\n", "columns twice: 'age'"),
    "no name": (f"age,,y\n1,{SECRET},u\n", "a column has no name"),
    "no features": (f"y,client\nu,{SECRET}\n", "no column of features"),
    "one class": (f"age,y\n{SECRET},u\n2,u\n", "only one class"),
    "endless header": (b"a," * 2**21 + b"y\n", "too long for a header"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(load: Load, content: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(content)
    assert caught.value.exit_code == 2
    assert "31337" not in caught.value.line()


def test_sizes(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "age,y\n" + "1,u\n2,v\n" * 500
    monkeypatch.setattr("fedtl.machine.available_memory_bytes", lambda: 10_000)
    with pytest.raises(EnvironmentFault, match="does not fit into memory"):
        load(text)
    monkeypatch.setattr(csv_features, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="too large"):
        load(text)


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(FedtlError, match=r"no such \.csv file"):
        load_examples(Data(source="arrays", path=str(tmp_path / "none.csv")))

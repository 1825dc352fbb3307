"""A client's user says what of its data may be read; nothing else ever is."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import fedtl.deployment.host as host_module
from fedtl.deployment.consent import FOLDERS, Consent, Use, typed_consent, use_of
from fedtl.deployment.private_data import first_look, own_data, told_of
from fedtl.deployment.terms import make_terms
from fedtl.errors import InputError, SecurityRefusal
from fedtl.scenario.schema import Data
from fedtl.transfer.backbones import open_backbone

IDENTITY = {"name": "identity", "weights": "default", "image_size": None}
COLUMNS = {"label": "ill", "numeric": ["age", "chol, mg"]}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = range(20)
    frame = pd.DataFrame({"age": rows, "chol, mg": rows, "ill": [i % 2 for i in rows]})
    frame.assign(hiv=[i % 3 for i in rows]).to_csv(tmp_path / "mine.csv", index=False)
    return tmp_path / "mine.csv"


@pytest.fixture
def join(
    make_site: Callable[..., Any], table: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Has a server ask for columns; the client's terminal, with "(read)" once values are read."""

    def ask(consent: Consent | None, **data: Any) -> list[str]:
        site = make_site(
            data={"source": "table", "path": "/server/all.csv", "domains": False, **data},
            clients={"partition": "natural"},
            backbone=IDENTITY,
        )
        host, lines = site.add("rome", table, consent=consent), site.told["rome"]
        load = host_module.load_private

        def noted(*arguments: Any) -> Any:
            lines.append("(read)")
            return load(*arguments)

        monkeypatch.setattr(host_module, "load_private", noted)
        backbone = open_backbone(site.scenario.backbone, site.scenario.seed)
        try:
            host.join({**make_terms(site.scenario, backbone), "key_name": "rome", "run": "r"})
        except SecurityRefusal as error:
            lines.append(error.what)
            error.add_note("\n".join(lines))
            raise
        return list(lines)

    return ask


def test_what_is_asked_for_is_told_before_it_is_read(join: Callable[..., list[str]]) -> None:
    lines = join(None, **COLUMNS)
    read = lines.index("(read)")
    said = "column 'ill' as the class, and besides columns 'age', 'chol, mg'; nothing else"
    assert said in lines[0]
    option = lines[1].partition("start with ")[2]
    assert read == 2
    typed = shlex.split(option)
    assert [typed[0], typed[2], len(typed)] == ["--label", "--columns", 4]
    lines = join(typed_consent(typed[1], typed[3]), **COLUMNS)
    assert lines.index("(read)") == 1
    assert said in lines[0]
    assert join(typed_consent(None, 'ill,age,"chol, mg"'), **COLUMNS)[2] == "(read)"


@pytest.mark.parametrize(
    ("label", "columns", "asked", "named"),
    [
        ("ill", 'age,"chol, mg"', {**COLUMNS, "label": "hiv"}, "column 'hiv' as the class"),
        ("ill", "age", COLUMNS, "column 'chol, mg'"),
        (None, 'age,"chol, mg"', COLUMNS, "column 'ill' as the class"),
        ("hiv", None, COLUMNS, "column 'ill' as the class"),
        # nobody names columns: all that the file has are features
        ("ill", 'age,"chol, mg"', {"label": "ill"}, "column 'hiv'"),
        # the class may be read as the class, and as nothing else
        (
            "ill",
            "age",
            {"label": "hiv", "numeric": ["age", "ill"]},
            "'hiv' as the class; column 'i",
        ),
    ],
)
def test_what_was_not_consented_to_is_not_read(
    join: Callable[..., list[str]],
    label: str | None,
    columns: str | None,
    asked: dict[str, Any],
    named: str,
) -> None:
    with pytest.raises(SecurityRefusal) as caught:
        join(typed_consent(label, columns), **asked)
    (notes,) = caught.value.__notes__
    assert "(read)" not in notes
    assert named in caught.value.line()
    for name in ("ill", "age", "chol", "hiv"):  # what travels
        assert f"'{name}" not in caught.value.what
    typed = shlex.split(caught.value.line().partition("starts the client with ")[2])
    join(typed_consent(typed[1], typed[3]), **asked)  # as it says, it is consented to


def test_every_source_says_what_it_reads(tmp_path: Path) -> None:
    def use(path: Path, data: Data) -> Use:
        return use_of(path, Data.model_validate(own_data(path, told_of(data))))

    path = tmp_path / "own.csv"
    path.write_text("review,stars,domain,secret\nfine,good,shop,31337\n")
    texts = use(path, Data(source="texts", text="review", label="stars"))
    assert texts == Use("stars", ("review", "domain"), tabular=True, chosen=True)
    path.write_text("a,b,y,split\n1,2,x,train\n")
    ready = use(path, Data(source="arrays"))
    assert ready == Use("y", ("a", "b", "split"), tabular=True, chosen=True)
    pattern = r"^\d_([a-z]+)_"
    sound = use(tmp_path, Data(source="sound", label_pattern=pattern))
    assert sound == Use(pattern, chosen=True)
    assert use(tmp_path, Data(source="sound")) == Use(FOLDERS, chosen=True)
    assert use(tmp_path, Data(source="folder")) == Use(FOLDERS)
    assert use(tmp_path / "x.npz", Data(source="table")) == Use(FOLDERS)
    digits = Consent(r"^(\d)_")
    with pytest.raises(SecurityRefusal, match="as classes what"):
        digits.hold(sound)
    with pytest.raises(SecurityRefusal, match="names of folders"):
        digits.hold(Use(FOLDERS, chosen=True))
    assert len(Consent(pattern).hold(sound)) == 1
    assert len(Consent().hold(sound)) == 2
    assert Consent().hold(Use(FOLDERS)) == []


def test_consent_to_what_is_not_there_is_an_error_at_once(table: Path) -> None:
    assert "column 'age'; else" in typed_consent("ill", "age").check(table)
    with pytest.raises(InputError, match=r"--columns: no such column.*Did you mean 'age'"):
        typed_consent("ill", '"chol, mg",Age').check(table)
    with pytest.raises(InputError, match="--label: no such column"):
        typed_consent("sick", None).check(table)
    with pytest.raises(InputError, match="have no columns"):
        typed_consent(None, "age").check(table.parent)
    with pytest.raises(InputError, match="its y"):
        typed_consent("ill", None).check(table.parent / "a.npz")
    with pytest.raises(InputError, match="names no column"):
        typed_consent(None, " ,")
    assert Consent().check(table.parent) == ""


def test_the_first_look_at_a_consented_table_is_at_its_header(table: Path) -> None:
    table.write_text(table.read_text().replace("ill", "label", 1))
    assert first_look(table)[1] == {"0": 10, "1": 10}
    found = first_look(table, Consent("hiv"))
    assert found == ("a table of 4 columns; the scenario says which is what", {})

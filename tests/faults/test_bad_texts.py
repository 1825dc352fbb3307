"""Bad texts and bad text models through the command line: one line that says what, no traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fedtl.cli import run_command
from tests.text_models import tiny_model

SCENARIO = """name = "texts"
seed = 1
rounds = 2
[data]
source = "texts"
path = "t.csv"
[clients]
num = 2
[backbone]
name = "hf"
weights = "model"
max_tokens = 8
[training]
local_epochs = 1
[evaluation]
references = ["start"]
"""
SECRET = "zaphod"
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("texts") / "model")


@pytest.fixture
def run(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    """Runs the scenario on some rows; exit code and all that was said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "s.toml").write_text(SCENARIO)

    def go(*rows: str, header: str = "text,label", sets: tuple[str, ...] = ()) -> tuple[int, str]:
        good = [f"good film {i} {SECRET},{'ab'[i % 2]}" for i in range(40)]
        (tmp_path / "t.csv").write_text("\n".join([header, *good, *rows]) + "\n")
        code = run_command(["run", "s.toml", "--out", "out", *(x for s in sets for x in ("-s", s))])
        said = capsys.readouterr()
        text = " ".join((said.out + said.err).split())
        assert "Traceback" not in text
        assert SECRET not in text
        return code, text

    return go


def test_good_texts_run_with_long_and_strange_ones(run: Run) -> None:
    code, said = run(
        "good " * 20_000 + ",a", "\u200b\u00e9\U0001f600,b", "!!!,a", sets=("data.leakage=allow",)
    )
    assert code == 0, said
    assert "texts: 43 texts" in said
    assert "before any training" in said


@pytest.mark.parametrize(
    ("rows", "header", "sets", "what"),
    [
        ((",a",), "text,label", (), "column 'text': no value in 1 row: 42"),
        (('"  ",a',), "text,label", (), "column 'text': no value in 1 row: 42"),
        (("x" * 1_000_001 + ",a",), "text,label", (), "more than 1,000,000 characters"),
        (("bad film,",), "text,label", (), "column 'label': no value in 1 row: 42"),
        ((), "texts,label", (), "column 'text' is missing; is it 'texts'?"),
        ((), "text,label", ("backbone.name=efficientnet_lite0",), "is texts"),
        ((), "text,label", ("data.source=digits",), "reads texts"),
        ((), "text,label", ("backbone.weights=nowhere/at-all",), "could not be downloaded"),
        (
            (),
            "text,label",
            ("transfer.mode=last_blocks", "transfer.cut=encoder.layr.1"),
            "encoder.layer.1",
        ),
        ((), "text,label", ("head.initial=names", 'head.names=["good"]'), "as many names"),
        ((), "text,label", ("shift.kinds=['blur']",), "these data are texts"),
    ],
)
def test_what_is_refused(
    run: Run,
    rows: tuple[str, ...],
    header: str,
    sets: tuple[str, ...],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    code, said = run(*rows, header=header, sets=sets)
    assert code in (2, 3), said
    assert what in said, said

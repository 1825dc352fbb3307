"""Runs that cannot be exported, told in a line each; nothing is left behind."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

Fedtl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(fedtl: Fedtl, small: Path, tmp_path: Path) -> Path:
    done = fedtl("run", str(small), "--out", "run")
    assert done.returncode == 0, done.stderr
    return tmp_path / "run"


def refused(done: subprocess.CompletedProcess[str], says: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_no_run_and_no_format(fedtl: Fedtl, tmp_path: Path) -> None:
    refused(fedtl("export", "nowhere"), "there is no such run")
    (tmp_path / "empty").mkdir()
    refused(fedtl("export", "empty"), "not a run folder")
    refused(fedtl("export", "empty", "--to", "tflite"), "'onnx', 'safetensors', 'torch'")
    refused(fedtl("export", "empty", "--quantize", "int4"), "int8")


def test_what_does_not_go_together(fedtl: Fedtl, run: Path) -> None:
    refused(fedtl("export", "run", "--to", "torch", "--quantize", "int8"), "only an ONNX file")
    refused(fedtl("export", "run", "--out", "model.bin"), "ends with .onnx")
    refused(fedtl("export", "run", "--out", "no/such/model.onnx"), "no such folder")
    assert not (run / "export").exists()


def test_a_run_that_is_not_finished(fedtl: Fedtl, run: Path) -> None:
    (run / "summary.json").unlink()
    refused(fedtl("export", "run"), "fedtl resume run")


def test_a_head_that_is_not_the_runs(fedtl: Fedtl, run: Path) -> None:
    path = run / "head.safetensors"
    head = load_file(path)
    save_file({**head, "bias": head["bias"] + 1}, path)
    refused(fedtl("export", "run"), "not the head that the run ended with")
    path.write_bytes(path.read_bytes()[:100])
    refused(fedtl("export", "run"), "missing or damaged")


def test_clients_with_models_of_their_own(fedtl: Fedtl, small: Path) -> None:
    made = fedtl(
        "run", str(small), "--out", "own", "--set", "head.kind=mlp", "--set",
        "strategy.name=fedper",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    refused(fedtl("export", "own"), "keeps layers of its own")
    made = fedtl("run", str(small), "--out", "map", "--set", "adaptation.features=standardise")
    assert made.returncode == 0, made.stderr
    refused(fedtl("export", "map"), "a map of its own")


def test_other_data_are_not_taken_for_the_runs(fedtl: Fedtl, run: Path, small: Path) -> None:
    """Where the tests are others, the file is held to made-up rows, and that is said."""
    content = dict(np.load(small.with_name("small.npz")))
    np.savez(small.with_name("small.npz"), x=content["x"] + 1, y=content["y"])
    done = fedtl("export", "run")
    assert done.returncode == 0, done.stderr
    assert "made-up inputs" in done.stdout
    assert "no more those that the run was made with" in done.stdout


def test_a_file_that_answers_otherwise_is_not_kept(
    fedtl: Fedtl, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtl.export import build

    true = build.torch_model

    def other(model):
        found = true(model)
        found.behind.head_bias += np.float32(0.01) * np.arange(len(model.labels)).sum()
        found.behind.head_bias[0] += 0.01
        return found

    monkeypatch.setattr(build, "torch_model", other)
    refused(fedtl("export", "run"), "does not answer as the run does", code=4)
    assert not (run / "export").exists()


def test_names_stay_names_in_the_card(fedtl: Fedtl, tmp_path: Path, small: Path) -> None:
    content = dict(np.load(small.with_name("small.npz")))
    names = np.array(["<script>alert(1)</script>", "[a](http://x.example) | *b*", "日本\u202e"])
    np.savez(
        small.with_name("small.npz"), **content, classes=names,
        client=np.array(["# big", "www.x.example", "- [ ] c"])[np.arange(200) % 3],
    )  # fmt: skip
    text = small.read_text().replace("num = 5\nfraction = 0.6", 'partition = "natural"')
    small.write_text(text)
    made = fedtl("run", str(small), "--out", "named")
    assert made.returncode == 0, made.stderr
    assert fedtl("export", "named").returncode == 0
    card = next((tmp_path / "named/export").glob("*.md")).read_text()
    assert "<script>" not in card
    assert not re.search(r"(?<!\\)\]\(", card)
    assert "http://" not in card
    assert "www.x" not in card
    assert "\u202e" not in card
    assert r"\[a\](http\://x.example) \| \*b\*" in card

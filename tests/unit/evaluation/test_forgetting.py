"""Forgetting of the source task: nothing where nothing changed, all where it is gone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from fedtl.build import OpenedData, open_data
from fedtl.errors import InputError
from fedtl.evaluation.forgetting import Source
from fedtl.scenario.schema import Scenario
from fedtl.transfer.tails import first_head
from fedtl.types import TAIL, Head


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source task is to tell 0 to 4 apart, the federation's 5 to 9."""
    folder, found = tmp_path_factory.mktemp("digits"), load_digits()
    pixels = (found.images * 15.9).astype(np.uint8)
    for name, part in (("source", found.target < 5), ("target", found.target >= 5)):
        keep = np.flatnonzero(part)[:200]
        np.savez(folder / f"{name}.npz", x=pixels[keep], y=found.target[keep])
    return folder


def content(digits: Path, mode: str) -> dict[str, Any]:
    return {
        "name": "forgets",
        "rounds": 1,
        "data": {"source": "arrays", "path": str(digits / "target.npz")},
        "clients": {"num": 2},
        "backbone": {"name": "squeezenet1_1", "weights": "none", "image_size": 32},
        "transfer": {"mode": mode},
        "training": {"local_epochs": 1, "learning_rate": 0.05},
        "evaluation": {"references": [], "source_path": str(digits / "source.npz")},
        "engine": {"device": "cpu", "threads": 1},
    }


def opened_of(digits: Path, mode: str) -> tuple[OpenedData, Source, Head]:
    opened = open_data(Scenario.model_validate(content(digits, mode)))
    source = Source(opened.scenario, opened.backbone, opened.tail, 1, lambda: None)
    return opened, source, first_head(opened.scenario, opened.tail, opened.backbone.dim, 5)


@pytest.fixture(scope="module")
def cut(digits: Path) -> tuple[Source, Head]:
    _, source, first = opened_of(digits, "last_blocks")
    return source, first


def test_a_frozen_network_forgets_nothing_by_construction(digits: Path) -> None:
    _, source, first = opened_of(digits, "head")
    found = source.forgotten(first, {name: tensor + 1 for name, tensor in first.items()})
    assert found["by_construction"]
    assert (found["forgotten"], found["lost"]) == (0.0, 0.0)
    assert (found["fitted"], found["judged"], found["classes"]) == (100, 100, 5)
    assert 0.5 < found["before"] <= 1  # a fifth is guessing


def test_a_network_that_did_not_move_forgets_exactly_nothing(cut: tuple[Source, Head]) -> None:
    source, first = cut
    found = source.forgotten(first, {**first, "weight": first["weight"] + 1})
    assert not found["by_construction"]
    assert found["before"] == found["after"] == found["after_refitted"]


def test_a_turned_feature_space_is_forgotten_but_not_lost(cut: tuple[Source, Head]) -> None:
    source, first = cut
    turned = [name for name in first if name.startswith(TAIL) and ".expand" in name]
    assert len(turned) == 4  # weight and bias of the two halves of the features
    last = {**first, **{name: first[name][::-1].copy() for name in turned}}
    found = source.forgotten(first, last)
    assert found["forgotten"] > 0.2
    assert abs(found["lost"]) < 0.05
    assert found["forgotten"] == found["before"] - found["after"]


def test_a_dead_network_has_lost_all(cut: tuple[Source, Head]) -> None:
    source, first = cut
    last = {name: np.zeros_like(t) if name.startswith(TAIL) else t for name, t in first.items()}
    found = source.forgotten(first, last)
    assert found["after_refitted"] == pytest.approx(0.2, abs=0.1)
    assert found["lost"] > 0.3


def test_a_run_writes_it_down(fedtl: Callable[..., Any], tmp_path: Path, digits: Path) -> None:
    import fedtl as door

    run = door.run(content(digits, "last_blocks"), out=tmp_path / "out")
    told = json.loads((run.path / "summary.json").read_text())["forgetting"]
    assert told["source"] == "source.npz"
    assert 0 <= told["after"] <= told["before"] + 0.1


def test_what_is_wrong_with_the_source_is_told_before_the_rounds(digits: Path) -> None:
    asked = content(digits, "last_blocks")
    asked["evaluation"]["source_path"] = str(digits / "nowhere.npz")
    with pytest.raises(InputError, match=r"nowhere\.npz"):
        open_data(Scenario.model_validate(asked))
    np.savez(digits / "rows.npz", x=np.zeros((4, 3), np.float32), y=[0, 0, 1, 1])
    asked["evaluation"]["source_path"] = str(digits / "rows.npz")
    with pytest.raises(InputError, match="not images"):
        open_data(Scenario.model_validate(asked))


def test_the_probe_is_judged_on_other_pictures_than_it_was_fitted_on(
    cut: tuple[Source, Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, first = cut
    rows: list[tuple[Any, Any]] = []
    import fedtl.evaluation.forgetting as module

    fit = module.fit_ridge
    monkeypatch.setattr(
        module,
        "fit_ridge",
        lambda population, *rest: (
            rows.append((population.train.index, population.test.index)) or fit(population, *rest)
        ),
    )
    replace(source, tail=source.tail).forgotten(first, first)
    for train, test in rows:
        assert not np.intersect1d(train, test).size
        assert len(train) + len(test) == 200

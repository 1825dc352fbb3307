"""A head of the classes' names: an example goes to the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.errors import InputError
from fedtl.scenario import schema
from fedtl.scenario.load import validate
from fedtl.transfer.backbones import open_backbone
from fedtl.transfer.features import FeatureStore
from fedtl.transfer.heads import initial_head
from fedtl.transfer.text_features import embed
from fedtl.transfer.zero_shot import SCALE, with_names
from fedtl.types import Head
from tests.text_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("bert", tmp_path_factory.mktemp("model") / "bert")


def started(folder: Path, **head: Any) -> Head:
    raw = {
        "name": "t",
        "data": {"source": "texts", "path": "t.csv"},
        "backbone": {"name": "hf", "weights": str(folder)},
        "head": {"initial": "names", "prompt": "the {}", **head},
    }
    scenario = validate(raw, "t", {})
    backbone = open_backbone(scenario.backbone, 0)
    first = initial_head(scenario.head, 8, 2, 0)
    return with_names(first, scenario, backbone, ("bad", "good"), "torch")


def rows(folder: Path, *texts: str) -> np.ndarray[Any, Any]:
    backbone = open_backbone(schema.Backbone(name="hf", weights=str(folder)), 0)
    found = embed(FeatureStore(), backbone, texts, "torch")
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def test_rows_are_the_names_in_the_prompt(folder: Path) -> None:
    head = started(folder)
    np.testing.assert_allclose(head["weight"], SCALE * rows(folder, "the bad", "the good"), 1e-6)
    assert not head["bias"].any()
    other = started(folder, names=["not good", "film"])
    np.testing.assert_allclose(
        other["weight"], SCALE * rows(folder, "the not good", "the film"), 1e-6
    )
    twice = started(folder, prompt="the {} {}")  # a prompt is no format
    wanted = rows(folder, "the bad bad", "the good good")
    np.testing.assert_allclose(twice["weight"], SCALE * wanted, 1e-6)
    cosine = started(folder, kind="cosine")
    np.testing.assert_allclose(cosine["weight"], rows(folder, "the bad", "the good"), 1e-6)


def test_a_name_itself_goes_to_its_class(folder: Path) -> None:
    head, examples = started(folder), rows(folder, "the bad", "the good")
    assert (examples @ head["weight"].T).argmax(axis=1).tolist() == [0, 1]


def test_any_other_start_is_left_alone(folder: Path) -> None:
    head = started(folder, initial="zeros")
    assert not head["weight"].any()


def test_names_that_will_not_do(folder: Path) -> None:
    with pytest.raises(InputError, match="not as many names as classes"):
        started(folder, names=["good"])
    with pytest.raises(InputError, match="cannot tell apart"):
        started(folder, names=["xyz", "abc"])  # both unknown words to this tokenizer

"""The table of sources."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedtl.data.sources import SOURCES, load_examples
from fedtl.errors import InputError
from fedtl.scenario.schema import Data


def test_the_table_has_every_name_of_the_schema() -> None:
    assert set(SOURCES) == set(Data.model_fields["source"].annotation.__args__)


def test_each_source_is_reached(tmp_path: Path, make_tree: Callable[..., Path]) -> None:
    assert len(load_examples(Data())) == 6797
    tree = make_tree(["cat/1.png", "dog/1.png"])
    assert len(load_examples(Data(source="folder", path=str(tree)))) == 2
    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros((3, 2), np.float32), y=np.arange(3))
    assert len(load_examples(Data(source="arrays", path=str(path)))) == 3
    with pytest.raises(InputError, match="torchvision data set"):
        load_examples(Data(source="torchvision", name="nothing", path=str(tmp_path)))


def test_an_unknown_source() -> None:
    with pytest.raises(InputError, match="Did you mean 'folder'"):
        load_examples(Data.model_construct(source="folders"))

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedtl.engines import hosting
from fedtl.errors import EnvironmentFault
from fedtl.types import Population


@pytest.fixture
def stored(population: Population, tmp_path: Path) -> Population:
    """The federation with its features in a file, as the feature store has them."""
    path = tmp_path / "store.npy"
    np.save(path, population.features)
    return replace(population, features=np.load(path, mmap_mode="r"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "hosted"
    path.mkdir()
    return path


def assert_same(found: Population, population: Population) -> None:
    for name in ("features", "labels"):
        mine, theirs = getattr(found, name), getattr(population, name)
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(mine, theirs)
    for split in ("train", "test"):
        mine, theirs = getattr(found, split), getattr(population, split)
        np.testing.assert_array_equal(mine.index, theirs.index)
        np.testing.assert_array_equal(mine.offsets, theirs.offsets)
    for name in ("classes", "names", "domains"):
        assert getattr(found, name) == getattr(population, name)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_opened_is_what_was_saved(population, folder: Path, dtype: str) -> None:
    odd = ("ä", "b\\", 'c"', "d\n", "e\udce9")  # names come from folders, whatever bytes they have
    given = replace(population, features=population.features.astype(dtype), names=odd)
    hosting.save_population(given, folder)
    assert_same(hosting.open_population(folder), given)


def test_a_stored_matrix_is_mapped_where_it_is(stored, folder: Path) -> None:
    hosting.save_population(stored, folder)
    assert not (folder / hosting.FEATURES).exists()
    found = hosting.open_population(folder)
    assert Path(found.features.filename) == stored.features.filename
    assert_same(found, stored)


@pytest.mark.parametrize(
    "part",
    [
        lambda m: m[1:],
        lambda m: m[::-1],
        lambda m: m[:, ::2],
        lambda m: m[np.arange(len(m))[::-1]],
        lambda m: m * 2,
        lambda m: m.view(np.int32),
    ],
    ids=["rows", "backwards", "columns", "shuffled", "changed", "other dtype"],
)
def test_what_is_not_the_whole_file_is_copied(stored, folder: Path, part) -> None:
    given = replace(stored, features=part(stored.features))
    hosting.save_population(given, folder)
    assert (folder / hosting.FEATURES).exists()
    assert_same(hosting.open_population(folder), given)


def test_changes_that_are_only_in_memory_are_not_lost(stored, folder: Path) -> None:
    features = np.load(stored.features.filename, mmap_mode="c")
    features[0] = 9
    given = replace(stored, features=features)
    hosting.save_population(given, folder)
    assert_same(hosting.open_population(folder), given)


def test_it_is_opened_once_and_cannot_be_written(population, folder: Path) -> None:
    hosting.save_population(population, folder)
    found = hosting.open_population(folder)
    assert hosting.open_population(folder) is found
    for array in (found.features, found.labels, found.train.index, found.test.offsets):
        assert not array.flags.writeable


def test_no_pickle(population, folder: Path) -> None:
    hosting.save_population(population, folder)
    np.save(folder / "labels.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(EnvironmentFault, match="damaged"):
        hosting.open_population(folder)


@pytest.mark.parametrize("lost", [*(f"{name}.npy" for name in hosting.ARRAYS), hosting.FACTS])
def test_a_lost_file_is_the_machines_fault(population, folder: Path, lost: str) -> None:
    hosting.save_population(population, folder)
    (folder / lost).unlink()
    with pytest.raises(EnvironmentFault, match="gone or damaged"):
        hosting.open_population(folder)


def test_a_folder_that_cannot_be_written_is_named(population, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="nowhere"):
        hosting.save_population(population, tmp_path / "nowhere")

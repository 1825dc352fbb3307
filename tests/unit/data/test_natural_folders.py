"""Folders whose paths name clients, and whose classes share names."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtl.data.folder import load_folder
from fedtl.data.partitions import assign_clients
from fedtl.errors import InputError
from fedtl.scenario.schema import Clients, Data

PATHS = [
    f"{alphabet}/character{c:02d}/{number}{c:02d}_{drawer:02d}.png"
    for number, alphabet in enumerate(("Greek", "Latin"))
    for c in (1, 2, 3)
    for drawer in (1, 2, 3, 4)
]
DRAWER = r"_(\d+)\.png$"


def data(path: Path, **options: Any) -> Data:
    return Data(source="folder", path=str(path), domains=True, **options)


def test_drawers_are_clients(make_tree: Callable[..., Path]) -> None:
    tree = make_tree(PATHS)
    examples = load_folder(data(tree, client_pattern=DRAWER, classes="path"))
    assert examples.client_names == ("01", "02", "03", "04")
    found = assign_clients(examples, Clients(partition="natural"), 0)
    assert found.names == ("01", "02", "03", "04")
    assert set(found.domains) == {"mixed"}
    for name, row in zip(sorted(PATHS), found.client.tolist(), strict=True):
        assert name.endswith(f"_{found.names[row]}.png")


def test_several_groups_are_joined(make_tree: Callable[..., Path]) -> None:
    pattern = r"^([^/]+)/.*_(\d+)\.png$"
    examples = load_folder(data(make_tree(PATHS), client_pattern=pattern))
    found = assign_clients(examples, Clients(partition="natural"), 0)
    assert found.names[:2] == ("Greek-01", "Greek-02")
    assert found.domains == ("Greek",) * 4 + ("Latin",) * 4


def test_classes_of_one_name_in_two_domains(make_tree: Callable[..., Path]) -> None:
    tree = make_tree(PATHS)
    assert load_folder(data(tree)).classes == ("character01", "character02", "character03")
    apart = load_folder(data(tree, classes="path"))
    assert apart.classes[::3] == ("Greek/character01", "Latin/character01")
    assert len(apart.classes) == 6
    assert apart.fingerprint != load_folder(data(tree)).fingerprint


def test_a_pattern_changes_the_run_and_not_the_features(make_tree: Callable[..., Path]) -> None:
    tree = make_tree(PATHS)
    plain, drawers = load_folder(data(tree)), load_folder(data(tree, client_pattern=DRAWER))
    other = load_folder(data(tree, client_pattern=r"(\d)\.png$"))
    assert plain.fingerprint == drawers.fingerprint == other.fingerprint
    assert len({plain.identity, drawers.identity, other.identity}) == 3


@pytest.mark.parametrize("pattern", [r"Greek.*_(\d+)", r"_(x?)\d", r"nowhere(.)"])
def test_paths_without_a_client_are_counted_and_named(
    make_tree: Callable[..., Path], pattern: str
) -> None:
    with pytest.raises(InputError, match=r"of 24 paths.*/character0") as caught:
        load_folder(data(make_tree(PATHS), client_pattern=pattern))
    assert f"in {12 if 'Greek' in pattern else 24} of" in caught.value.line()


@pytest.mark.parametrize("top", ["", "images/"])
def test_an_archive_of_the_folder_itself(
    tmp_path: Path, png: Callable[[int], bytes], top: str
) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(PATHS):
            archive.writestr(top + name, png(i))
        archive.writestr(f"{top}README.txt", "drawn by hand")
        if top:
            archive.writestr("__MACOSX/Greek/._x.png", b"")
    examples = load_folder(data(path, client_pattern=DRAWER))
    assert examples.domain_names == ("Greek", "Latin")
    assert examples.client_names == ("01", "02", "03", "04")
    assert examples.images.where(0) == PATHS[0]
    assert examples.images.load(0).shape == (3, 4, 3)
    assert examples.notes == ("1 files without a known image extension were passed over",)


def test_omniglots_drawers(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("omniglot/images_background_small1.zip")
    examples = load_folder(data(path, client_pattern=DRAWER, classes="path"))
    assert len(examples) == 2720
    assert len(examples.classes) == 136
    assert len(examples.client_names) == 20
    assert examples.domain_names == ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")

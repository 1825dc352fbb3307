"""Folders and archives of images: good layouts, and every bad one by name."""

import os
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.data import files
from fedtl.data.examples import BadImage, Examples
from fedtl.data.folder import clashes, load_folder, typos
from fedtl.errors import InputError, SecurityRefusal
from fedtl.scenario.schema import Data

PACS = Path(__file__).parents[3].parent / "shared" / "data" / "pacs" / "pacs96_full.zip"
PLAIN = ["cat/b.png", "cat/a.JPG", "dog/1.png"]
DOMAINS = ["art/cat/1.png", "art/dog/1.png", "photo/cat/1.png", "photo/dog/1.png"]


def load(path: Path, **options: Any) -> Examples:
    return load_folder(Data(source="folder", path=str(path), **options))


def message(path: Path, kind: Any = InputError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load(path, **options)
    assert caught.value.exit_code == (2 if kind is InputError else 5)
    return caught.value.line()


def zip_of(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return target


def test_class_folders(make_tree: Callable[..., Path]) -> None:
    examples = load(make_tree(PLAIN))
    assert examples.classes == ("cat", "dog")
    assert examples.labels.tolist() == [0, 0, 1]
    assert [examples.where(i) for i in range(3)] == ["cat/a.JPG", "cat/b.png", "dog/1.png"]
    assert examples.domains is None
    assert examples.images.load(0)[0, 0].tolist() == [1, 0, 7]
    assert examples.images.load(1)[0, 0].tolist() == [0, 0, 7]
    assert examples.notes == ()


def test_domain_folders_and_label_skew(make_tree: Callable[..., Path]) -> None:
    examples = load(make_tree([*DOMAINS, "sketch/horse/1.png"]), domains=True)
    assert examples.classes == ("cat", "dog", "horse")
    assert examples.domain_names == ("art", "photo", "sketch")
    assert examples.labels.tolist() == [0, 1, 0, 1, 2]
    assert examples.domains.tolist() == [0, 0, 1, 1, 2]


def test_hidden_files_are_passed_over_and_others_counted(make_tree: Callable[..., Path]) -> None:
    hidden = [".git/x.png", "cat/.hidden.png", ".DS_Store", "__MACOSX/cat/a.png"]
    examples = load(make_tree([*PLAIN, *hidden, "cat/notes.txt", "readme"]))
    assert len(examples) == 3
    assert examples.notes == ("2 files without a known image extension were passed over",)


def test_a_zip_gives_the_same_examples_and_fingerprint(
    make_tree: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_tree(DOMAINS)
    archive = zip_of(folder, tmp_path / "data.zip")
    one, other = load(folder, domains=True), load(archive, domains=True)
    assert one.fingerprint == other.fingerprint
    assert one.labels.tolist() == other.labels.tolist()
    for i in range(len(one)):
        assert one.where(i) == other.where(i)
        assert (one.images.load(i) == other.images.load(i)).all()


def test_fingerprint_sees_bytes_names_and_meaning(
    make_tree: Callable[..., Path], png: Callable[[int], bytes]
) -> None:
    folder = make_tree(DOMAINS)
    prints = [load(folder, domains=True).fingerprint]
    os.rename(folder / "art/cat/1.png", folder / "art/cat/2.png")
    prints.append(load(folder, domains=True).fingerprint)
    (folder / "art/cat/2.png").write_bytes(png(99))
    prints.append(load(folder, domains=True).fingerprint)
    os.rename(folder / "art", folder / "paint")
    prints.append(load(folder, domains=True).fingerprint)
    assert len(set(prints)) == 4
    assert load(folder, domains=True).fingerprint == prints[-1]


def test_missing_file_and_empty(tmp_path: Path, make_tree: Callable[..., Path]) -> None:
    assert "no such folder" in message(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    assert "neither a folder nor a .zip" in message(tmp_path / "file")
    assert "no image in it" in message(make_tree([], "empty"))
    assert "no image in it" in message(make_tree(["a/x.txt", "b/y.txt"], "texts"))
    with pytest.raises(InputError, match=r"data\.path"):
        load_folder(Data(source="folder"))


def test_all_problems_at_once(make_tree: Callable[..., Path]) -> None:
    text = message(make_tree(["cat/1.png", "Cat/1.png", "dog/", "loose.png", "cat/deep/1.png"]))
    assert "3 problems" in text
    assert "folders without an image: dog" in text
    assert "2 images do not lie as <class>/<image>: cat/deep/1.png, loose.png" in text
    assert "differ only in case" in text
    assert "'Cat' / 'cat'" in text


def test_empty_class_and_domain_folders(make_tree: Callable[..., Path]) -> None:
    tree = make_tree([*DOMAINS, "photo/horse/", "sketch/"])
    assert "folders without an image: photo/horse, sketch" in message(tree, domains=True)


def test_layout_of_the_other_kind(make_tree: Callable[..., Path]) -> None:
    assert "--set data.domains=true" in message(make_tree(DOMAINS, "d"))
    assert "--set data.domains=false" in message(make_tree(PLAIN, "p"), domains=True)
    deep = message(make_tree([f"x/y/{path}" for path in PLAIN], "deep"))
    assert "x/y/cat/a.JPG" in deep
    assert "--set" not in deep


def test_one_class_is_not_enough(make_tree: Callable[..., Path]) -> None:
    assert "only one class (cat)" in message(make_tree(["cat/1.png", "cat/2.png"]))


def test_accents_encoded_in_two_ways(make_tree: Callable[..., Path]) -> None:
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    assert len(clashes("class", names)) == 1
    tree = make_tree([f"art/{names[0]}/1.png", "art/tea/1.png", f"photo/{names[1]}/1.png"])
    text = message(tree, domains=True)
    assert "accent encoding" in text
    assert "\\xe9" in text
    assert "e\\u0301" in text


def test_typos_between_domains(make_tree: Callable[..., Path]) -> None:
    tree = make_tree(["a/guitar/1.png", "a/dog/1.png", "b/guitarr/1.png", "b/dog/1.png"])
    text = message(tree, domains=True)
    assert "'guitarr' is only in b and 'guitar' only in a: did you mean 'guitar'?" in text
    assert len(typos({"guitar": {"a"}, "giutar": {"b"}})) == 1
    assert len(typos({"guitar": {"a"}, "gujtar": {"b"}})) == 1
    assert len(typos({"guitar": {"a"}, "gitar": {"b"}})) == 1
    assert typos({"horse": {"a"}, "house": {"b"}}) == []
    assert typos({"male": {"a"}, "female": {"b"}}) == []
    assert typos({"class_01": {"a"}, "class_02": {"b"}}) == []
    assert typos({"guitar": {"a", "b"}, "guitars": {"a"}}) == []


def test_links_may_not_leave_the_folder(make_tree: Callable[..., Path], tmp_path: Path) -> None:
    tree = make_tree(PLAIN)
    outside = make_tree(["x.png"], "outside")
    (tree / "cat" / "inner.png").symlink_to(tree / "dog" / "1.png")
    assert len(load(tree)) == 4
    (tree / "cat" / "out.png").symlink_to(outside / "x.png")
    assert "cat/out.png" in message(tree, SecurityRefusal)
    (tree / "cat" / "out.png").unlink()
    (tree / "horse").symlink_to(outside)
    assert "horse" in message(tree, SecurityRefusal)
    (tree / "horse").unlink()
    (tmp_path / "alias").symlink_to(tree)
    assert len(load(tmp_path / "alias")) == 4


def test_a_link_to_a_folder_above_ends(make_tree: Callable[..., Path]) -> None:
    tree = make_tree(PLAIN)
    (tree / "dog" / "again").symlink_to(tree)
    assert "do not lie as" in message(tree)


def test_unreadable_files(make_tree: Callable[..., Path]) -> None:
    tree = make_tree(PLAIN)
    os.mkfifo(tree / "dog" / "pipe.png")
    (tree / "dog" / "gone.png").symlink_to(tree / "dog" / "nothing.png")
    text = message(tree)
    assert "2 problems" in text
    assert "dog/pipe.png: cannot be read: not a regular file" in text
    assert "dog/gone.png: cannot be read: No such file" in text
    assert "on_bad_file=skip" in text
    examples = load(tree, on_bad_file="skip")
    assert len(examples) == 3
    assert examples.notes == ("2 unreadable files were skipped",)
    assert examples.fingerprint != load(make_tree(["cat/1.png", "dog/1.png"], "o")).fingerprint


def test_a_file_that_vanishes_or_cannot_be_decoded(make_tree: Callable[..., Path]) -> None:
    tree = make_tree(PLAIN)
    (tree / "cat" / "a.JPG").write_bytes(b"nonsense")
    examples = load(tree)
    with pytest.raises(BadImage, match=r"cat/a\.JPG: cannot be decoded"):
        examples.images.load(0)
    (tree / "cat" / "b.png").unlink()
    with pytest.raises(BadImage, match=r"cat/b\.png: cannot be read"):
        examples.images.load(1)
    with pytest.raises(BadImage, match="max_pixels = 5"):
        load(tree, max_pixels=5).images.load(1)


def test_a_huge_file_is_not_read(
    make_tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_tree(PLAIN)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
    assert "larger than 10 bytes" in message(tree)
    archive = zip_of(tree, tree.parent / "x.zip")
    assert "claim more than 10 bytes" in message(archive, SecurityRefusal)


@pytest.mark.parametrize(
    "name", ["../x.png", "/abs/x.png", "a/../../x.png", "C:\\x.png", "a\\..\\x"]
)
def test_unsafe_members_are_refused(tmp_path: Path, png: Callable[[int], bytes], name: str) -> None:
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.png", png(0))
        archive.writestr(zipfile.ZipInfo(name), png(1))
    assert "leads out of the archive" in message(path, SecurityRefusal)


def test_damaged_archives(tmp_path: Path, png: Callable[[int], bytes]) -> None:
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.png", png(0))
        archive.writestr("dog/1.png", png(1))
    good = path.read_bytes()
    flip = good.index(b"IDAT") + 6
    path.write_bytes(good[:flip] + bytes([good[flip] ^ 1]) + good[flip + 1 :])
    assert "cat/1.png: cannot be read: damaged member" in message(path)
    assert len(load(path, on_bad_file="skip")) == 1
    path.write_bytes(good[: len(good) // 2])
    assert "neither a folder nor a .zip" in message(path)
    encrypted = bytearray(good)
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        encrypted[encrypted.index(signature) + place] |= 1
    path.write_bytes(bytes(encrypted))
    assert "encrypted" in message(path)


def test_two_members_with_one_path(tmp_path: Path, png: Callable[[int], bytes]) -> None:
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.png", png(0))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("cat/1.png", png(1))
    assert "same path" in message(path)


@pytest.mark.skipif(not PACS.is_file(), reason="the PACS archive is not on this machine")
def test_pacs() -> None:
    examples = load(PACS, domains=True)
    assert len(examples) == 9991
    assert dict(zip(examples.domain_names, np.bincount(examples.domains), strict=True)) == {
        "art_painting": 2048,
        "cartoon": 2344,
        "photo": 1670,
        "sketch": 3929,
    }
    assert len(examples.classes) == 7
    assert len(set(zip(examples.labels.tolist(), examples.domains.tolist(), strict=True))) == 28
    assert examples.images.load(9990).shape == (96, 96, 3)

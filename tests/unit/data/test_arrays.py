"""The .npz source: what it takes, and everything it refuses."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.data import arrays
from fedtl.data.arrays import load_arrays
from fedtl.data.examples import Examples
from fedtl.errors import EnvironmentFault, InputError, SecurityRefusal
from fedtl.scenario.schema import Data

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3)).astype(np.uint8)
FEATURES = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
LABELS = np.array([0, 1, 2, 1])


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Examples]:
    def load(**columns: Any) -> Examples:
        options = {"max_pixels": columns.pop("max_pixels")} if "max_pixels" in columns else {}
        path = tmp_path / "data.npz"
        np.savez(path, **columns)
        return load_arrays(Data(source="arrays", path=str(path), **options))

    return load


@pytest.fixture
def message(load: Callable[..., Examples]) -> Callable[..., str]:
    def message(**columns: Any) -> str:
        with pytest.raises(InputError) as caught:
            load(**columns)
        assert caught.value.exit_code == 2
        return caught.value.line()

    return message


@pytest.mark.parametrize("x", [IMAGES, IMAGES[..., :1], IMAGES[..., 0]])
def test_images(load: Callable[..., Examples], x: Any) -> None:
    examples = load(x=x, y=LABELS)
    assert examples.features is None
    image = examples.images.load(2)
    assert image.shape == (5, 6, 3)
    assert (image[..., 0] == IMAGES[2, ..., 0]).all()
    assert examples.where(2) == "row 2"


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f8"])
def test_features_become_float32(load: Callable[..., Examples], dtype: str) -> None:
    examples = load(x=FEATURES.astype(dtype), y=LABELS)
    assert examples.images is None
    assert examples.features.dtype == np.float32
    assert (examples.features == FEATURES.astype(dtype).astype(np.float32)).all()


def test_all_columns(load: Callable[..., Examples]) -> None:
    examples = load(
        x=FEATURES,
        y=np.array(["dog", "cat", "dog", "eel"]),
        domain=np.array([10, 9, 10, 9]),
        client=np.array([b"z", b"a", b"a", b"a"]),
        split=np.array(["train", "test", "train", "test"]),
    )
    assert examples.classes == ("cat", "dog", "eel")
    assert examples.labels.tolist() == [1, 0, 1, 2]
    assert examples.domain_names == ("9", "10")
    assert examples.domains.tolist() == [1, 0, 1, 0]
    assert examples.client_names == ("a", "z")
    assert examples.clients.tolist() == [1, 0, 0, 0]
    assert examples.is_test.tolist() == [False, True, False, True]


@pytest.mark.parametrize("split", [[0, 1, 0, 1], [False, True, False, True]])
def test_split_as_numbers(load: Callable[..., Examples], split: Any) -> None:
    assert load(x=FEATURES, y=LABELS, split=np.array(split)).is_test.tolist() == [0, 1, 0, 1]


def test_labels_keep_numeric_order_and_may_be_negative(load: Callable[..., Examples]) -> None:
    examples = load(x=FEATURES, y=np.array([[10], [-1], [9], [10]]))
    assert examples.classes == ("-1", "9", "10")
    assert examples.labels.tolist() == [2, 0, 1, 2]
    assert examples.labels.dtype == np.int32


def test_class_names(load: Callable[..., Examples], message: Callable[..., str]) -> None:
    examples = load(x=FEATURES, y=LABELS, classes=np.array(["no", "yes", "never", "unused"]))
    assert examples.classes == ("no", "yes", "never", "unused")
    assert examples.labels.tolist() == LABELS.tolist()
    assert "classes has 2 names" in message(x=FEATURES, y=LABELS, classes=np.array(["a", "b"]))
    assert "twice" in message(x=FEATURES, y=LABELS, classes=np.array(["a", "b", "a"]))
    words = np.array(["a", "b", "a", "b"])
    assert "whole numbers" in message(x=FEATURES, y=words, classes=np.array(["a", "b"]))
    assert "y is -1 to 1" in message(x=FEATURES, y=LABELS - 1, classes=np.array(list("abc")))


def test_fingerprint_sees_every_column(load: Callable[..., Examples]) -> None:
    base = {"x": FEATURES, "y": LABELS}
    domain, split = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1])
    variants = [
        base,
        base | {"x": FEATURES + 1},
        base | {"y": LABELS[::-1].copy()},
        base | {"domain": domain},
        base | {"client": domain},
        base | {"split": split},
        base | {"classes": np.array(list("abc"))},
    ]
    prints = [load(**variant).fingerprint for variant in variants]
    assert len(set(prints)) == len(variants)
    assert load(**base).fingerprint == prints[0]


def test_wrong_x(message: Callable[..., str]) -> None:
    assert "missing" in message(y=LABELS)
    assert "astype('float32')" in message(x=IMAGES[:, 0, :, 0], y=LABELS)
    assert "astype('uint8')" in message(x=IMAGES / 255, y=LABELS)
    assert "transpose(0, 2, 3, 1)" in message(x=IMAGES.transpose(0, 3, 1, 2), y=LABELS)
    assert "uint8 images" in message(x=IMAGES[..., :2], y=LABELS)
    assert "uint8 images" in message(x=FEATURES.astype(complex), y=LABELS)
    assert "empty" in message(x=FEATURES[:0], y=LABELS[:0])
    assert "max_pixels = 29" in message(x=IMAGES, y=LABELS, max_pixels=29)


def test_nan_and_infinity_are_named_by_row(message: Callable[..., str]) -> None:
    bad = FEATURES.astype(np.float64)
    bad[1, 0], bad[3, 2] = np.nan, 1e300
    assert "in 2 rows: 1, 3" in message(x=bad, y=LABELS)


def test_wrong_columns_all_at_once(message: Callable[..., str]) -> None:
    text = message(
        x=IMAGES[:3],
        y=LABELS * 0.5,
        domain=np.array([[1, 2], [3, 4]]),
        split=np.array(["train", "valid", "test", "test"]),
    )
    assert "4 problems" in text
    assert "y is float64 [4]" in text
    assert "y.astype(int)" in text
    assert "domain is int64 [2, 2]" in text
    assert "split has 'valid'" in text
    assert "lengths differ: x 3, y 4, domain 2, split 4" in text


def test_splits_that_cannot_be_used(message: Callable[..., str]) -> None:
    assert "no test rows" in message(x=FEATURES, y=LABELS, split=np.zeros(4, int))
    assert "no train rows" in message(x=FEATURES, y=LABELS, split=np.ones(4, int))
    assert "split has 2" in message(x=FEATURES, y=LABELS, split=np.arange(4) % 3)


def test_one_class_and_scalars(message: Callable[..., str]) -> None:
    assert "only one class" in message(x=FEATURES, y=LABELS * 0)
    assert "lengths differ" in message(x=FEATURES, y=LABELS, domain=np.array(3))


def test_unknown_arrays_with_the_nearest_name(message: Callable[..., str]) -> None:
    text = message(x=FEATURES, y=LABELS, domains=LABELS, zzz=LABELS)
    assert "unexpected array 'domains'" in text
    assert "did you mean 'domain'?" in text
    assert "unexpected array 'zzz'" in text


def test_objects_are_a_security_refusal(load: Callable[..., Examples]) -> None:
    with pytest.raises(SecurityRefusal, match="pickle") as caught:
        load(x=FEATURES, y=np.array([1, "a", None, 2], dtype=object))
    assert caught.value.exit_code == 5


def npy(header: str, body: bytes) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


def write(path: Path, **members: Any) -> Data:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return Data(source="arrays", path=str(path))


def test_a_header_that_lies_is_refused_before_allocation(tmp_path: Path) -> None:
    lie = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 9)}", b"1234")
    y = io.BytesIO()
    np.save(y, LABELS)
    with pytest.raises(InputError) as caught:
        load_arrays(write(tmp_path / "lie.npz", x=lie, y=y.getvalue()))
    assert "claims 36000000000000 bytes and has 4" in caught.value.line()
    assert f"more than {arrays.MAX_BYTES}" in caught.value.line()


@pytest.mark.parametrize("header", ["{'descr': '|O'", "nonsense", "{'descr': '<f4', 'shape': 3}"])
def test_broken_headers(tmp_path: Path, header: str) -> None:
    with pytest.raises(InputError, match="damaged"):
        load_arrays(write(tmp_path / "x.npz", x=npy(header, b"1234"), y=b"12"))


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such \.npz"):
        load_arrays(Data(source="arrays", path=str(tmp_path / "absent.npz")))
    np.save(tmp_path / "x.npy", FEATURES)
    with pytest.raises(InputError, match=r"not an \.npz"):
        load_arrays(Data(source="arrays", path=str(tmp_path / "x.npy")))
    with pytest.raises(InputError, match=r"data\.path"):
        load_arrays(Data(source="arrays"))


def test_a_damaged_member(tmp_path: Path, load: Callable[..., Examples]) -> None:
    load(x=FEATURES, y=LABELS)
    path = tmp_path / "data.npz"
    good = path.read_bytes()
    flip = good.index(FEATURES.tobytes()[:8])
    path.write_bytes(good[:flip] + bytes([good[flip] ^ 1]) + good[flip + 1 :])
    with pytest.raises(InputError, match="damaged"):
        load_arrays(Data(source="arrays", path=str(path)))


def test_bytes_that_are_no_text_are_named_by_column(message: Callable[..., str]) -> None:
    assert "y has bytes that are no UTF-8 text" in message(x=FEATURES, y=[b"\xff", b"a"] * 2)


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(
    load: Callable[..., Examples], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtl.machine.available_memory_bytes", lambda: 50)
    with pytest.raises(EnvironmentFault, match="do not fit into memory"):
        load(x=FEATURES, y=LABELS)

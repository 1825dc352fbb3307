"""The classification sets of torchvision, by name."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedtl.data.examples import (
    BadImage,
    Examples,
    Pixels,
    array_digest,
    content_fingerprint,
)
from fedtl.data.folder import hash_files
from fedtl.data.images import decode_image, to_rgb
from fedtl.errors import EnvironmentFault, InputError, unknown_name, writing
from fedtl.scenario.schema import Data
from fedtl.types import Int32

DEFAULT_ROOT = "~/.cache/fedtl"
TIMEOUT_SECONDS = 10.0
"""Without an answer for so long, a download is given up."""

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)

Arguments = Mapping[str, Any]

BY_FLAG: tuple[Arguments, ...] = ({"train": True}, {"train": False})


def _by_split(train: str, test: str) -> tuple[Arguments, ...]:
    return {"split": train}, {"split": test}


TRAIN_TEST = _by_split("train", "test")
TRAIN_VAL = _by_split("train", "val")

SETS: Mapping[str, tuple[Arguments, ...]] = {
    "CIFAR10": BY_FLAG,
    "CIFAR100": BY_FLAG,
    "CLEVRClassification": TRAIN_VAL,
    "Caltech101": ({},),
    "Caltech256": ({},),
    "Country211": _by_split("train", "test"),
    "DTD": TRAIN_TEST,
    "EMNIST": ({"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    "EuroSAT": ({},),
    "FER2013": TRAIN_TEST,
    "FGVCAircraft": _by_split("trainval", "test"),
    "FashionMNIST": BY_FLAG,
    "Flowers102": TRAIN_TEST,
    "Food101": TRAIN_TEST,
    "GTSRB": TRAIN_TEST,
    "ImageNet": TRAIN_VAL,
    "Imagenette": TRAIN_VAL,
    "KMNIST": BY_FLAG,
    "MNIST": BY_FLAG,
    "OxfordIIITPet": _by_split("trainval", "test"),
    "Places365": _by_split("train-standard", "val"),
    "QMNIST": BY_FLAG,
    "RenderedSST2": TRAIN_TEST,
    "SEMEION": ({},),
    "STL10": TRAIN_TEST,
    "SUN397": ({},),
    "SVHN": TRAIN_TEST,
    "StanfordCars": TRAIN_TEST,
    "USPS": BY_FLAG,
}
"""How each set's training and test parts are asked for; one entry where it has no parts."""


def load_torchvision(data: Data) -> Examples:
    """One set, or its official training or test part; fetched only if it is not there.

    ``subset = "all"`` puts the parts together and forgets which was which: every client's share is
    then split anew. A set without parts is whole whatever ``subset`` says.

    Raises:
        InputError: unknown name, or the files are not there and cannot be fetched.
    """
    import torchvision

    available = [name for name in SETS if hasattr(torchvision.datasets, name)]
    if data.name not in available:
        raise unknown_name("torchvision data set", str(data.name), available, where="data.name")
    cache = os.environ.get("FEDTL_CACHE") or DEFAULT_ROOT
    root = Path(data.path or os.path.join(cache, "torchvision")).expanduser()
    kind = getattr(torchvision.datasets, data.name)
    wanted = SETS[data.name]
    if len(wanted) > 1:
        wanted = {"train": wanted[:1], "test": wanted[1:], "all": wanted}[data.subset]
    parts = [open_part(kind, root, arguments) for arguments in wanted]
    for part in parts:
        for attribute in ("loader", "_loader"):
            if hasattr(part, attribute):
                setattr(part, attribute, _SafeLoader(data.max_pixels))
    labels = np.concatenate([read_labels(part) for part in parts])
    classes = read_classes(parts[0], labels)
    images = TorchvisionImages(data.name, parts)
    digests = b"".join(part_digest(part, images, root) for part in parts)
    return Examples(labels, classes, content_fingerprint(digests, labels, classes), images)


def open_part(kind: type, root: Path, arguments: Arguments) -> Any:
    """The data set object, from the files that are there or else after a download."""
    known = inspect.signature(kind).parameters
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    fetches = "download" in known or (passes_on and kind.__name__ != "ImageNet")
    offline = {**arguments, **({"download": False} if fetches else {})}
    try:
        return kind(root=str(root), **offline)
    except ModuleNotFoundError as error:
        raise EnvironmentFault(
            f"{kind.__name__} needs the package {error.name}", do=f"Install {error.name}"
        ) from error
    except Exception as error:  # absent or damaged files, said in a different way by each set
        if not fetches:
            raise missing(kind, root, error) from error
    with writing("downloaded data", root):
        root.mkdir(parents=True, exist_ok=True)
    try:
        with bounded_waiting():
            return kind(root=str(root), **{**arguments, "download": True})
    except Exception as error:  # from the socket to the checksum: nothing usable came
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise EnvironmentFault(
                f"cannot write downloaded data: {error.strerror}", where=str(root)
            ) from error
        raise missing(kind, root, error) from error


@contextlib.contextmanager
def bounded_waiting() -> Iterator[None]:
    """Give up on a silent server, and keep torchvision's chatter off standard output."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)


def missing(kind: type, root: Path, error: Exception) -> InputError:
    """The error for files that are not there: which folder to fill, and with what."""
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    belongs = expected_files(kind)
    folder = root
    if hasattr(kind, "raw_folder"):
        folder = root / kind.__name__ / "raw"
    listed = ", ".join(belongs) if belongs else f"what torchvision.datasets.{kind.__name__} expects"
    return InputError(
        f"the files of {kind.__name__} are not there and could not be fetched: {reason}",
        where="data.name",
        got=f"nothing usable in {folder}",
        allowed=f"in that folder: {listed}",
        do="Put them there by hand, or set data.path to the folder that holds them",
    )


def expected_files(kind: Any) -> list[str]:
    """File names of the official downloads, as far as torchvision's class tells."""
    if isinstance(getattr(kind, "resources", None), list):
        return [os.path.basename(entry[0]) for entry in kind.resources]
    if isinstance(getattr(kind, "split_list", None), dict):
        return [str(entry[1]) for entry in kind.split_list.values()]
    return [str(kind.filename)] if isinstance(getattr(kind, "filename", None), str) else []


def read_labels(part: Any) -> Int32:
    """int32 [n], from the set's own table of labels; only without one is every image decoded."""
    for attribute in ("targets", "labels", "_labels", "y"):
        if hasattr(part, attribute):
            labels = np.asarray(getattr(part, attribute))
            return (labels if labels.ndim == 1 else labels[:, 0]).astype(np.int32)
    for attribute in ("_samples", "samples"):
        if hasattr(part, attribute):
            return np.array([sample[1] for sample in getattr(part, attribute)], dtype=np.int32)
    return np.array([part[i][1] for i in range(len(part))], dtype=np.int32)


def read_classes(part: Any, labels: Int32) -> tuple[str, ...]:
    """Class names in label order; the numbers where the set has no names for them all."""
    for attribute in ("classes", "categories"):
        names = getattr(part, attribute, None)
        if isinstance(names, Sequence) and len(names) > labels.max():
            return tuple(" / ".join(n) if isinstance(n, tuple) else str(n) for n in names)
    return tuple(str(label) for label in range(int(labels.max()) + 1))


def part_digest(part: Any, images: TorchvisionImages, root: Path) -> bytes:
    """A digest over the pixels in memory, or else over the bytes of the image files."""
    if hasattr(part, "data"):
        return array_digest(np.asarray(part.data))
    for attribute in ("_samples", "samples", "imgs", "_image_files", "_images"):
        entries = getattr(part, attribute, None)
        if entries and isinstance(entries, list):
            firsts = [entry[0] if isinstance(entry, tuple) else entry for entry in entries]
            if all(isinstance(first, str | os.PathLike) for first in firsts):
                paths = [os.path.relpath(first, root).replace(os.sep, "/") for first in firsts]
                return hash_files(lambda path: (root / path).read_bytes(), paths)[0]
    return b"".join(array_digest(images.load(i)) for i in range(len(images)))


class _SafeLoader:
    """What torchvision's sets read an image file with, in place of their own."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels

    def __call__(self, path: str | os.PathLike[str]) -> Image.Image:
        data = Path(path).read_bytes()
        return Image.fromarray(decode_image(data, self._max_pixels, Path(path).name))


class TorchvisionImages:
    """The images of one set, its parts one after the other."""

    def __init__(self, name: str, parts: Sequence[Any]) -> None:
        self._name, self._parts = name, tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def load(self, i: int) -> Pixels:
        """Image ``i``, as torchvision gives it."""
        part = int(np.searchsorted(self._ends, i, side="right"))
        row = i - (int(self._ends[part - 1]) if part else 0)
        try:
            return to_rgb(self._parts[part][row][0])
        except (BadImage, MemoryError):
            raise
        except Exception as error:  # each set reads its files in its own way
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadImage(self.where(i), f"cannot be read: {reason}") from error

    def where(self, i: int) -> str:
        """The set's name and the row."""
        return f"{self._name} row {i}"

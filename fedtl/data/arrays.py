"""A ``.npz`` file: images or features, labels, and optionally domains, clients and a split.

A ``.csv`` file of features is read by ``csv_features`` and judged here like one.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl import machine
from fedtl.data.csv_features import read_csv
from fedtl.data.examples import (
    ArrayImages,
    Examples,
    array_digest,
    content_fingerprint,
    data_problems,
)
from fedtl.errors import EnvironmentFault, InputError, SecurityRefusal, nearest
from fedtl.scenario.schema import Data
from fedtl.types import Float32, Int32

MAX_BYTES = 16 * 2**30
"""A file that claims more is refused before anything is allocated."""

ARRAYS = ("x", "y", "domain", "client", "split", "classes")
SPLIT_WORDS = {"train": False, "test": True}

AnyArray = npt.NDArray[Any]


@dataclass(frozen=True)
class Column:
    """One named value per row: ``codes`` int32 [N] into ``names``."""

    codes: Int32
    names: tuple[str, ...]


def load_arrays(data: Data, *, one_client: bool = False) -> Examples:
    """Read ``x``, ``y`` and the optional ``domain``, ``client``, ``split`` and ``classes``.

    ``x`` is uint8 [n, h, w], [n, h, w, 1] or [n, h, w, 3] (images), or floating [n, d] (features,
    kept as float32) or [n, steps, channels] (series, kept as features with the channels of a step
    side by side). ``y``, ``domain`` and ``client`` are whole numbers or strings [n]; ``split``
    is bool (is test), 0 / 1, or "train" / "test"; ``classes`` names the labels 0 to C - 1.
    ``one_client``: a single class will do, others may have more.

    Raises:
        InputError: everything wrong with the file at once.
        SecurityRefusal: it holds Python objects, which only pickle can read.
    """
    if data.path is None:
        raise InputError("missing", where="data.path", do="Name the .npz or .csv file")
    path = Path(data.path)
    arrays = read_csv(path) if path.suffix.lower() == ".csv" else read_npz(path)
    problems = [f"array {name!r} is missing" for name in ("x", "y") if name not in arrays]
    if problems:
        raise data_problems(str(path), problems)
    channels = arrays["x"].shape[2] if is_series(arrays["x"]) else None
    x, problems = check_x(arrays["x"], data.max_pixels)
    columns: dict[str, Column] = {}
    for name in ("y", "domain", "client"):
        if name in arrays:
            try:
                columns[name] = encode(arrays[name], name)
            except UnicodeDecodeError:
                problems.append(f"{name} has bytes that are no UTF-8 text; save it as str or int")
            except ValueError as error:
                problems.append(str(error))
    is_test = None
    if "split" in arrays:
        try:
            is_test = read_split(arrays["split"])
        except ValueError as error:
            problems.append(str(error))
    problems += check_lengths(arrays)
    if "classes" in arrays and "y" in columns:
        try:
            columns["y"] = name_classes(arrays["y"], arrays["classes"])
        except ValueError as error:
            problems.append(str(error))
    if "y" in columns and len(columns["y"].names) < 2 and not one_client:
        problems.append("y has only one class; a classifier needs two")
    if problems:
        raise data_problems(str(path), problems)
    return build_examples(x, columns, is_test, channels)


def is_series(x: AnyArray) -> bool:
    """Whether an array holds series: floating [n, steps, channels]."""
    return x.ndim == 3 and x.dtype.kind == "f" and x.size > 0


def build_examples(
    x: AnyArray,
    columns: Mapping[str, Column],
    is_test: npt.NDArray[np.bool_] | None,
    channels: int | None = None,
) -> Examples:
    """Checked arrays as examples."""
    none = Column(np.empty(0, np.int32), ())
    y, domain, client = (columns.get(name, none) for name in ("y", "domain", "client"))
    domains = domain.codes if "domain" in columns else None
    clients = client.codes if "client" in columns else None
    fingerprint = content_fingerprint(
        array_digest(x), y.codes, y.names, domains, domain.names, clients, client.names, is_test
    )
    images = x.dtype == np.uint8
    return Examples(
        y.codes,
        y.names,
        fingerprint,
        images=ArrayImages(x) if images else None,
        features=None if images else x,
        channels=channels,
        domains=domains,
        domain_names=domain.names,
        clients=clients,
        client_names=client.names,
        is_test=is_test,
    )


def read_npz(path: Path) -> dict[str, AnyArray]:
    """All arrays of the file, after their headers were looked at."""
    if not path.is_file():
        raise InputError("no such .npz file", where="data.path", got=str(path))
    if not zipfile.is_zipfile(path):
        raise InputError(
            "not an .npz file",
            where="data.path",
            got=str(path),
            do="Write it with numpy.savez_compressed(path, x=..., y=...)",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            problems = check_headers(archive, path)
        if problems:
            raise data_problems(str(path), problems)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"damaged .npz file: {error}", where=str(path)) from error


def check_headers(archive: zipfile.ZipFile, path: Path) -> list[str]:
    """What the headers of the arrays say, before a byte is allocated for them."""
    problems: list[str] = []
    total = 0
    seen: set[str] = set()
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name not in ARRAYS or name == member.filename or name in seen:
            hint = nearest(name, ARRAYS)
            guess = f"; did you mean {hint!r}?" if hint and hint != name else ""
            problems.append(f"unexpected array {name!r} (known: {', '.join(ARRAYS)}){guess}")
            continue
        seen.add(name)
        if member.flag_bits & 0x1:
            problems.append(f"array {name!r} is encrypted")
            continue
        shape, dtype, start = read_header(archive, member)
        if dtype.hasobject:
            raise SecurityRefusal(
                f"array {name!r} holds Python objects, which only pickle can read",
                where=str(path),
                do="Save it as numbers or as fixed-width strings: array.astype(str)",
            )
        size = math.prod(shape) * dtype.itemsize
        total += size
        if size + start != member.file_size:
            problems.append(
                f"array {name!r} claims {size} bytes and has {member.file_size - start}"
            )
    if total > MAX_BYTES:
        problems.append(f"the arrays claim {total} bytes, more than {MAX_BYTES}")
    available = machine.available_memory_bytes()
    if not problems and available is not None and total > available:
        raise EnvironmentFault(
            "the arrays do not fit into memory",
            where=str(path),
            got=f"{total} bytes claimed",
            allowed=f"{available} bytes available",
            do="Use fewer rows, float16 features, or a machine with more memory",
        )
    return problems


def read_header(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and the place where the values start."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"array {member.filename!r} has npy format {version}")
        first = np.lib.format.read_array_header_1_0
        second = np.lib.format.read_array_header_2_0
        try:
            shape, _, dtype = (first if version == (1, 0) else second)(file)
        except Exception as error:  # NumPy parses it as Python text: any error of a parser
            raise ValueError(f"array {member.filename!r} has a broken header") from error
        return shape, dtype, file.tell()


def check_x(x: AnyArray, max_pixels: int) -> tuple[AnyArray, list[str]]:
    """Images as they are, features as float32, and what is wrong with them."""
    form = (
        "uint8 images [n, h, w] or [n, h, w, 3], floating features [n, d], or floating series "
        "[n, steps, channels]"
    )
    got = f"x is {x.dtype} {list(x.shape)}, not {form}"
    if x.size == 0:
        return x, [f"x is empty: {got}"]
    if x.dtype == np.uint8 and x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
        return x, [f"{got}; put the channels last: x.transpose(0, 2, 3, 1)"]
    if x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3))):
        if x.shape[1] * x.shape[2] > max_pixels:
            return x, [f"x has images of more than data.max_pixels = {max_pixels} pixels"]
        return x, []
    if x.ndim == 2 and x.dtype.kind in "iub":
        return x, [f"{got}; for features use x.astype('float32')"]
    if is_series(x):
        x = x.reshape(len(x), -1)
    if x.ndim > 2 and x.dtype.kind in "iuf":
        return x, [f"{got}; for images scale them to 0 to 255 and use x.astype('uint8')"]
    if x.ndim != 2 or x.dtype.kind != "f":
        return x, [got]
    return check_features(x)


def check_features(x: AnyArray) -> tuple[Float32, list[str]]:
    """Features as float32, [n, d], and the rows that have a NaN or an infinity."""
    with np.errstate(over="ignore"):
        features = np.ascontiguousarray(x, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        rows = ", ".join(map(str, bad[:5].tolist())) + (", ..." if len(bad) > 5 else "")
        return features, [f"x has NaN or infinity (as float32) in {len(bad)} rows: {rows}"]
    return features, []


def flat(values: AnyArray, name: str) -> AnyArray:
    """One value per row, [n] or [n, 1]; strings as str."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "iubUS":
        hint = f"; use {name}.astype(int)" if values.dtype.kind == "f" else ""
        raise ValueError(
            f"{name} is {values.dtype} {list(values.shape)}, not whole numbers or strings [n]{hint}"
        )
    return np.char.decode(values, "utf-8") if values.dtype.kind == "S" else values


def encode(values: AnyArray, name: str) -> Column:
    """Distinct values as strings, in numeric or alphabetic order, and each row's place."""
    unique, codes = np.unique(flat(values, name), return_inverse=True)
    return Column(codes.astype(np.int32), tuple(map(str, unique.tolist())))


def read_split(values: AnyArray) -> npt.NDArray[np.bool_]:
    """Whether each row is a test row."""
    values = flat(values, "split")
    is_test: npt.NDArray[np.bool_]
    if values.dtype.kind == "U":
        wrong = set(values.tolist()) - set(SPLIT_WORDS)
        is_test = values == "test"
    else:
        wrong = set(values.tolist()) - {0, 1}
        is_test = values.astype(np.bool_)
    if wrong:
        got = ", ".join(repr(value) for value in sorted(wrong)[:5])
        raise ValueError(f"split has {got}; allowed: true / false, 0 / 1, 'train' / 'test'")
    if is_test.all() or not is_test.any():
        lacks = "train" if is_test.all() else "test"
        raise ValueError(f"split has no {lacks} rows; leave it out to have fedtl split the data")
    return is_test


def name_classes(y: AnyArray, classes: AnyArray) -> Column:
    """Labels 0 to C - 1 with the names that came with them."""
    names = tuple(map(str, flat(classes, "classes").tolist()))
    labels = flat(y, "y")
    if len(set(names)) < len(names):
        raise ValueError("classes has a name twice")
    if labels.dtype.kind == "U":
        raise ValueError("classes is only for y of whole numbers; leave it out")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise ValueError(
            f"y is {labels.min()} to {labels.max()}, but classes has {len(names)} names "
            f"for 0 to {len(names) - 1}"
        )
    return Column(labels.astype(np.int32), names)


def check_lengths(arrays: Mapping[str, AnyArray]) -> list[str]:
    """One problem if the columns do not have one value per row of ``x``."""
    lengths = {
        name: len(array) if array.ndim else 0 for name, array in arrays.items() if name != "classes"
    }
    if len(set(lengths.values())) == 1:
        return []
    return ["lengths differ: " + ", ".join(f"{name} {n}" for name, n in lengths.items())]

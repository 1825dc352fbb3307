"""Labelled examples of one data source, before anybody is told which client holds what."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from fedtl.errors import InputError
from fedtl.types import Float32, Float64, Int32, Int64

Kind = Literal["images", "texts", "rows"]
"""What examples are; tables and ready features both are rows."""

Pixels = npt.NDArray[np.uint8]
"""One image, [h, w, 3] RGB, 0 to 255."""


class BadImage(Exception):
    """One image that cannot be used: where it is and why, in one line."""

    def __init__(self, where: str, reason: str) -> None:
        self.where, self.reason = where, reason
        super().__init__(f"{where}: {reason}")


class BadFiles(InputError):
    """Images that cannot be used, for a caller who may say how many but not which.

    Attributes:
        count: how many there are.
    """

    def __init__(
        self, what: str, count: int, *, where: object, got: object, do: str | None
    ) -> None:
        self.count = count
        super().__init__(what, where=where, got=got, do=do)


class Images(Protocol):
    """Images that are decoded one at a time, from any thread."""

    def __len__(self) -> int: ...

    def load(self, i: int) -> Pixels:
        """Image ``i``, uint8 [h, w, 3] RGB, fully decoded; raises BadImage."""
        ...

    def where(self, i: int) -> str:
        """Image ``i`` for messages: its path inside the data folder, or ``"row 17"``."""
        ...


class Texts(Protocol):
    """Texts by row."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> str:
        """Text ``i``, not empty."""
        ...

    def where(self, i: int) -> str:
        """Text ``i`` for messages, never the text itself."""
        ...


@dataclass(frozen=True)
class Table:
    """Rows of a table as they were read; who holds which decides how they become features.

    Attributes:
        numeric: float64 [N, n]; NaN where a value is missing.
        numeric_names: n column names.
        codes: int32 [N, m], into ``categories``; -1 where a value is missing.
        categorical_names: m column names.
        categories: for each of the m columns the values it may have.
    """

    numeric: Float64
    numeric_names: tuple[str, ...]
    codes: Int32
    categorical_names: tuple[str, ...] = ()
    categories: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.numeric)

    def subset(self, keep: Int64) -> Table:
        """The rows ``keep``."""
        return dataclasses.replace(self, numeric=self.numeric[keep], codes=self.codes[keep])


@dataclass(frozen=True)
class Examples:
    """What a source holds: labels, and images, texts, rows of a table or ready features.

    Attributes:
        labels: int32 [N], in [0, C).
        classes: C class names; a class may have no example.
        fingerprint: hex BLAKE2b over content, labels, classes, domains, clients and split.
        images, features, texts, table: exactly one of the four; features are float32 [N, D], all
            finite.
        domains: int32 [N] into ``domain_names``, or None.
        clients: natural clients, int32 [N] into ``client_names``, or None.
        is_test: the split that came with the data, bool [N], or None.
        notes: what the loader left out, one line each, to be shown to the user.
        dealt: hex BLAKE2b over what is not in the fingerprint, since the features do not depend on
            it: clients by a pattern, a split file, permuted labels; "" where nothing is.
        channels: of series, that stand side by side in ``features``; None where nothing is known.
    """

    labels: Int32
    classes: tuple[str, ...]
    fingerprint: str
    images: Images | None = None
    features: Float32 | None = None
    domains: Int32 | None = None
    domain_names: tuple[str, ...] = ()
    clients: Int32 | None = None
    client_names: tuple[str, ...] = ()
    is_test: npt.NDArray[np.bool_] | None = None
    notes: tuple[str, ...] = ()
    dealt: str = ""
    texts: Texts | None = None
    table: Table | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        kinds = (self.images, self.features, self.texts, self.table)
        content = [kind for kind in kinds if kind is not None]
        if len(content) != 1:
            raise ValueError("examples have images, features, texts or a table, exactly one")
        columns = [self.labels, *content, self.domains, self.clients, self.is_test]
        lengths = {len(column) for column in columns if column is not None}
        if len(lengths) > 1:
            raise ValueError(f"columns of examples differ in length: {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identity(self) -> str:
        """Hex hash of all that decides a run: the fingerprint, and what is ``dealt`` beside it."""
        return content_hash(self.fingerprint, self.dealt) if self.dealt else self.fingerprint

    @property
    def kind(self) -> Kind:
        """What the examples are, as a backbone's ``takes`` has it."""
        if self.images is not None:
            return "images"
        return "texts" if self.texts is not None else "rows"

    def where(self, i: int) -> str:
        """Example ``i`` for messages."""
        source = self.images or self.texts
        return f"row {i}" if source is None else source.where(i)

    def subset(self, keep: Int64) -> Examples:
        """The examples ``keep``, int64 [n] in ascending order; names of classes all stay."""
        keep = np.asarray(keep, dtype=np.int64)
        digest = hashlib.blake2b(self.fingerprint.encode(), digest_size=32)
        digest.update(np.ascontiguousarray(keep).astype("<i8").tobytes())
        return dataclasses.replace(
            self,
            labels=self.labels[keep],
            fingerprint=digest.hexdigest(),
            images=None if self.images is None else ChosenImages(self.images, keep),
            features=None if self.features is None else self.features[keep],
            texts=None if self.texts is None else ChosenTexts(self.texts, keep),
            table=None if self.table is None else self.table.subset(keep),
            domains=None if self.domains is None else self.domains[keep],
            clients=None if self.clients is None else self.clients[keep],
            is_test=None if self.is_test is None else self.is_test[keep],
        )


class ChosenImages:
    """Some of other images, renumbered."""

    def __init__(self, images: Images, keep: Int64) -> None:
        self._images, self._keep = images, keep

    def __len__(self) -> int:
        return len(self._keep)

    def load(self, i: int) -> Pixels:
        """Image ``i`` of the chosen ones."""
        return self._images.load(int(self._keep[i]))

    def where(self, i: int) -> str:
        """Where the chosen image lies in the whole source."""
        return self._images.where(int(self._keep[i]))


class ChosenTexts:
    """Some of other texts, renumbered."""

    def __init__(self, texts: Texts, keep: Int64) -> None:
        self._texts, self._keep = texts, keep

    def __len__(self) -> int:
        return len(self._keep)

    def __getitem__(self, i: int) -> str:
        """Text ``i`` of the chosen ones."""
        return self._texts[int(self._keep[i])]

    def where(self, i: int) -> str:
        """Where the chosen text stands in the whole source."""
        return self._texts.where(int(self._keep[i]))


class ArrayImages:
    """Images that are already in memory as one array, uint8 [n, h, w] or [n, h, w, 1 or 3]."""

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def load(self, i: int) -> Pixels:
        """Image ``i``; grey is repeated into three channels."""
        image = self._pixels[i]
        if image.ndim == 2:
            image = image[:, :, None]
        return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))

    def where(self, i: int) -> str:
        """The row of the array."""
        return f"row {i}"


Part = bytes | npt.NDArray[np.generic] | Sequence[str] | None


def content_fingerprint(
    content: bytes, labels: Int32, classes: Sequence[str], *columns: Part
) -> str:
    """Hex BLAKE2b-256 that stands for a whole source: the feature store is keyed by it.

    Args:
        content: a digest of all pixels, file bytes or features.
        labels: int32 [N].
        classes: class names.
        columns: domains, domain names, clients, client names, split, in that order.
    """
    return content_hash(content, labels, classes, *columns)


def content_hash(*parts: Part | str) -> str:
    """Hex BLAKE2b-256 over any of bytes, arrays, names and texts; each part counts by itself."""
    digest = hashlib.blake2b(digest_size=32, person=b"fedtl-examples")
    for part in parts:
        if part is None:
            data = b"none"
        elif isinstance(part, str):
            data = b"text" + part.encode("utf-8", "surrogateescape")
        elif isinstance(part, bytes):
            data = part
        elif isinstance(part, np.ndarray):
            data = f"{part.dtype.str}{part.shape}".encode() + np.ascontiguousarray(part).tobytes()
        else:
            data = "\0".join(part).encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def array_digest(array: npt.NDArray[np.generic]) -> bytes:
    """BLAKE2b-256 over dtype, shape and values of one array."""
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=32)
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.digest()


def data_problems(where: str, problems: Sequence[str], do: str | None = None) -> InputError:
    """All problems with one source in one error: the first five, and how many there are."""
    if len(problems) == 1:
        return InputError(problems[0], where=where, do=do)
    lines = "".join(f"\n  {problem}" for problem in problems[:5])
    more = f"\n  ... and {len(problems) - 5} more" if len(problems) > 5 else ""
    return InputError(f"{len(problems)} problems with these data:{lines}{more}", where=where, do=do)

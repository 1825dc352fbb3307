"""Small examples, images and folders for the tests of the data floor."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedtl.data.examples import Examples


@pytest.fixture
def make_examples() -> Callable[..., Examples]:
    """Examples with features, from labels and optionally domains, clients and a split."""

    def make(
        labels: Iterable[int],
        domains: Iterable[int] | None = None,
        clients: Iterable[int] | None = None,
        is_test: Iterable[bool] | None = None,
    ) -> Examples:
        y = np.array(list(labels), dtype=np.int32)
        d = None if domains is None else np.array(list(domains), dtype=np.int32)
        c = None if clients is None else np.array(list(clients), dtype=np.int32)
        return Examples(
            y,
            tuple(f"class-{i}" for i in range(int(y.max(initial=0)) + 1)),
            "0" * 64,
            features=np.arange(len(y), dtype=np.float32)[:, None],
            domains=d,
            domain_names=() if d is None else tuple("abcdefgh"[: d.max() + 1]),
            clients=c,
            client_names=() if c is None else tuple(f"site {i}" for i in range(c.max() + 1)),
            is_test=None if is_test is None else np.array(list(is_test)),
        )

    return make


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    """One image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def png() -> Callable[[int], bytes]:
    """A different small PNG for each number."""
    return lambda i: encode(Image.new("RGB", (4, 3), (i % 256, i // 256 % 256, 7)))


@pytest.fixture
def make_tree(tmp_path: Path, png: Callable[[int], bytes]) -> Callable[..., Path]:
    """A folder with a different small PNG at each path; a path that ends in / is a folder."""

    def make(paths: Iterable[str], root: str = "data") -> Path:
        top = tmp_path / root
        top.mkdir(exist_ok=True)
        for i, path in enumerate(paths):
            if path.endswith("/"):
                (top / path).mkdir(parents=True)
            else:
                (top / path).parent.mkdir(parents=True, exist_ok=True)
                (top / path).write_bytes(png(i))
        return top

    return make

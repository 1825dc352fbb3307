"""Decoding: every mode becomes upright RGB, everything broken becomes BadImage."""

import io
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedtl.data.examples import BadImage
from fedtl.data.images import EXTENSIONS, FileImages, decode_image, to_rgb
from fedtl.errors import printable

LIMIT = 50_000_000
GRADIENT = np.add.outer(np.arange(24) * 5, np.arange(32) * 3).astype(np.uint8)
COLOURS = np.stack([GRADIENT, GRADIENT[::-1], 255 - GRADIENT], axis=2)


def encode(image: Any, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: Any, height: Any, tail: Any = b"") -> bytes:
    """A PNG of a few bytes that claims any size."""

    def chunk(kind: Any, body: Any) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body + tail


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "GIF", "JPEG"])
def test_every_format(format: str) -> None:
    exact = format not in ("GIF", "JPEG")
    options = {"lossless": True} if format == "WEBP" else {}
    pixels = decode_image(encode(Image.fromarray(COLOURS), format, **options), LIMIT)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (24, 32, 3)
    worst = np.abs(pixels.astype(int) - COLOURS).max()
    assert worst == 0 if exact else worst < 60


def test_the_name_does_not_decide_the_format() -> None:
    assert decode_image(encode(Image.fromarray(COLOURS), "PNG"), LIMIT, "x.jpg").shape == (
        24,
        32,
        3,
    )
    assert all(name.startswith(".") and name == name.lower() for name in EXTENSIONS)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_bilevel_and_palette(mode: str) -> None:
    image = Image.fromarray(GRADIENT).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert (decode_image(encode(image), LIMIT) == expected).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_lies_over_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (10, 10, 10, 0))
    image.paste((10, 10, 10, 255), (0, 0, 2, 4))
    if mode == "P":
        flat = Image.new("P", (4, 4), 1)
        flat.putpalette([0, 0, 0, 10, 10, 10])
        flat.paste(0, (2, 0, 4, 4))
        data = encode(flat, transparency=0)
    else:
        data = encode(image.convert(mode))
    pixels = decode_image(data, LIMIT)
    assert (pixels[:, :2] == 10).all()
    assert (pixels[:, 2:] == 255).all()


def test_half_alpha_is_half_white() -> None:
    pixels = decode_image(encode(Image.new("RGBA", (2, 2), (0, 0, 0, 128))), LIMIT)
    assert np.abs(pixels.astype(int) - 127).max() <= 1


def test_colour_key_transparency() -> None:
    data = encode(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    assert (decode_image(data, LIMIT) == 255).all()


def test_cmyk_and_ycbcr_jpeg() -> None:
    grey = Image.new("RGB", (16, 16), (100, 150, 200))
    for mode in ("CMYK", "YCbCr"):
        pixels = decode_image(encode(grey.convert(mode), "JPEG", quality=95), LIMIT)
        assert np.abs(pixels.astype(int) - [100, 150, 200]).max() < 8


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_the_upper_bits(format: str) -> None:
    deep = (np.arange(256, dtype=np.uint16)[None, :] * 257).repeat(2, axis=0)
    pixels = decode_image(encode(Image.fromarray(deep), format), LIMIT)
    assert (pixels == np.arange(256, dtype=np.uint8)[None, :, None]).all()


def test_thirty_two_bit_grey() -> None:
    inside = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.int32))
    assert to_rgb(inside)[0, :, 0].tolist() == [0, 1, 255]
    for value in (-1, 65536):
        outside = Image.fromarray(np.array([[0, value]], dtype=np.int32))
        with pytest.raises(BadImage, match="range"):
            decode_image(encode(outside, "TIFF"), LIMIT)


def test_float_pixels_are_refused() -> None:
    image = Image.fromarray(np.ones((2, 2), dtype=np.float32))
    with pytest.raises(BadImage, match="floating-point"):
        decode_image(encode(image, "TIFF"), LIMIT)


def test_sixteen_bit_rgb_png() -> None:
    scanlines = b"".join(b"\0" + struct.pack(">6H", *[65535, 0, 32896] * 2) for _ in range(2))

    def chunk(kind: Any, body: Any) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")
    pixels = decode_image(b"\x89PNG\r\n\x1a\n" + body, LIMIT)
    assert (pixels == [255, 0, 128]).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), (v, v, v)) for v in (0, 255)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (decode_image(data, LIMIT) == 0).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = Image.fromarray(COLOURS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {  # how the upright picture must be stored to be shown upright
        1: COLOURS,
        2: COLOURS[:, ::-1],
        3: COLOURS[::-1, ::-1],
        4: COLOURS[::-1],
        5: COLOURS.transpose(1, 0, 2),
        6: np.rot90(COLOURS),
        7: COLOURS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(COLOURS, -1),
    }[orientation]
    stored = Image.fromarray(np.ascontiguousarray(turned))
    assert (decode_image(encode(stored, exif=exif), LIMIT) == np.asarray(image)).all()


def test_truncated_jpeg_is_refused_though_verify_passes_it() -> None:
    data = encode(Image.fromarray(np.tile(COLOURS, (10, 10, 1))), "JPEG")
    cut = data[: len(data) // 2]
    Image.open(io.BytesIO(cut)).verify()
    with pytest.raises(BadImage, match="truncated"):
        decode_image(cut, LIMIT, "a/cut.jpg")


@pytest.mark.parametrize("side", [12_000, 30_000])
def test_bomb_is_refused_by_its_header(side: int) -> None:
    data = png_header(side, side)
    assert len(data) < 80
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BadImage, match=rf"a/bomb.png: claims {side} x {side}.*max_pixels"):
        decode_image(data, LIMIT, "a/bomb.png")
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_raised_limit_lets_a_large_image_through_without_a_warning() -> None:
    """100 million pixels: Pillow's own check would warn here."""
    with pytest.raises(BadImage) as caught:
        decode_image(png_header(10_000, 10_000), 200_000_000)
    assert "claims" not in caught.value.reason


def test_max_pixels_is_inclusive() -> None:
    data = encode(Image.new("L", (10, 10)))
    assert decode_image(data, 100).shape == (10, 10, 3)
    with pytest.raises(BadImage):
        decode_image(data, 99)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"\xff\xd8\xff",
        b"GIF89a",
        b"BM",
        b"II*\0",
        b"RIFF\0\0\0\0WEBPVP8 ",
        b"P6 9",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        png_header(0, 5),
        png_header(3, 3),
        png_header(3, 3)[:20],
    ],
)
def test_broken_bytes_have_a_one_line_reason(data: bytes) -> None:
    with pytest.raises(BadImage) as caught:
        decode_image(data, LIMIT, "a/b.png")
    assert caught.value.where == "a/b.png"
    assert caught.value.reason
    assert "\n" not in str(caught.value)


def test_noise_in_a_good_file_never_escapes_as_another_error() -> None:
    generator = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        good = np.frombuffer(encode(Image.fromarray(COLOURS), format), dtype=np.uint8)
        for _ in range(40):
            data = good.copy()
            places = generator.integers(0, len(data), 4)
            data[places] = generator.integers(0, 256, 4)
            try:
                pixels = decode_image(data.tobytes(), 100_000)
            except BadImage:
                continue
            assert pixels.ndim == 3


class MemoryFiles:
    """Files in memory, and one that fails."""

    root, folders = None, ()

    def __init__(self, contents: Any) -> None:
        self.contents, self.paths = contents, tuple(contents)

    def read(self, path: Path) -> bytes:
        if self.contents[path] is None:
            raise PermissionError(13, "Permission denied")
        return self.contents[path]


def test_file_images_from_several_threads() -> None:
    contents = {f"a/{i}.png": encode(Image.new("L", (3, 3), i)) for i in range(50)}
    images = FileImages(MemoryFiles(contents), list(contents), LIMIT)
    found = [0] * 50

    def work(start: int) -> None:
        for i in range(start, 50, 4):
            found[i] = int(images.load(i)[0, 0, 0])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == list(range(50))


def test_a_file_that_cannot_be_read() -> None:
    images = FileImages(MemoryFiles({"a/x.png": None}), ["a/x.png"], LIMIT)
    with pytest.raises(BadImage, match=r"a/x.png: cannot be read: Permission denied"):
        images.load(0)


def test_printable_paths() -> None:
    assert printable("é/猫.png") == "é/猫.png"
    assert printable("a\nb\x1b[31m\udcff.png").isprintable()

"""From the bytes of an image file to RGB pixels, or to a reason why not.

Hostile or broken files are expected. The size is read from the header before anything is decoded,
then the whole file is decoded: Pillow's ``verify`` passes a JPEG that ends half-way.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from fedtl.data.examples import BadImage, Pixels
from fedtl.data.files import Files
from fedtl.errors import printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

_PLUGINS = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    BmpImagePlugin.BmpImageFile,
    GifImagePlugin.GifImageFile,
    WebPImagePlugin.WebPImageFile,
    TiffImagePlugin.TiffImageFile,
    PpmImagePlugin.PpmImageFile,
)

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, max_pixels: int, where: str = "image") -> Pixels:
    """Decode one image file completely, upright and as RGB.

    Alpha is laid over white; 16-bit grey keeps its upper 8 bits; of an animation the first frame
    counts; EXIF orientation is applied.

    Args:
        data: the bytes of a JPEG, PNG, BMP, GIF, WebP, TIFF, PPM or PGM file, whatever its name.
        max_pixels: a header that claims more is refused before decoding.
        where: what to call the image in messages.

    Returns:
        uint8 [h, w, 3].

    Raises:
        BadImage: it cannot be decoded, or is too large.
    """
    try:
        image = _open(data)
        width, height = image.size
        if width * height > max_pixels:
            reason = f"claims {width} x {height} pixels, more than data.max_pixels = {max_pixels}"
            raise BadImage(where, reason)
        if width * height == 0:
            raise BadImage(where, "has no pixels")
        image.load()
        return to_rgb(_upright(image))
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # decoders of hostile bytes raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(where, f"cannot be decoded: {reason}") from error


def _open(data: bytes) -> Image.Image:
    """The lazily opened image.

    ``Image.open`` would try every format Pillow has, and only warn of a decompression bomb
    through warning filters that threads share. The formats' own classes do neither.
    """
    if not data:
        raise ValueError("the file is empty")
    for plugin in _PLUGINS:
        _, accept = Image.OPEN[plugin.format]
        if accept is None or accept(data[:16]) is True:
            try:
                return plugin(io.BytesIO(data))
            except SyntaxError:
                continue  # Pillow's way to say: not this format after all
    raise ValueError("not a JPEG, PNG, BMP, GIF, WebP, TIFF, PPM or PGM file")


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; a broken EXIF block says nothing."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, struct.error):
        return image  # the pixels are good without it
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Pixels:
    """A decoded Pillow image of any usual mode as uint8 [h, w, 3].

    Raises:
        ValueError: floating-point pixels, or 32-bit grey beyond 16 bits: their range is unknown.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image)
        if deep.size and (deep.min() < 0 or deep.max() > 0xFFFF):
            raise ValueError("32-bit grey values beyond 0 to 65535 have no known range")
        grey = (deep >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        front = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", front.size, "white"), front)
    return np.array(image.convert("RGB"))


class FileImages:
    """Images in files, decoded when asked for."""

    def __init__(self, files: Files, paths: Sequence[str], max_pixels: int) -> None:
        self._files, self._paths, self._max_pixels = files, tuple(paths), max_pixels

    def __len__(self) -> int:
        return len(self._paths)

    def load(self, i: int) -> Pixels:
        """Read and decode file ``i``."""
        try:
            data = self._files.read(self._paths[i])
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
            raise BadImage(self.where(i), reason) from error
        return decode_image(data, self._max_pixels, self.where(i))

    def where(self, i: int) -> str:
        """The path inside the data folder, safe to print."""
        return printable(self._paths[i])

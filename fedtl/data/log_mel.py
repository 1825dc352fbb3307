"""From the bytes of a wav file to a picture: time to the right, pitch upwards, loudness as light.

Hostile or broken files are expected: what a header claims is checked against what is there and
against what may be, before anything is made of it.
"""

from __future__ import annotations

import functools
import io
import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.data.examples import BadImage, Pixels
from fedtl.data.files import Files
from fedtl.errors import printable
from fedtl.types import Float64

RATES = (100, 400_000)
"""Samples a second that a recording may have."""

MAX_CHANNELS = 64
WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
RANGE_DECIBEL = 80.0
"""Below its loudest place by this much a picture is black."""

LOUDEST = 1e30
"""A floating sample beyond it is none: its square is infinite."""

FRAMES_AT_ONCE = 256

_READING = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """How a recording becomes a picture.

    Attributes:
        rate: samples a second.
        seconds: that are looked at.
        bands: height; width is ``frames``.
    """

    rate: int
    seconds: float
    bands: int

    @property
    def samples(self) -> int:
        """What is looked at."""
        return max(1, round(self.rate * self.seconds))

    @property
    def window(self) -> int:
        """Samples of a frame: 25 ms."""
        return max(2, round(self.rate * WINDOW_SECONDS))

    @property
    def hop(self) -> int:
        """Samples from frame to frame: 10 ms."""
        return max(1, round(self.rate * HOP_SECONDS))

    @property
    def frames(self) -> int:
        """Frames that begin within what is looked at."""
        return math.ceil(self.samples / self.hop)

    def identity(self) -> str:
        """All that its pixels depend on beside the recording."""
        return f"log-mel 1 {self.rate} {self.samples} {self.bands}"


def mel(hertz: Float64 | float) -> Float64:
    """O'Shaughnessy's formula, 2595 log10(1 + f / 700): 1000 Hz are 1000 mel."""
    return np.asarray(2595.0 * np.log10(1.0 + np.asarray(hertz, np.float64) / 700.0))


def hertz(mels: Float64) -> Float64:
    """The inverse of ``mel``."""
    return np.asarray(700.0 * (10.0 ** (mels / 2595.0) - 1.0))


@functools.cache
def filter_bank(rate: int, bands: int, window: int) -> Float64:
    """Triangles of height 1, equally wide in mel from 0 to half the rate, [bands, bins].

    The Fourier transform is so long, by zeros, that the narrowest triangle has several bins.
    Source: Davis and Mermelstein 1980, with the mel scale above.
    """
    corners = hertz(np.linspace(0.0, float(mel(rate / 2)), bands + 2))
    wanted = max(window, 2 * rate / (corners[1] - corners[0]))
    length = 2 ** math.ceil(math.log2(wanted))
    bins = np.arange(length // 2 + 1) * (rate / length)
    low, top, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    up, down = (bins - low) / (top - low), (high - bins) / (high - top)
    bank: Float64 = np.maximum(0.0, np.minimum(up, down))
    return bank


def log_mel(samples: Float64, picture: Picture) -> Pixels:
    """The picture of a recording, uint8 [bands, frames, 3]; silence is black.

    A shorter recording stands in the middle of silence, of a longer one the beginning is taken.
    Power in each band of Hann windows, in decibel below the loudest place of the picture: how loud
    a recording is as a whole is not seen.

    Args:
        samples: float64 [n] at ``picture.rate``.
    """
    bank = filter_bank(picture.rate, picture.bands, picture.window)
    length, hop, frames = 2 * (bank.shape[1] - 1), picture.hop, picture.frames
    used = min(len(samples), picture.samples)
    start = (picture.samples - used) // 2
    padded = np.zeros((frames - 1) * hop + picture.window)
    padded[start : start + used] = samples[:used]
    windows = np.lib.stride_tricks.sliding_window_view(padded, picture.window)[::hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(picture.window) / picture.window)
    power = np.empty((picture.bands, frames))
    for first in range(0, frames, FRAMES_AT_ONCE):
        part = slice(first, first + FRAMES_AT_ONCE)
        power[:, part] = bank @ (np.abs(np.fft.rfft(windows[part] * hann, length)) ** 2).T
    loudest = power.max()
    if loudest <= 0.0:
        return np.zeros((picture.bands, frames, 3), np.uint8)
    floor = 10.0 ** (-RANGE_DECIBEL / 10)
    decibel = 10.0 * np.log10(np.maximum(power / loudest, floor))
    light = np.rint(255.0 * (1.0 + decibel / RANGE_DECIBEL)).astype(np.uint8)[::-1]
    return np.repeat(light[:, :, None], 3, axis=2)


def read_wav(data: bytes, picture: Picture, where: str = "recording") -> Float64:
    """The first seconds of a wav file, mono, at the picture's rate.

    Channels are averaged; 8, 16, 24 and 32 bits and floating samples are scaled to -1 to 1. Of
    another rate it is resampled (SciPy's polyphase filter).

    Raises:
        BadImage: no wav file, a damaged one, one without a sample, or with absurd claims.
    """
    rate, samples = _decoded(data, where)
    if not RATES[0] <= rate <= RATES[1]:
        allowed = f"{RATES[0]} to {RATES[1]} are read"
        raise BadImage(where, f"claims {rate} samples a second; {allowed}")
    if samples.ndim == 2 and not 1 <= samples.shape[1] <= MAX_CHANNELS:
        raise BadImage(where, f"claims {samples.shape[1]} channels, more than {MAX_CHANNELS}")
    if not len(samples):
        raise BadImage(where, "has no sample")
    values: Float64 = samples[: math.ceil(rate * picture.seconds)].astype(np.float64)
    if samples.dtype == np.uint8:
        values = (values - 128.0) / 128.0
    elif samples.dtype.kind == "i":
        values = values / -float(np.iinfo(samples.dtype).min)
    if not np.isfinite(values).all() or np.abs(values).max() > LOUDEST:
        raise BadImage(where, "has samples that are no finite numbers")
    mono: Float64 = values if values.ndim == 1 else values.mean(axis=1)
    if rate == picture.rate:
        return mono
    from scipy.signal import resample_poly

    shared = math.gcd(rate, picture.rate)
    resampled: Float64 = resample_poly(mono, picture.rate // shared, rate // shared)
    return resampled


def _decoded(data: bytes, where: str) -> tuple[int, npt.NDArray[Any]]:
    """Rate and samples, [n] or [n, channels], as they are in the file."""
    from scipy.io import wavfile

    if not data:
        raise BadImage(where, "the file is empty")
    try:
        # warnings are the process's: of chunks that are passed over, and of a file cut off
        with _READING, warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            rate, samples = wavfile.read(io.BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:  # a reader of hostile bytes raises nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadImage(where, f"cannot be read as wav: {printable(reason)}") from error
    return int(rate), samples


class Recordings:
    """Recordings in wav files as pictures, made when asked for."""

    def __init__(self, files: Files, paths: Sequence[str], picture: Picture) -> None:
        self._files, self._paths, self._picture = files, tuple(paths), picture

    def __len__(self) -> int:
        return len(self._paths)

    def load(self, i: int) -> Pixels:
        """Read file ``i`` and draw it, uint8 [bands, frames, 3]; raises BadImage."""
        where = self.where(i)
        try:
            data = self._files.read(self._paths[i])
        except OSError as error:
            reason = f"cannot be read: {error.strerror or error}"
            raise BadImage(where, reason) from error
        return log_mel(read_wav(data, self._picture, where), self._picture)

    def where(self, i: int) -> str:
        """The path inside the data folder, safe to print."""
        return printable(self._paths[i])

"""Recordings as pictures: the filters, the picture, and wav files, good and hostile."""

from __future__ import annotations

import cmath
import io
import math
import struct
import threading
import wave
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import wavfile

from fedtl.data.examples import BadFiles, BadImage, Examples
from fedtl.data.log_mel import Picture, filter_bank, hertz, log_mel, mel, read_wav
from fedtl.data.sound import load_sound
from fedtl.errors import InputError
from fedtl.scenario.schema import Data

PICTURE = Picture(8000, 0.2, 20)


def sine(frequency: float, rate: int = 8000, seconds: float = 0.2) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    wavfile.write(file, rate, samples)
    return file.getvalue()


def test_the_scale() -> None:
    np.testing.assert_allclose(
        mel(np.array([0.0, 700.0, 1000.0])), [0.0, 781.17, 999.99], atol=0.01
    )
    frequencies = np.linspace(0, 20_000, 50)
    np.testing.assert_allclose(hertz(mel(frequencies)), frequencies, atol=1e-8)


@pytest.mark.parametrize(("rate", "bands", "window"), [(8000, 20, 200), (16000, 64, 400)])
def test_filters_are_those_of_transformers(rate: int, bands: int, window: int) -> None:
    from transformers.audio_utils import mel_filter_bank

    found = filter_bank(rate, bands, window)
    wanted = mel_filter_bank(found.shape[1], bands, 0.0, rate / 2, rate, mel_scale="htk")
    np.testing.assert_allclose(found, wanted.T, atol=1e-12)


@pytest.mark.parametrize(("rate", "bands"), [(1000, 8), (8000, 128), (44_100, 512), (192_000, 8)])
def test_no_filter_is_empty(rate: int, bands: int) -> None:
    bank = filter_bank(rate, bands, Picture(rate, 1.0, bands).window)
    assert (bank.sum(axis=1) > 0.4).all()
    assert 0 <= bank.min() <= bank.max() <= 1


def slow(samples: list[float], picture: Picture) -> list[list[int]]:
    """The picture by loops over definitions."""
    bank = filter_bank(picture.rate, picture.bands, picture.window).tolist()
    length = 2 * (len(bank[0]) - 1)
    before = (picture.samples - len(samples)) // 2
    padded = [0.0] * before + samples + [0.0] * (picture.samples + picture.window)
    columns = []
    for frame in range(picture.frames):
        part = padded[frame * picture.hop :][: picture.window]
        hann = [math.sin(math.pi * i / picture.window) ** 2 for i in range(picture.window)]
        power = []
        for k in range(length // 2 + 1):
            turns = (cmath.exp(-2j * math.pi * k * i / length) for i in range(picture.window))
            whole = sum(a * b * c for a, b, c in zip(part, hann, turns, strict=True))
            power.append(abs(whole) ** 2)
        columns.append([sum(a * b for a, b in zip(row, power, strict=True)) for row in bank])
    loudest = max(map(max, columns))
    light = [[1 + 10 * math.log10(max(p / loudest, 1e-8)) / 80 for p in c] for c in columns]
    return [[round(255 * column[-1 - band]) for column in light] for band in range(picture.bands)]


def test_against_loops() -> None:
    picture = Picture(1000, 0.06, 8)
    samples = np.random.default_rng(0).normal(size=41)
    found = log_mel(samples, picture)
    assert found.shape == (8, 6, 3)
    assert (found[:, :, 0] == found[:, :, 2]).all()
    difference = found[:, :, 0].astype(int) - np.array(slow(samples.tolist(), picture))
    assert np.abs(difference).max() <= 1  # a half may be rounded either way
    assert (difference == 0).mean() > 0.95


def test_a_tone_is_a_line_at_its_pitch() -> None:
    picture = Picture(8000, 0.2, 40)
    heights = []
    for frequency in (300.0, 1000.0, 3000.0):
        image = log_mel(sine(frequency), picture)[:, :, 0]
        row = int(image[:, 5:-5].mean(axis=1).argmax())
        corners = hertz(np.linspace(0, float(mel(4000)), 42))
        assert corners[39 - row] < frequency < corners[41 - row]
        heights.append(row)
    assert heights == sorted(heights, reverse=True)  # high is up


def test_loudness_as_a_whole_is_not_seen() -> None:
    quiet = log_mel(1e-3 * sine(440), PICTURE)
    assert np.abs(quiet.astype(int) - log_mel(sine(440), PICTURE)).max() <= 1
    assert quiet.max() == 255


def test_silence_is_black_and_shorter_ones_stand_in_it() -> None:
    assert not log_mel(np.zeros(500), PICTURE).any()
    image = log_mel(sine(1000, seconds=0.05), PICTURE)[:, :, 0]
    lit = np.flatnonzero(image.max(axis=0) > 200)
    assert 4 <= lit.min() <= 8
    assert 10 <= lit.max() <= 14
    longer = np.concatenate([sine(1000), np.ones(9000)])
    assert (log_mel(longer, PICTURE) == log_mel(sine(1000), PICTURE)).all()


def test_kinds_of_samples() -> None:
    wanted = log_mel(sine(440), PICTURE).astype(int)
    half = sine(440)
    kinds = {
        "float32": half.astype(np.float32),
        "float64": half,
        "int16": (half * 32767).astype(np.int16),
        "int32": (half * (2**31 - 1)).astype(np.int32),
        "stereo": np.stack([(half * 30000).astype(np.int16)] * 2, axis=1),
    }
    for samples in kinds.values():
        found = log_mel(read_wav(wav(samples), PICTURE), PICTURE)
        loud = wanted > 120
        assert np.abs(found - wanted)[loud].max() <= 2
    eight = read_wav(wav((half * 127 + 128).astype(np.uint8)), PICTURE)
    assert np.abs(eight - half).max() < 0.02


def test_24_bits() -> None:
    file = io.BytesIO()
    values = (sine(440) * (2**23 - 1)).astype(np.int32)
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(3)
        out.setframerate(8000)
        out.writeframes(b"".join(int(v).to_bytes(3, "little", signed=True) for v in values))
    found = read_wav(file.getvalue(), PICTURE)
    np.testing.assert_allclose(found, values / 2**23, atol=1e-6)


@pytest.mark.parametrize("rate", [4000, 11_025, 16_000, 44_100])
def test_another_rate_is_resampled(rate: int) -> None:
    image = log_mel(read_wav(wav(sine(440, rate, 0.5), rate), PICTURE), PICTURE)[:, :, 0]
    same = log_mel(sine(440), PICTURE)[:, :, 0]
    assert image.shape == same.shape
    rows = image[:, 5:-5].mean(axis=1).argmax(), same[:, 5:-5].mean(axis=1).argmax()
    assert rows[0] == rows[1]


def header(rate: int = 8000, channels: int = 1, bits: int = 16, claim: int = 8) -> bytes:
    width = channels * bits // 8
    kind = struct.pack("<HHIIHH", 1, channels, rate, (rate * width) % 2**32, width % 2**16, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + kind + b"data" + struct.pack("<I", claim)
    return b"RIFF" + struct.pack("<I", len(body) + 8) + body


HOSTILE = {
    "empty": (b"", "the file is empty"),
    "zero length": (header(claim=0), "has no sample"),
    "text": (b"this is not a recording at all", "cannot be read as wav"),
    "cut off": (wav(sine(440).astype(np.float32))[:30], "cannot be read as wav"),
    "rate 0": (header(rate=0) + bytes(8), "claims 0 samples a second"),
    "rate of a prime": (header(rate=2_000_003) + bytes(8), "samples a second"),
    "no channel": (header(channels=0) + bytes(8), "cannot be read|claims"),
    "65535 channels": (header(channels=65_535) + bytes(8), "cannot be read|claims|no sample"),
    "7 bits": (header(bits=7) + bytes(8), "cannot be read"),
    "claims 4 GB": (header(claim=2**32 - 2) + bytes(2), "."),
    "not finite": (wav(np.array([0, np.nan, 1], np.float32)), "no finite"),
    "huge": (wav(np.array([0, 1e300, 1])), "no finite"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str) -> None:
    data, says = HOSTILE[name]
    if name == "claims 4 GB":  # what is there is taken, or it is refused; nothing is allocated
        with suppress(BadImage):
            assert len(read_wav(data, PICTURE)) <= 1
        return
    with pytest.raises(BadImage, match=says) as caught:
        read_wav(data, PICTURE, "a.wav")
    assert caught.value.where == "a.wav"


def test_any_bytes_are_read_or_refused() -> None:
    rng = np.random.default_rng(0)
    good = bytearray(wav((sine(440) * 3e4).astype(np.int16)))
    for _ in range(300):
        bad = bytearray(good[: rng.integers(1, len(good))] if rng.random() < 0.3 else good)
        for place in rng.integers(0, min(60, len(bad)), rng.integers(1, 4)):
            bad[place] = rng.integers(0, 256)
        with suppress(BadImage):
            assert np.isfinite(read_wav(bytes(bad), PICTURE)).all()


def test_from_many_threads() -> None:
    extra = wav(sine(440).astype(np.float32))
    odd = extra[:12] + b"junk" + struct.pack("<I", 4) + b"abcd" + extra[12:]  # SciPy warns of it
    wanted = read_wav(extra, PICTURE)
    found: list[bool] = []

    def work() -> None:
        found.extend(bool((read_wav(odd, PICTURE) == wanted).all()) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(found)


@pytest.fixture
def recordings(tmp_path: Path) -> Callable[..., Examples]:
    """Loads <digit>_<speaker>_<take>.wav, written once."""
    folder = tmp_path / "said"
    folder.mkdir()
    for digit in range(3):
        for speaker in ("ann", "bo"):
            (folder / f"{digit}_{speaker}_0.wav").write_bytes(wav(sine(300 + 200 * digit)))

    def load(**keys: Any) -> Examples:
        given = {"path": str(folder), "label_pattern": r"^(\d)_", "seconds": 0.2} | keys
        return load_sound(Data.model_validate({"source": "sound", **given}))

    return load


def test_who_says_what(recordings: Callable[..., Examples]) -> None:
    pattern = "_([a-z]+)_"
    examples = recordings(client_pattern=pattern, domain_pattern=pattern)
    assert examples.classes == ("0", "1", "2")
    assert examples.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert examples.client_names == examples.domain_names == ("ann", "bo")
    assert examples.images is not None
    assert examples.images.load(3).shape == (20, 20, 3)
    assert examples.images.where(3) == "1_bo_0.wav"
    assert examples.notes == ()


def test_settings_are_in_the_fingerprint(recordings: Callable[..., Examples]) -> None:
    seen = [
        recordings(),
        recordings(rate=16_000),
        recordings(seconds=0.3),
        recordings(mel_bands=30),
    ]
    assert len({examples.fingerprint for examples in seen}) == 4
    assert "30 bands x 20 frames" in seen[3].notes[0]
    assert seen[0].fingerprint == recordings(client_pattern="_(a|b)").fingerprint


def test_class_folders_and_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for domain in ("hall", "room"):
            for kind in ("no", "yes"):
                archive.writestr(f"all/{domain}/{kind}/1.WAV", wav(sine(440)))
    path = str(tmp_path / "a.zip")
    examples = load_sound(Data(source="sound", path=path, domains=True))
    assert examples.classes == ("no", "yes")
    assert examples.domain_names == ("hall", "room")
    with pytest.raises(InputError, match="no recording lies as <class>/<recording>"):
        load_sound(Data(source="sound", path=path))


def test_what_is_wrong_with_a_folder(recordings: Callable[..., Examples], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.label_pattern: finds no class in 2 of 6 paths"):
        recordings(label_pattern=r"^([01])_")
    with pytest.raises(InputError, match="only one class"):
        recordings(label_pattern=r"(wav)$")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no recording in it"):
        recordings(path=str(tmp_path / "empty"))
    (tmp_path / "said" / "2_cy_0.wav").symlink_to(tmp_path / "said" / "none.wav")
    with pytest.raises(BadFiles, match=r"2_cy_0\.wav"):
        recordings()
    assert "1 unreadable files were skipped" in recordings(on_bad_file="skip").notes


def test_the_real_ones(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("spoken_digits/recordings.zip")
    examples = load_sound(
        Data(source="sound", path=str(path), label_pattern=r"^(\d)_", client_pattern="_([a-z]+)_")
    )
    assert len(examples) == 1200
    assert examples.client_names == ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
    assert examples.images is not None
    pictures = [examples.images.load(i) for i in range(0, 1200, 100)]
    assert {picture.shape for picture in pictures} == {(100, 100, 3)}
    assert all(picture.max() == 255 for picture in pictures)

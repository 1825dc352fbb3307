"""The noise and the batches of DP-SGD: what they are, how they are spread, what they depend on."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from fedtl.clients import private_kernel
from fedtl.clients.private_kernel import fill_batch, fill_normals

oracle = SimpleNamespace(**run_path(str(Path(__file__).with_name("private_oracle.py"))))

DIGEST = "9cbc6c11eb0298a2"
"""Of some noise and a batch, on any machine."""
CODE = """
import hashlib, numpy as np
from fedtl.clients.private_kernel import fill_batch, fill_normals
noise, batch = np.empty(20006, np.float32), np.zeros(20000, np.int64)
fill_normals(np.uint64(2**64 - 59), 3, 1, noise)
fill_batch(np.uint64(77), 4, 5000, batch)
print(hashlib.blake2b(noise.tobytes() + batch.tobytes(), digest_size=8).hexdigest())
"""


def drawn(size: int, key: int = 5, step: int = 0, row: int = 0) -> np.ndarray:
    out = np.empty(size, np.float32)
    fill_normals(np.uint64(key), step, row, out)
    return out


@pytest.fixture(scope="module")
def many() -> np.ndarray:
    return drawn(8_000_000, key=11).astype(np.float64)


@pytest.mark.parametrize(("key", "step", "row"), [(0, 0, 0), (2**64 - 1, 7, 3), (12345, 1, 99)])
def test_normals_are_box_and_mullers(key: int, step: int, row: int) -> None:
    noise = drawn(300, key, step, row)
    pairs = [oracle.pair(oracle.number(key, step, row * 150 + j)) for j in range(150)]
    np.testing.assert_allclose(noise[:150], [first for first, _ in pairs], rtol=1e-6, atol=5e-7)
    np.testing.assert_allclose(noise[150:], [second for _, second in pairs], rtol=1e-6, atol=5e-7)


def test_extreme_numbers_have_finite_normals() -> None:
    from fedtl.clients.private_kernel import _minus_log

    def radius(chance: float) -> float:
        return float(np.sqrt(2 * _minus_log(np.float32(chance).view(np.int32))))

    assert radius(2.0**31) == 0.0
    assert radius(0.5) == pytest.approx(6.6604, abs=1e-4)  # the largest there is
    for chance in (0.5, 1.5, 1e3, 1.5e9, 2.0**30.5, 2.0**31 - 256):
        expected = np.sqrt(-2 * np.log(np.float64(np.float32(chance)) / 2**31))
        assert radius(chance) == pytest.approx(expected, rel=3e-7)


def test_moments_of_the_noise(many: np.ndarray) -> None:
    # Each is a standard normal itself; beyond 4.5 once in 150,000 keys, and the key is fixed.
    known = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}
    scaled = [
        (many**power - mean).sum() / np.sqrt(len(many) * variance)
        for power, (mean, variance) in known.items()
    ]
    assert np.abs(scaled).max() < 4.5


def test_distribution_of_the_noise(many: np.ndarray) -> None:
    assert stats.kstest(many[:1_000_000], "norm").pvalue > 1e-4
    assert stats.kstest(many[-1_000_000:], "norm").pvalue > 1e-4  # the other half of the pairs
    edges = stats.norm.ppf(np.arange(1, 256) / 256)
    counts = np.bincount(np.searchsorted(edges, many), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-4


def test_tails_of_the_noise(many: np.ndarray) -> None:
    for least in (2.0, 3.0, 4.0, 4.5):
        expected = stats.norm.sf(least) * len(many)
        for side in (many, -many):
            assert abs((side > least).sum() - expected) < 4.5 * np.sqrt(expected)
    assert np.abs(many).max() < 6.67


def test_noise_of_other_places_is_other_noise(many: np.ndarray) -> None:
    """Neighbours, pairs (their squares too), steps, classes and keys."""
    half = len(many) // 2
    first, second = many[:half], many[half:]
    size = 1_000_000
    other = [
        drawn(size, **place).astype(np.float64)
        for place in ({"key": 11, "step": 1}, {"key": 11, "row": 1}, {"key": 12}, {"key": 10})
    ]
    pairs = [(first, second), (many[:-1], many[1:]), (many[:-2], many[2:])]
    same = drawn(size, key=11).astype(np.float64)
    pairs += [(same, one) for one in other]
    for a, b in pairs:
        assert abs((a * b).sum()) < 4.5 * np.sqrt(len(a))
        assert abs(((a * a - 1) * (b * b - 1)).sum()) < 4.5 * 2 * np.sqrt(len(a))


def drawn_batch(key: int, step: int, size: int, num: int) -> list[int]:
    batch = np.empty(num, np.int64)
    return batch[: fill_batch(np.uint64(key), step, size, batch)].tolist()


def tossed_batch(key: int, step: int, size: int, num: int) -> list[int]:
    """By coins that are given, as a client's system gives them."""
    coins = np.random.default_rng([key, step]).integers(0, 2**32, num, dtype=np.uint32)
    batch = np.empty(num, np.int64)
    return batch[: private_kernel._toss(coins, size, batch)].tolist()


def test_batches_are_the_documented_ones() -> None:
    for key, step, size, num in (
        (0, 0, 5, 40),
        (2**64 - 1, 3, 1, 7),
        (9, 1, 60, 500),
        (9, 1, 4, 4),
    ):
        assert drawn_batch(key, step, size, num) == oracle.seeded_batch(key, step, size, num)
    coins = np.array([0, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    batch = np.empty(4, np.int64)
    assert [private_kernel._toss(coins, size, batch) for size in (1, 2, 3, 4)] == [1, 2, 3, 4]
    thirds = np.array([2**32 // 3 - 1, 2**32 // 3, 2**32 // 3 + 1], np.uint32)
    assert private_kernel._toss(thirds, 1, batch[:3]) == 1  # the rate is rounded down


@pytest.mark.parametrize("draw", [drawn_batch, tossed_batch])
@pytest.mark.parametrize(("size", "num"), [(1, 7), (50, 500), (499, 500), (3, 3)])
def test_rows_come_at_the_rate_and_one_by_one(
    draw: Callable[..., list[int]], size: int, num: int
) -> None:
    steps = 3000
    inside = np.zeros((steps, num), bool)
    for step in range(steps):
        inside[step, draw(3, step, size, num)] = True
    rate = size / num
    if rate == 1:
        assert inside.all()
        return
    variance = rate * (1 - rate)
    per_row = (inside.sum(axis=0) - steps * rate) ** 2 / (steps * variance)
    assert 1e-4 < stats.chi2.sf(per_row.sum(), num) < 1 - 1e-4
    lengths = inside.sum(axis=1)  # of independent coins: binomial, its variance too
    assert abs(lengths.mean() - size) < 4.5 * np.sqrt(num * variance / steps)
    spread = lengths.var() / (num * variance)
    assert abs(spread - 1) < 4.5 * np.sqrt((2 + 1 / (num * variance)) / steps)
    # Neighbouring rows, and the same row in neighbouring steps, know nothing of each other.
    centred = (inside - rate) / np.sqrt(variance)
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        assert abs((a * b).sum()) < 4.5 * np.sqrt(a.size)


def test_noise_and_batches_are_the_same_bits_on_any_processor(tmp_path: Path) -> None:
    narrow = {
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    run = subprocess.run(
        [sys.executable, "-c", CODE], env=os.environ | narrow, capture_output=True, check=True
    )
    here = {"drawn": ""}
    exec(CODE.replace("print(", "drawn = ("), here)
    assert run.stdout.decode().strip() == here["drawn"] == DIGEST


def test_a_change_of_the_plain_kernel_reaches_the_compiled_one() -> None:
    folder = Path(str(private_kernel.__file__)).parent
    names = ("batches.py", "kernel.py", "tiles.py")
    text = "".join((folder / name).read_text(encoding="utf-8") for name in names)
    assert hashlib.blake2b(text.encode(), digest_size=4).hexdigest() == private_kernel.BUILT_ON

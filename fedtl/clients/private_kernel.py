"""DP-SGD of a linear head for a block of clients in one fused pass.

Algorithm 1 of Abadi et al. 2016 (arXiv 1607.00133) with the per-example gradients in closed form:
that of cross-entropy at an example (x, y) is outer(p - y, (x, 1)), so its norm is
|p - y| sqrt(|x|^2 + 1), and shortening it is scaling one column of residuals. The matrix products
are those of the plain kernel, and so is the step; its bits depend on the client alone as well.

A step's batch is Poisson: each row is in it by a coin of its own, with probability B / n (of given
coins, rounded down to 2^-32). The sum of its shortened gradients gains noise and is divided by B,
whatever the batch's length; an empty batch is a step of noise alone. Momentum, weight decay, the
proximal term and corrections come after the noise, from what is public or was noised before.

Seeded noise is for simulation. It is a function of (key, step, class, coordinate), by Box and
Muller's transform of splitmix64 numbers. Nothing is drawn beyond 6.66 deviations (probability 3e-11
an entry), and whoever knows the key knows the noise.

Arithmetic is float32: a shortened gradient is within the clip to the last bit, but sums round, and
the low bits of a noised float can tell of what is below it (Mironov, "On significance of the least
significant bits for differential privacy", CCS 2012). The accounting is of real numbers.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from numba import njit

from fedtl.clients.batches import GAMMA, mix, stream_start
from fedtl.clients.kernel import (
    BLOCK,
    EVERYTHING_FINE,
    Work,
    backward,
    descend,
    exponentials,
    forward,
    give,
    out_of_range,
    place,
    take,
    workplace,
)
from fedtl.clients.tiles import LANES
from fedtl.types import Float32, Float64, Int32, Int64, UInt64

UInt32 = npt.NDArray[np.uint32]

BUILT_ON = "6a92ffba"
"""Digest of batches.py, kernel.py and tiles.py, as ``kernel.BUILT_ON``."""

_INSIDE = 1.0 - 2.0**-22  # three roundings to float32 follow: a shortened gradient stays inside
_HALF_ROOT = np.int32(0x3F3504F3)  # bits of sqrt(1/2)
_LN2 = np.float32(0.6931471805599453)
_QUARTER = np.float32(math.pi / 2 / 2**30)


@njit(nogil=True, cache=True, inline="always")
def _minus_log(bits: np.int32) -> np.float32:
    """-log of the float32 with these bits, over 2^31 (Cephes logf); normal numbers up to 2^31."""
    power = (bits - _HALF_ROOT) >> np.int32(23)
    part = np.int32(bits - (power << np.int32(23))).view(np.float32) - np.float32(1.0)
    series = np.float32(7.0376836292e-2)
    series = series * part - np.float32(1.1514610310e-1)
    series = series * part + np.float32(1.1676998740e-1)
    series = series * part - np.float32(1.2420140846e-1)
    series = series * part + np.float32(1.4249322787e-1)
    series = series * part - np.float32(1.6668057665e-1)
    series = series * part + np.float32(2.0000714765e-1)
    series = series * part - np.float32(2.4999993993e-1)
    series = series * part + np.float32(3.3333331174e-1)
    square = part * part
    log = series * part * square - np.float32(0.5) * square + part
    value = np.float32(np.int32(31) - power) * _LN2 - log
    return value if value > np.float32(0.0) else np.float32(0.0)


@njit(nogil=True, cache=True)
def fill_normals(key: np.uint64, step: int, row: int, out: Float32) -> None:
    """Write standard normals, two of each 64-bit number: one to either half of ``out``.

    Of a number, 31 bits are the radius, 30 the angle within a quarter circle, 2 which quarter.

    Args:
        key: the client's stream.
        step: of its local training, from 0.
        row: of the head (a class); rows and steps share nothing.
        out: [2 h], written.
    """
    half = len(out) // 2
    start = stream_start(key, step)
    first = np.uint64(row) * np.uint64(half) + np.uint64(1)
    for j in range(half):
        number = mix(start + (first + np.uint64(j)) * GAMMA)
        chance = np.float32(np.int32(number >> np.uint64(33))) + np.float32(0.5)
        radius = math.sqrt(np.float32(2.0) * _minus_log(np.float32(chance).view(np.int32)))
        low = np.int32(number & np.uint64(0xFFFFFFFF))
        angle = np.float32(low >> np.int32(2)) * _QUARTER
        square = angle * angle
        sine = np.float32(-1.9515295891e-4) * square + np.float32(8.3321608736e-3)
        sine = (sine * square - np.float32(1.6666654611e-1)) * square * angle + angle
        cosine = np.float32(2.443315711809948e-5) * square - np.float32(1.388731625493765e-3)
        cosine = (cosine * square + np.float32(4.166664568298827e-2)) * square * square
        cosine = cosine - np.float32(0.5) * square + np.float32(1.0)
        turned = np.uint32(np.float32(cosine).view(np.uint32) ^ (np.uint32(low) << np.uint32(31)))
        cosine = turned.view(np.float32)
        swap = low & np.int32(2)
        out[j] = radius * (sine if swap else cosine)
        out[half + j] = radius * (cosine if swap else sine)


@njit(nogil=True, cache=True)
def fill_batch(key: np.uint64, step: int, size: int, batch: Int64) -> int:
    """Write which of ``len(batch)`` rows a seeded step takes, in their order; returns how many.

    The gaps between independent coins are geometric: one number a row that is in the batch.
    """
    rest = math.log1p(-size / len(batch)) if size < len(batch) else -np.inf
    counter, row, num = stream_start(key, step), 0, 0
    while True:
        counter += GAMMA
        chance = (np.float64(mix(counter) >> np.uint64(11)) + 0.5) * 2.0**-53
        gap = math.log(chance) / rest
        if gap >= len(batch) - row:
            return num
        row += int(gap)
        batch[num] = row
        num, row = num + 1, row + 1


@njit(nogil=True, cache=True)
def _toss(coins: UInt32, size: int, batch: Int64) -> int:
    """The same by a 32-bit number for each row, its coin."""
    bar = (np.uint64(size) << np.uint64(32)) // np.uint64(len(coins))
    num = 0
    for row in range(len(coins)):
        batch[num] = row
        num += int(np.uint64(coins[row]) < bar)
    return num


@njit(nogil=True, cache=True)
def _length(row: Float32) -> float:
    """|(x, 1)| of a row of whole vectors; float64 holds the square of any float32.

    Sums stand side by side, as one chain of additions takes longer than all the rest of it.
    """
    a = b = c = d = e = f = g = h = 0.0
    for i in range(0, len(row), 8):
        a += np.float64(row[i]) * np.float64(row[i])
        b += np.float64(row[i + 1]) * np.float64(row[i + 1])
        c += np.float64(row[i + 2]) * np.float64(row[i + 2])
        d += np.float64(row[i + 3]) * np.float64(row[i + 3])
        e += np.float64(row[i + 4]) * np.float64(row[i + 4])
        f += np.float64(row[i + 5]) * np.float64(row[i + 5])
        g += np.float64(row[i + 6]) * np.float64(row[i + 6])
        h += np.float64(row[i + 7]) * np.float64(row[i + 7])
    return math.sqrt(1.0 + (((a + b) + (c + d)) + ((e + f) + (g + h))))


@njit(nogil=True, cache=True)
def _lengths(features: Float32, halves: npt.NDArray[np.uint16], rows: Int64, work: Work) -> Float64:
    """|(x, 1)| of each row, float64 [n]."""
    lengths = np.empty(len(rows), np.float64)
    for low in range(0, len(rows), BLOCK):
        part = rows[low : low + BLOCK]
        if len(work.packed) == 0:
            for s in range(len(part)):
                lengths[low + s] = _length(features[part[s]])
        else:
            place(features, halves, part, work)
            for s in range(len(part)):
                lengths[low + s] = _length(work.packed[s])
    return lengths


@njit(nogil=True, cache=True)
def _shorten(
    labels: Int32, chosen: Int64, lengths: Float64, clip: float, share: float, work: Work
) -> None:
    """Turn exponentials into residuals of shortened gradients, times ``share``.

    Args:
        chosen: rows of this piece of the batch.
        lengths: |(x, 1)| of each, float64.
        clip: longest gradient.
        share: 1 / B.
    """
    logits, total = work.logits, work.total
    squares, bound = np.zeros(BLOCK, np.float64), clip * _INSIDE
    for s in range(BLOCK):
        total[s] = np.float32(1.0) / total[s]
    for c in range(len(logits)):
        for s in range(BLOCK):
            logits[c, s] *= total[s]
    for s in range(len(chosen)):
        logits[labels[chosen[s]], s] -= np.float32(1.0)
    for c in range(len(logits)):
        for s in range(BLOCK):
            squares[s] += np.float64(logits[c, s]) * np.float64(logits[c, s])
    for s in range(len(chosen)):
        norm = math.sqrt(squares[s]) * lengths[s]
        if not norm < np.inf:  # of logits that overflowed: one row must not decide over the others
            total[s] = np.float32(0.0)
            for c in range(len(logits)):
                logits[c, s] = np.float32(0.0)
            continue
        total[s] = np.float32(share * (bound / norm) if norm > bound else share)
    for c in range(len(logits)):
        for s in range(BLOCK):
            logits[c, s] *= total[s]


@njit(nogil=True, cache=True)
def _add_noise(
    key: np.uint64, step: int, noise: Float32, at: int, deviation: np.float32, own: Float32,
    work: Work,
) -> None:  # fmt: skip
    """Add a step's noise to the gradient.

    That of ``noise[at]`` where there is any, else seeded; ``own`` is room for a class, even.
    """
    width, bias = noise.shape[2] - 1, work.num_vectors * LANES
    for c in range(len(work.grad)):
        if len(noise) == 0:
            fill_normals(key, step, c, own)
        normals, grad = noise[at, c] if len(noise) > 0 else own, work.grad[c]
        for d in range(width):
            grad[d] += deviation * normals[d]
        grad[bias] += deviation * normals[width]


@njit(nogil=True, cache=True)
def _train_client(
    features: Float32, halves: npt.NDArray[np.uint16], labels: Int32, rows: Int64,
    key: np.uint64, noise_key: np.uint64, coins: UInt32, noise: Float32, first: int, stop: int,
    batch_size: int, clip: float, deviation: float,
    rate: np.float32, momentum: np.float32, decay: np.float32, proximal: np.float32, work: Work,
) -> None:  # fmt: skip
    """Take steps ``first`` to ``stop`` of a client that has rows; at least one."""
    weight, start = work.weight.reshape(-1), work.start.reshape(-1)
    speed, grad = work.speed.reshape(-1), work.grad.reshape(-1)
    extra = work.extra.reshape(-1)
    size = min(batch_size, len(rows))
    share, spread = 1.0 / size, np.float32(deviation / size)
    lengths = _lengths(features, halves, rows, work)
    normals = np.empty((noise.shape[2] + 1) // 2 * 2, np.float32)
    batch, later = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    num_later = 0
    for step in range(first - 1, stop):
        batch, later, num, num_later = later, batch, num_later, 0
        if step + 1 < stop:  # one batch ahead: its rows are fetched meanwhile
            if len(coins) > 0:
                num_later = _toss(coins[step + 1 - first], size, later)
            else:
                num_later = fill_batch(key, step + 1, size, later)
        if step < first:
            continue
        for begin in range(0, num, BLOCK):
            end = min(begin + BLOCK, num)
            chosen = rows[batch[begin:end]]
            place(features, halves, chosen, work)
            forward(len(chosen), work)
            exponentials(work.logits, work.top, work.total)
            _shorten(labels, chosen, lengths[batch[begin:end]], clip, share, work)
            following = batch[end:num] if end < num else later[:num_later]
            for s in range(min(len(following), BLOCK)):
                row = rows[following[s]]
                work.upcoming[s] = features.ctypes.data + row * features.shape[1] * 4
            backward(len(chosen), work)
        if deviation > 0.0:
            _add_noise(noise_key, step, noise, step - first, spread, normals, work)
        descend(weight, start, speed, grad, extra, rate, momentum, decay, proximal)


@njit(nogil=True, cache=True)
def train_private_block(
    features: Float32, halves: npt.NDArray[np.uint16], labels: Int32,
    index: Int64, starts: Int64, stops: Int64, weights: Float32, biases: Float32,
    extra_weights: Float32, extra_biases: Float32,
    keys: UInt64, noise_keys: UInt64, coins: UInt32, noise: Float32, first: int, steps: Int64,
    batch_size: int, clip: float, deviation: float,
    rate: np.float32, momentum: np.float32, decay: np.float32, proximal: np.float32,
    out_weights: Float32, out_biases: Float32, speed_weights: Float32, speed_biases: Float32,
) -> int:  # fmt: skip
    """Take some steps of DP-SGD with each client, one client after another.

    Args:
        features, halves, labels, index, starts, stops: as for kernel.train_block.
        weights, biases: [1, C, D] and [1, C], what the proximal term pulls to.
        extra_weights, extra_biases: as for kernel.train_block.
        keys, noise_keys: [k], of batches and noise, where these are not given.
        coins: 32-bit numbers [s, n] of one client's next s steps, or [0, n].
        noise: standard normals [s, C, D + 1] of one client's next s steps, or [0, C, D + 1].
        first: the first step to be taken.
        steps: [k], the step before which each client stops.
        batch_size: B; of fewer rows all are in every batch.
        clip: longest gradient of an example.
        deviation: of the noise in a step's sum; 0 for none.
        rate, momentum, decay, proximal: as LocalTraining.
        out_weights, out_biases: [k, C, D] and [k, C], the clients' heads, stepped on.
        speed_weights, speed_biases: their momentum, stepped on.

    Returns:
        EVERYTHING_FINE, or the first client whose rows or labels are out of range.
    """
    num_classes, width = weights.shape[1:]
    work = workplace(num_classes, width, len(halves) > 0, len(extra_biases) > 0)
    take(weights[0], biases[0], work.start, work.num_vectors)
    for i in range(len(starts)):
        rows = index[starts[i] : stops[i]]
        if out_of_range(rows, labels, num_classes):
            return i
        if len(rows) == 0 or steps[i] <= first:
            continue
        take(out_weights[i], out_biases[i], work.weight, work.num_vectors)
        take(speed_weights[i], speed_biases[i], work.speed, work.num_vectors)
        if len(extra_biases) > 0:
            take(extra_weights[i], extra_biases[i], work.extra, work.num_vectors)
        _train_client(
            features, halves, labels, rows, keys[i], noise_keys[i], coins, noise, first, steps[i],
            batch_size, clip, deviation, rate, momentum, decay, proximal, work,
        )  # fmt: skip
        give(work.weight, work.num_vectors, out_weights[i], out_biases[i])
        give(work.speed, work.num_vectors, speed_weights[i], speed_biases[i])
    return EVERYTHING_FINE

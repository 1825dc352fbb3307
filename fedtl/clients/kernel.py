"""Softmax regression for a block of clients in one fused pass: forward, softmax, gradient, step.

Each client is trained or judged by itself, in its own order, into its own row of the results; its
bits depend on its key, its rows and its start alone. No floating-point rule is relaxed: what is
NaN or infinite stays so, to be refused by whoever validates the updates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from fedtl.clients.batches import fill_order
from fedtl.clients.tiles import CLASSES, LANES, SAMPLES, VECTORS, gradient, scores
from fedtl.types import Float32, Float64, Int32, Int64, UInt64

BUILT_ON = "a809674f"
"""Digest of batches.py and tiles.py. Numba's cache on disk looks at this file alone and would go on
using what it compiled from their older text; a test says what to write here."""
BLOCK = 64
"""Samples whose scores are held at once; longer batches go through in pieces of this size. A piece
of 64 rows stays in a core's second-level cache up to about 4,000 features."""
EVERYTHING_FINE = -1

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer in the low bits
_ROUND_BITS = np.int32(0x4B400000)
_SMALLEST = np.float32(-87.0)  # exp of it is still a normal float32
_HALF_SCALE = np.float32(2.0**112)  # between the exponents of float16 and float32


class Work(NamedTuple):
    """One call's own memory, small enough for a core's caches.

    Attributes:
        weight: the head, float32 [C, stride]: D features, zeros up to whole vectors, then the bias
            and zeros. ``grad``, ``speed`` (momentum) and ``start`` have the same form.
        extra: of that form too, what every gradient gains; [0, stride] for nothing.
        logits: [C, BLOCK] scores, later residuals.
        top, total: [BLOCK] largest score of a sample and its sum of exponentials.
        table, upcoming: [BLOCK] addresses of this piece's rows and of the next piece's.
        packed: [BLOCK, stride] copied rows, [0, stride] where rows are read where they lie.
        num_vectors: vectors in a row.
    """

    weight: Float32
    start: Float32
    speed: Float32
    grad: Float32
    extra: Float32
    logits: Float32
    top: Float32
    total: Float32
    table: Int64
    upcoming: Int64
    packed: Float32
    num_vectors: int


@njit(nogil=True, cache=True)
def _aligned(rows: int, columns: int) -> Float32:
    """Zeros [rows, columns] from a cache line's start (vectors across two lines cost double)."""
    size = rows * columns
    memory = np.zeros(size + 16, dtype=np.float32)
    start = (-memory.ctypes.data % 64) // 4
    return memory[start : start + size].reshape(rows, columns)


@njit(nogil=True, cache=True)
def workplace(num_classes: int, width: int, copies: bool, corrected: bool) -> Work:
    """Zeros; ``copies`` has room for rows that are copied, ``corrected`` for ``extra``."""
    num_vectors = (width + LANES - 1) // LANES
    # 16 floats hold the bias, and keep rows from lying 2 KB or 4 KB apart, in the same cache sets.
    stride = num_vectors * LANES + 16
    return Work(
        _aligned(num_classes, stride),
        _aligned(num_classes, stride),
        _aligned(num_classes, stride),
        _aligned(num_classes, stride),
        _aligned(num_classes if corrected else 0, stride),
        _aligned(num_classes, BLOCK),
        np.zeros(BLOCK, np.float32),
        np.zeros(BLOCK, np.float32),
        np.zeros(BLOCK, np.int64),
        np.zeros(BLOCK, np.int64),
        _aligned(BLOCK if copies or width % LANES else 0, stride),
        num_vectors,
    )


@njit(nogil=True, cache=True, inline="always")
def _exp(x: np.float32) -> np.float32:
    """exp(x) for x <= 0 within 2 units in the last place (Cephes expf); NaN stays NaN."""
    if x < _SMALLEST:
        x = _SMALLEST
    shifted = x * _LOG2_E + _ROUND
    power = shifted - _ROUND
    rest = x - power * _LN2_HIGH - power * _LN2_LOW
    series = np.float32(1.9875691500e-4)
    series = series * rest + np.float32(1.3981999507e-3)
    series = series * rest + np.float32(8.3334519073e-3)
    series = series * rest + np.float32(4.1665795894e-2)
    series = series * rest + np.float32(1.6666665459e-1)
    series = series * rest + np.float32(5.0000001201e-1)
    series = series * rest * rest + rest + np.float32(1.0)
    bits = (np.float32(shifted).view(np.int32) - _ROUND_BITS + np.int32(127)) << np.int32(23)
    return series * np.int32(bits).view(np.float32)


@njit(nogil=True, cache=True, inline="always")
def _widen(half: np.uint16) -> np.float32:
    """The float32 equal to a float16 given by its bits (Numba has no float16 on the CPU)."""
    bits = np.uint32(half)
    number = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * _HALF_SCALE
    if bits & np.uint32(0x7C00) == np.uint32(0x7C00):  # infinite or NaN
        number = np.uint32((bits << np.uint32(13)) | np.uint32(0x7F800000)).view(np.float32)
    return -abs(number) if bits & np.uint32(0x8000) else number


@njit(nogil=True, cache=True)
def place(features: Float32, halves: npt.NDArray[np.uint16], rows: Int64, work: Work) -> None:
    """Note where each row lies. Half-width rows, and rows of no whole vectors, are copied."""
    width = features.shape[1]
    for s in range(len(rows)):
        if len(work.packed) == 0:
            work.table[s] = features.ctypes.data + rows[s] * width * 4
            continue
        work.table[s] = work.packed.ctypes.data + s * work.packed.shape[1] * 4
        if len(halves):
            for d in range(width):
                work.packed[s, d] = _widen(halves[rows[s], d])
        else:
            for d in range(width):
                work.packed[s, d] = features[rows[s], d]


@njit(nogil=True, cache=True)
def forward(num: int, work: Work) -> None:
    """Write logits[c, s] of ``num`` samples; the rest of a line is unspecified."""
    num_classes, logits = len(work.weight), work.logits
    for c in range(0, num_classes, CLASSES):
        classes = min(CLASSES, num_classes - c)
        s = 0
        while s < num:
            samples = SAMPLES if num - s >= SAMPLES else 1
            scores(work.table, work.weight, logits, s, c, work.num_vectors, samples, classes)
            s += samples
    for c in range(num_classes):
        bias = work.weight[c, work.num_vectors * LANES]
        for s in range(BLOCK):
            logits[c, s] += bias


@njit(nogil=True, cache=True)
def backward(num: int, work: Work) -> None:
    """Add the gradient of ``num`` samples whose residuals stand in ``logits``."""
    num_classes = len(work.grad)
    v = 0
    while v < work.num_vectors:
        vectors = VECTORS if work.num_vectors - v >= VECTORS else 1
        for c in range(0, num_classes, CLASSES):
            classes = min(CLASSES, num_classes - c)
            gradient(
                work.table, work.upcoming, work.logits, work.grad,
                v * LANES, c, num, vectors, classes,
            )  # fmt: skip
        v += vectors
    for c in range(num_classes):
        for s in range(num):
            work.grad[c, work.num_vectors * LANES] += work.logits[c, s]


@njit(nogil=True, cache=True)
def exponentials(logits: Float32, top: Float32, total: Float32) -> None:
    """Turn logits[c, s] into exp(logit - top[s]); ``total`` becomes their sum per sample."""
    for s in range(BLOCK):
        top[s] = logits[0, s]
        total[s] = 0.0
    for c in range(1, len(logits)):
        for s in range(BLOCK):
            top[s] = logits[c, s] if logits[c, s] > top[s] else top[s]
    for c in range(len(logits)):
        for s in range(BLOCK):
            value = _exp(logits[c, s] - top[s])
            logits[c, s] = value
            total[s] += value


@njit(nogil=True, cache=True)
def _losses(labels: Int32, chosen: Int64, work: Work) -> float:
    """Turn logits into exponentials and return the summed cross-entropy."""
    loss = 0.0
    for s in range(len(chosen)):
        loss -= work.logits[labels[chosen[s]], s]
    exponentials(work.logits, work.top, work.total)
    for s in range(len(chosen)):
        loss += np.log(np.float64(work.total[s])) + work.top[s]
    return loss


@njit(nogil=True, cache=True)
def _residuals(labels: Int32, chosen: Int64, share: np.float32, work: Work) -> None:
    """Turn exponentials into share * (probability - truth)."""
    logits, total = work.logits, work.total
    for s in range(BLOCK):
        total[s] = share / total[s]
    for c in range(len(logits)):
        for s in range(BLOCK):
            logits[c, s] *= total[s]
    for s in range(len(chosen)):
        logits[labels[chosen[s]], s] -= share


@njit(nogil=True, cache=True)
def descend(
    weight: Float32, start: Float32, speed: Float32, grad: Float32, extra: Float32,
    rate: np.float32, momentum: np.float32, decay: np.float32, proximal: np.float32,
) -> None:  # fmt: skip
    """One step of torch.optim.SGD on flat arrays, and the gradient set back to zero."""
    for i in range(len(extra)):
        grad[i] += extra[i]
    if momentum == 0.0 and decay == 0.0 and proximal == 0.0:
        for i in range(len(weight)):
            weight[i] -= rate * grad[i]
            grad[i] = 0.0
        return
    for i in range(len(weight)):
        step = grad[i] + decay * weight[i] + proximal * (weight[i] - start[i])
        step += momentum * speed[i]
        speed[i] = step
        weight[i] -= rate * step
        grad[i] = 0.0


@njit(nogil=True, cache=True)
def out_of_range(rows: Int64, labels: Int32, num_classes: int) -> bool:
    """Whether a row, or its label, is none."""
    for row in rows:
        if row < 0 or row >= len(labels) or labels[row] < 0 or labels[row] >= num_classes:
            return True
    return False


@njit(nogil=True, cache=True)
def take(weight: Float32, bias: Float32, own: Float32, num_vectors: int) -> None:
    """Take over a head [C, D] and [C]; written as loops, which compile in a tenth of the time."""
    for c in range(len(bias)):
        for d in range(weight.shape[1]):
            own[c, d] = weight[c, d]
        own[c, num_vectors * LANES] = bias[c]


@njit(nogil=True, cache=True)
def give(own: Float32, num_vectors: int, weight: Float32, bias: Float32) -> None:
    """Write a head out to [C, D] and [C]."""
    for c in range(len(bias)):
        for d in range(weight.shape[1]):
            weight[c, d] = own[c, d]
        bias[c] = own[c, num_vectors * LANES]


@njit(nogil=True, cache=True)
def _train_client(
    features: Float32, halves: npt.NDArray[np.uint16], labels: Int32, rows: Int64, key: np.uint64,
    epochs: int, batch_size: int,
    rate: np.float32, momentum: np.float32, decay: np.float32, proximal: np.float32, work: Work,
) -> float:  # fmt: skip
    """Train ``work.weight`` on one client's rows; returns the first epoch's summed loss."""
    weight, start = work.weight.reshape(-1), work.start.reshape(-1)
    speed, grad = work.speed.reshape(-1), work.grad.reshape(-1)
    extra = work.extra.reshape(-1)
    for j in range(len(weight)):
        start[j], speed[j], grad[j] = weight[j], 0.0, 0.0
    order, later = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
    loss = 0.0
    fill_order(key, 0, later)
    for epoch in range(epochs):
        order, later = later, order
        fill_order(key, epoch + 1, later)
        for low in range(0, len(rows), batch_size):
            high = min(low + batch_size, len(rows))
            share = np.float32(1.0 / (high - low))
            for begin in range(low, high, BLOCK):
                end = min(begin + BLOCK, high)
                chosen = rows[order[begin:end]]
                place(features, halves, chosen, work)
                forward(len(chosen), work)
                if epoch == 0:
                    loss += _losses(labels, chosen, work)
                else:
                    exponentials(work.logits, work.top, work.total)
                _residuals(labels, chosen, share, work)
                following = order[end : end + BLOCK] if end < len(rows) else later[:BLOCK]
                for s in range(len(following)):
                    work.upcoming[s] = features.ctypes.data + (
                        rows[following[s]] * features.shape[1] * 4
                    )
                backward(len(chosen), work)
            descend(weight, start, speed, grad, extra, rate, momentum, decay, proximal)
    return loss


@njit(nogil=True, cache=True)
def train_block(
    features: Float32, halves: npt.NDArray[np.uint16], labels: Int32,
    index: Int64, starts: Int64, stops: Int64, weights: Float32, biases: Float32,
    extra_weights: Float32, extra_biases: Float32,
    keys: UInt64, epochs: int, batch_size: int,
    rate: np.float32, momentum: np.float32, decay: np.float32, proximal: np.float32,
    out_weights: Float32, out_biases: Float32, out_loss: Float64,
) -> int:  # fmt: skip
    """Train clients one after another by mini-batch SGD on mean cross-entropy.

    Args:
        features: [N, D], contiguous; [0, D] where ``halves`` are given.
        halves: bits of a float16 matrix [N, D], or [0, D].
        labels: [N].
        index: rows of the clients; client i has ``index[starts[i]:stops[i]]``.
        starts, stops: [k].
        weights, biases: [k or 1, C, D] and [k or 1, C], where each client starts.
        extra_weights, extra_biases: [k or 0, C, D] and [k or 0, C], added to every gradient.
        keys: [k], batch order.
        epochs, batch_size, rate, momentum, decay, proximal: as LocalTraining.
        out_weights, out_biases: [k, C, D] and [k, C], written.
        out_loss: [k], mean loss over the first epoch, NaN without examples, written.

    Returns:
        EVERYTHING_FINE, or the first client whose rows or labels are out of range.
    """
    num_classes, width = weights.shape[1:]
    work = workplace(num_classes, width, len(halves) > 0, len(extra_biases) > 0)
    for i in range(len(starts)):
        rows = index[starts[i] : stops[i]]
        if out_of_range(rows, labels, num_classes):
            return i
        first = i if len(weights) > 1 else 0
        take(weights[first], biases[first], work.weight, work.num_vectors)
        if len(extra_biases) > 0:
            take(extra_weights[i], extra_biases[i], work.extra, work.num_vectors)
        loss = _train_client(
            features, halves, labels, rows, keys[i],
            epochs, batch_size, rate, momentum, decay, proximal, work,
        )  # fmt: skip
        give(work.weight, work.num_vectors, out_weights[i], out_biases[i])
        out_loss[i] = loss / len(rows) if len(rows) > 0 and epochs > 0 else np.nan
    return EVERYTHING_FINE


@njit(nogil=True, cache=True)
def evaluate_block(
    features: Float32, halves: npt.NDArray[np.uint16], labels: Int32,
    index: Int64, starts: Int64, stops: Int64, weights: Float32, biases: Float32,
    loss_sum: Float64, correct: Int64, count: Int64, right: npt.NDArray[np.bool_],
) -> int:  # fmt: skip
    """Judge head i (or the only head) on rows ``index[starts[i]:stops[i]]``.

    Args:
        features, halves, labels, index, starts, stops, weights, biases: as for train_block.
        loss_sum: [k], summed cross-entropy, written.
        correct, count: [k, C], right predictions and examples by true class, added to.
        right: which rows head i has right, head after head, written; [0] where nobody asks.

    Returns:
        EVERYTHING_FINE, or the first i whose rows or labels are out of range.
    """
    num_classes, width = weights.shape[1:]
    work = workplace(num_classes, width, len(halves) > 0, False)
    judged = 0
    for i in range(len(starts)):
        if out_of_range(index[starts[i] : stops[i]], labels, num_classes):
            return i
        if i == 0 or len(weights) > 1:
            take(weights[i], biases[i], work.weight, work.num_vectors)
        loss = 0.0
        for begin in range(starts[i], stops[i], BLOCK):
            chosen = index[begin : min(begin + BLOCK, stops[i])]
            place(features, halves, chosen, work)
            forward(len(chosen), work)
            for s in range(len(chosen)):
                label, best = labels[chosen[s]], 0
                for c in range(1, num_classes):
                    if work.logits[c, s] > work.logits[best, s]:
                        best = c
                count[i, label] += 1
                correct[i, label] += best == label
                if len(right) > 0:
                    right[judged + s] = best == label
            judged += len(chosen)
            loss += _losses(labels, chosen, work)
        loss_sum[i] = loss
    return EVERYTHING_FINE

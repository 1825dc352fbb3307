"""Softmax regression for a block of clients in one fused pass: forward, softmax, gradient, step.

Each client is trained or judged by itself, in its own order, into its own row of the results; its
bits depend on its key, its rows and its start alone. No floating-point rule is relaxed: what is
NaN or infinite stays so, to be refused by whoever validates the updates.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from fedtl.clients.batches import fill_order
from fedtl.clients.tiles import CLASSES, LANES, SAMPLES, VECTORS, gradient, scores
from fedtl.types import Float32, Float64, Int32, Int64, UInt64

BLOCK = 64
"""Samples whose scores are held at once; longer batches go through in pieces of this size. A block
of 64 rows stays in a core's second-level cache up to about 4,000 features."""
EVERYTHING_FINE = -1

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer in the low bits
_ROUND_BITS = np.int32(0x4B400000)
_SMALLEST = np.float32(-87.0)  # exp of it is still a normal float32


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


@njit(nogil=True, cache=True)
def _aligned(rows: int, columns: int) -> Float32:
    """Zeros [rows, columns] from a cache line's start (vectors across two lines cost double)."""
    size = rows * columns
    memory = np.zeros(size + 16, dtype=np.float32)
    start = (-memory.ctypes.data % 64) // 4
    return memory[start : start + size].reshape(rows, columns)


@njit(nogil=True, cache=True)
def _place(features: Float32, rows: Int64, packed: Float32, table: Int64) -> None:
    """Fill ``table`` with where each row lies; rows of no whole vectors are copied and padded."""
    width = features.shape[1]
    for s in range(len(rows)):
        if packed.shape[0]:
            for d in range(width):
                packed[s, d] = features[rows[s], d]
            table[s] = packed.ctypes.data + s * packed.shape[1] * 4
        else:
            table[s] = features.ctypes.data + rows[s] * width * 4


@njit(nogil=True, cache=True)
def _forward(
    table: Int64, num: int, weight: Float32, bias: Float32, logits: Float32, length: int
) -> None:
    """logits[c, s] of ``num`` samples."""
    num_classes = len(bias)
    for c in range(0, num_classes, CLASSES):
        classes = min(CLASSES, num_classes - c)
        s = 0
        while s < num:
            samples = SAMPLES if num - s >= SAMPLES else 1
            scores(table, weight, logits, s, c, length, samples, classes)
            s += samples
    for c in range(num_classes):
        for s in range(BLOCK):
            logits[c, s] += bias[c]


@njit(nogil=True, cache=True)
def _backward(
    table: Int64, upcoming: Int64, num: int,
    residual: Float32, grad: Float32, grad_bias: Float32, length: int,
) -> None:  # fmt: skip
    """Add the gradient of ``num`` samples."""
    num_classes = len(grad_bias)
    v = 0
    while v < length:
        vectors = VECTORS if length - v >= VECTORS else 1
        for c in range(0, num_classes, CLASSES):
            classes = min(CLASSES, num_classes - c)
            gradient(table, upcoming, residual, grad, v * LANES, c, num, vectors, classes)
        v += vectors
    for c in range(num_classes):
        for s in range(num):
            grad_bias[c] += residual[c, s]


@njit(nogil=True, cache=True)
def _exponentials(logits: Float32, num_classes: int, top: Float32, total: Float32) -> None:
    """Turn logits[c, s] into exp(logit - top[s]); ``total`` becomes their sum per sample."""
    for s in range(BLOCK):
        top[s] = logits[0, s]
        total[s] = 0.0
    for c in range(1, num_classes):
        for s in range(BLOCK):
            top[s] = logits[c, s] if logits[c, s] > top[s] else top[s]
    for c in range(num_classes):
        for s in range(BLOCK):
            value = _exp(logits[c, s] - top[s])
            logits[c, s] = value
            total[s] += value


@njit(nogil=True, cache=True)
def _descend(
    weight: Float32, start: Float32, speed: Float32, grad: Float32,
    rate: np.float32, momentum: np.float32, decay: np.float32, proximal: np.float32,
) -> None:  # fmt: skip
    """One step of torch.optim.SGD on flat arrays, and the gradient set back to zero."""
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
def _out_of_range(index: Int64, labels: Int32, num_rows: int, num_classes: int) -> bool:
    for row in index:
        if row < 0 or row >= num_rows or labels[row] < 0 or labels[row] >= num_classes:
            return True
    return False


@njit(nogil=True, cache=True)
def train_block(
    features: Float32, labels: Int32, index: Int64, starts: Int64, stops: Int64, keys: UInt64,
    weights: Float32, biases: Float32, epochs: int, batch_size: int,
    rate: np.float32, momentum: np.float32, decay: np.float32, proximal: np.float32,
    out_weights: Float32, out_biases: Float32, out_loss: Float64,
) -> int:  # fmt: skip
    """Train clients one after another by mini-batch SGD on mean cross-entropy.

    Args:
        features: [N, D], contiguous.
        labels: [N].
        index: rows of the clients; client i has ``index[starts[i]:stops[i]]``.
        starts, stops: [k].
        keys: [k], batch order.
        weights, biases: [k or 1, C, D] and [k or 1, C], where each client starts.
        epochs, batch_size, rate, momentum, decay, proximal: as LocalTraining.
        out_weights, out_biases: [k, C, D] and [k, C], written.
        out_loss: [k], mean loss over the first epoch, NaN without examples, written.

    Returns:
        EVERYTHING_FINE, or the first client whose rows or labels are out of range.
    """
    num_classes, width = weights.shape[1:]
    length = (width + LANES - 1) // LANES
    # Whole rows in 2 KB or 4 KB steps would fall into the same cache sets: one line more apart.
    stride = length * LANES + 16
    weight, start = _aligned(num_classes, stride), _aligned(num_classes, stride)
    speed, grad = _aligned(num_classes, stride), _aligned(num_classes, stride)
    bias, start_bias = np.zeros(num_classes, np.float32), np.zeros(num_classes, np.float32)
    speed_bias, grad_bias = np.zeros(num_classes, np.float32), np.zeros(num_classes, np.float32)
    logits = _aligned(num_classes, BLOCK)
    top, total = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    table, upcoming = np.zeros(BLOCK, np.int64), np.zeros(BLOCK, np.int64)
    packed = _aligned(0 if width % LANES == 0 else BLOCK, stride)
    for i in range(len(starts)):
        rows = index[starts[i] : stops[i]]
        if _out_of_range(rows, labels, len(features), num_classes):
            return i
        first = i if len(weights) > 1 else 0
        weight[:, :width] = weights[first]
        bias[:] = biases[first]
        start[:], start_bias[:], speed[:], speed_bias[:] = weight, bias, 0.0, 0.0
        order, later = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        loss = 0.0
        fill_order(keys[i], 0, later)
        for epoch in range(epochs):
            order, later = later, order
            fill_order(keys[i], epoch + 1, later)
            for low in range(0, len(rows), batch_size):
                high = min(low + batch_size, len(rows))
                share = np.float32(1.0 / (high - low))
                for s0 in range(low, high, BLOCK):
                    chosen = rows[order[s0 : min(s0 + BLOCK, high)]]
                    num = len(chosen)
                    _place(features, chosen, packed, table)
                    _forward(table, num, weight, bias, logits, length)
                    if epoch == 0:
                        own = np.empty(num, np.float32)
                        for s in range(num):
                            own[s] = logits[labels[chosen[s]], s]
                    _exponentials(logits, num_classes, top, total)
                    if epoch == 0:
                        for s in range(num):
                            loss += np.log(np.float64(total[s])) - np.float64(own[s] - top[s])
                    for s in range(BLOCK):
                        total[s] = share / total[s]
                    for c in range(num_classes):
                        for s in range(BLOCK):
                            logits[c, s] *= total[s]
                    for s in range(num):
                        logits[labels[chosen[s]], s] -= share
                    after = s0 + BLOCK if s0 + BLOCK < high else high
                    nextup = order[after:after+BLOCK] if after < len(rows) else later[:BLOCK]
                    for s in range(min(len(nextup), batch_size)):
                        upcoming[s] = features.ctypes.data + rows[nextup[s]] * width * 4
                    _backward(table, upcoming, num, logits, grad, grad_bias, length)
                _descend(weight.reshape(-1), start.reshape(-1), speed.reshape(-1),
                         grad.reshape(-1), rate, momentum, decay, proximal)  # fmt: skip
                _descend(bias, start_bias, speed_bias, grad_bias, rate, momentum, decay, proximal)
        out_weights[i] = weight[:, :width]
        out_biases[i] = bias
        out_loss[i] = loss / len(rows) if len(rows) and epochs else np.nan
    return EVERYTHING_FINE


@njit(nogil=True, cache=True)
def evaluate_block(
    features: Float32, labels: Int32, index: Int64, starts: Int64, stops: Int64,
    weights: Float32, biases: Float32, loss_sum: Float64, correct: Int64, count: Int64,
) -> int:  # fmt: skip
    """Judge head i (or the only head) on rows ``index[starts[i]:stops[i]]``.

    Args:
        features, labels, index, starts, stops, weights, biases: as for train_block.
        loss_sum: [k], summed cross-entropy, written.
        correct, count: [k, C], right predictions and examples by true class, added to.

    Returns:
        EVERYTHING_FINE, or the first i whose rows or labels are out of range.
    """
    num_classes, width = weights.shape[1:]
    length = (width + LANES - 1) // LANES
    weight = _aligned(num_classes, length * LANES + 16)
    logits = _aligned(num_classes, BLOCK)
    top, total = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    table = np.zeros(BLOCK, np.int64)
    packed = _aligned(0 if width % LANES == 0 else BLOCK, length * LANES + 16)
    for i in range(len(starts)):
        if _out_of_range(index[starts[i] : stops[i]], labels, len(features), num_classes):
            return i
        head = i if len(weights) > 1 else 0
        if i == 0 or len(weights) > 1:
            weight[:, :width] = weights[head]
        loss = 0.0
        for s0 in range(starts[i], stops[i], BLOCK):
            chosen = index[s0 : min(s0 + BLOCK, stops[i])]
            _place(features, chosen, packed, table)
            _forward(table, len(chosen), weight, biases[head], logits, length)
            for s in range(len(chosen)):
                label, best = labels[chosen[s]], 0
                for c in range(1, num_classes):
                    if logits[c, s] > logits[best, s]:
                        best = c
                count[i, label] += 1
                correct[i, label] += best == label
                loss -= logits[label, s]
            _exponentials(logits, num_classes, top, total)
            for s in range(len(chosen)):
                loss += np.log(np.float64(total[s])) + top[s]
        loss_sum[i] = loss
    return EVERYTHING_FINE

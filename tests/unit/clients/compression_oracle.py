"""The slow obvious version of compression: one entry after another, in the words of the papers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedtl.plans import Compression, RoundPlan
from fedtl.types import Float32, Head, Int64, LocalTraining

Tensors = Mapping[str, np.ndarray]


def plan_for(clients: Int64, compression: Compression | None, round: int = 1) -> RoundPlan:
    keys = np.arange(len(clients), dtype=np.uint64)
    return RoundPlan(round, clients, keys, LocalTraining(1, 8, 0.1), compression=compression)


def flat(tensors: Head) -> Float32:
    """A head's tensors one after another, in the order of their names."""
    return np.array([x for name in sorted(tensors) for x in tensors[name].ravel()], np.float32)


def pack(delta: Float32, head: Head, asked: Compression) -> dict[str, list]:
    """What one client sends for an update [P]."""
    if asked.kind == "top_k":
        count = max(1, math.ceil(asked.fraction * len(delta)))
        ranked = sorted(range(len(delta)), key=lambda i: (-abs(float(delta[i])), i))
        places = sorted(ranked[:count])
        return {"top_k.places": places, "top_k.values": [delta[i] for i in places]}
    values, scales, bits, start = [], [], "", 0
    for name in sorted(head):
        part = [float(x) for x in delta[start : start + head[name].size]]
        start += len(part)
        if asked.kind == "sign":
            scales.append(np.float32(math.fsum(abs(x) for x in part) / len(part)))
            bits += "".join("1" if x >= 0 else "0" for x in part)
            continue
        scale = np.float32(max(abs(x) for x in part)) / np.float32(127)
        scales.append(scale)
        values += [round(float(np.float32(x) / scale)) if scale > 0 else 0 for x in part]
    if asked.kind == "int8":
        return {"int8.values": [min(127, max(-127, v)) for v in values], "int8.scales": scales}
    bits += "0" * (-len(bits) % 8)
    packed = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    return {"sign.bits": packed, "sign.scales": scales}


def unpack(packed: Tensors, head: Head) -> Float32:
    """c(v) [P] of what one client sent."""
    size = sum(tensor.size for tensor in head.values())
    owner = [i for i, name in enumerate(sorted(head)) for _ in range(head[name].size)]
    sent = np.zeros(size, np.float32)
    for i in range(size):
        if "top_k.places" in packed:
            places = list(packed["top_k.places"])
            sent[i] = packed["top_k.values"][places.index(i)] if i in places else 0
        elif "int8.values" in packed:
            sent[i] = np.float32(packed["int8.values"][i]) * packed["int8.scales"][owner[i]]
        else:
            bit = int(packed["sign.bits"][i // 8]) >> (7 - i % 8) & 1
            sent[i] = packed["sign.scales"][owner[i]] * np.float32(1 if bit else -1)
    return sent

"""Low-rank factors as plain arrays: their names, where they start, and what they stand for.

A layer's weight W, seen as a matrix [out, in] (a convolution's kernel flattened to [out, in * k *
k], as in peft, where A is a convolution to r channels and B one of size 1), becomes

    W + merged + scale * B A,   A [r, in], B [out, r], scale = alpha / r

Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685), section 4.1; FedIT, Zhang et al. 2023
(2305.05644); FFA-LoRA, Sun et al. 2024 (2403.12313); FLoRA, Wang et al. 2024 (2409.05976), section
3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fedtl import seeding
from fedtl.types import MERGED, Float32, Float64

A, B, SUM = ".0.A", ".0.B", ".0" + MERGED
"""How names of the two factors end, and of the sum of earlier rounds' products."""


def started(seed: int, layer: str, shape: tuple[int, int], round: int = 0) -> Float32:
    """A at the start of a round: uniform in +-1/sqrt(in), as ``torch.nn.Linear`` has it.

    That is Kaiming's uniform with a = sqrt(5), what LoRA's authors and peft draw A from.

    Args:
        seed: the scenario's.
        layer: what stands before A in the factor's name; each layer has a stream of its own.
        shape: (r, in).
        round: 0 for the start of training; a round that ends with fresh factors draws its own.
    """
    key = int(seeding.named_keys(seed, "lora", [layer])[0])
    bound = shape[1] ** -0.5
    return seeding.generator(key, "lora", round).uniform(-bound, bound, shape).astype(np.float32)


def layers(names: Iterable[str]) -> list[str]:
    """What stands before A in the names of a head's first factors, in their order."""
    return [name.removesuffix(A) for name in names if name.endswith(A)]


def stacked(
    weights: Sequence[float], first: Sequence[Float32], second: Sequence[Float32], scale: float
) -> Float64:
    """sum_k p_k scale B_k A_k, float64 [out, in], as one product of the stacked factors.

    [p_1 s B_1 | ... | p_K s B_K] [A_1; ...; A_K]: exact where an average of A's and B's is not.

    Args:
        weights: p_k of K clients.
        first: their A_k [r, in].
        second: their B_k [out, r].
        scale: alpha / r.
    """
    left = np.concatenate(
        [p * scale * own.astype(np.float64) for p, own in zip(weights, second, strict=True)], axis=1
    )
    return np.asarray(left @ np.concatenate([own.astype(np.float64) for own in first]))

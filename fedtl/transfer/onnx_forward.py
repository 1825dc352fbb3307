"""ONNX Runtime as a way to run a trunk: an exported one, or one that came as ONNX."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.types import Float32

Batch = npt.NDArray[np.integer[Any]]
"""Pixels uint8 [n, S, S, 3], or tokens int64 [n, T]."""

CPU_BATCH = 8  # 4 to 32 are within a tenth of each other; small ones stay in the cache


class WayRefused(Exception):
    """The trunk cannot be run this way, or gives other features; says why in one line."""


@dataclass(frozen=True)
class Export:
    """What is known of an exported trunk; ``failure`` says why there is none."""

    digest: str
    trunk_hash: str
    max_difference: float
    failure: str | None = None
    flops: float | None = None


class OnnxForward:
    """ONNX Runtime on the CPU, one thread a call: calls of several workers run side by side."""

    way = "onnx"
    batch = CPU_BATCH
    _fixed = False

    def __init__(self, content: bytes, export: Export) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime's own exceptions share no public base
            raise WayRefused(f"ONNX Runtime refuses it: {one_line(error)}") from error
        entry = self.session.get_inputs()[0]
        self._name = entry.name
        if isinstance(entry.shape[0], int):  # a model from elsewhere may take so many at a time
            self.batch = entry.shape[0]
            self._fixed = True
        self.dim = int((self.session.get_outputs()[0].shape or [0, 0])[1] or 0)
        self.trunk_hash = export.trunk_hash
        self.max_difference = export.max_difference
        self.flops = export.flops

    def run(self, pixels: Batch) -> Float32:
        """float32 [n, D] from uint8 [n, S, S, 3]."""
        if not self._fixed or len(pixels) == self.batch:
            features: Float32 = self.session.run(None, {self._name: pixels})[0]
            return features
        filled = np.zeros((-(-len(pixels) // self.batch) * self.batch, *pixels.shape[1:]), np.uint8)
        filled[: len(pixels)] = pixels
        parts = np.split(filled, len(filled) // self.batch)
        return np.concatenate([self.run(part) for part in parts])[: len(pixels)]

    def threads(self, count: int) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Nothing to prepare."""
        return contextlib.nullcontext(lambda: None)

    def state_hash(self) -> str:
        """That of the trunk that was exported: the graph holds constants only."""
        return self.trunk_hash


def one_line(error: Exception) -> str:
    """An error's kind and the beginning of its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__

"""An ONNX file in 8-bit integers, and what that costs and brings."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedtl.errors import InputError
from fedtl.export.build import onnx_runner, session
from fedtl.export.parity import compare
from fedtl.export.samples import Sample

CALIBRATION = 128
"""Training examples from which the ranges of activations are taken."""

CALLS, WARM_UP = 60, 5

LOSS = 0.005
"""So much less accuracy on the run's tests is said to be a loss."""


def quantize(content: bytes, calibration: Sample | None) -> tuple[bytes, str]:
    """The file in int8, and how that was done.

    Convolutions need the ranges of activations beforehand (static, QDQ, weights per channel, after
    Jacob et al. 2018, arXiv 1712.05877); a network without them has its activations' ranges found
    as it runs (dynamic).

    Args:
        calibration: training examples; None where there are none.

    Raises:
        InputError: convolutions, and nothing to calibrate with.
    """
    import onnx

    graph = onnx.load_from_string(content)
    kinds = {node.op_type for node in graph.graph.node}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(content)
        if "Conv" in kinds:
            if calibration is None:
                raise InputError(
                    "int8 convolutions need some training examples to calibrate with, and the "
                    "run's data are not at hand",
                    where="--quantize",
                    do="Export where the data are, or leave out --quantize",
                )
            _static(source, target, calibration)
            way = f"static, calibrated on {len(calibration)} training examples"
        else:
            _dynamic(source, target)
            way = "dynamic: ranges of activations are found as it runs"
        return target.read_bytes(), way


def _static(source: Path, target: Path, calibration: Sample) -> None:
    from onnxruntime import quantization as q

    with _quiet():
        q.shape_inference.quant_pre_process(str(source), str(source), skip_symbolic_shape=True)
        q.quantize_static(
            str(source),
            str(target),
            _Reader(calibration),
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            activation_type=q.QuantType.QUInt8,
            weight_type=q.QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "Clip", "Relu"],
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )


def _dynamic(source: Path, target: Path) -> None:
    from onnxruntime import quantization as q

    with _quiet():
        q.shape_inference.quant_pre_process(str(source), str(source), skip_symbolic_shape=True)
        q.quantize_dynamic(str(source), str(target), weight_type=q.QuantType.QInt8)


class _Reader:
    """Calibration examples, one at a time."""

    def __init__(self, sample: Sample) -> None:
        self._rows = iter(
            {name: array[i : i + 1] for name, array in sample.inputs.items()}
            for i in range(len(sample))
        )

    def get_next(self) -> Mapping[str, Any] | None:
        """The next one; None after the last."""
        return next(self._rows, None)


def _quiet() -> Any:
    import contextlib
    import logging
    import warnings

    stack = contextlib.ExitStack()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    stack.callback(logging.disable, before)
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    return stack


def table(
    files: Mapping[str, bytes], sample: Sample, check: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Size, latency and accuracy of some files, the float one first.

    Returns:
        ``files``: rows of name, bytes, p50 (seconds of one example on one thread), accuracy and
        agreement with the run (on ``examples`` tests), and ``verdict``, a sentence.
    """
    rows = []
    for name, content in files.items():
        check()
        found = compare(onnx_runner(content), sample)
        rows.append(
            {
                "name": name,
                "bytes": len(content),
                "p50": latency(content, sample),
                "accuracy": found.accuracy,
                "agreement": found.agreement,
            }
        )
    return {"files": rows, "examples": len(sample), "verdict": _verdict(rows, len(sample))}


def latency(content: bytes, sample: Sample) -> float:
    """Median seconds of one example on one thread."""
    opened, one = session(content), {n: array[:1] for n, array in sample.inputs.items()}
    seconds = []
    for _ in range(WARM_UP + CALLS):
        before = time.perf_counter()
        opened.run(None, one)
        seconds.append(time.perf_counter() - before)
    return float(np.median(seconds[WARM_UP:]))


def _verdict(rows: Sequence[Mapping[str, Any]], examples: int) -> str:
    plain, small = rows
    size = f"int8 is {plain['bytes'] / small['bytes']:.1f} times smaller"
    faster = plain["p50"] / small["p50"]
    speed = f"{faster:.1f} times faster" if faster >= 1.05 else (
        "no faster" if faster > 0.95 else f"{1 / faster:.1f} times slower here"
    )  # fmt: skip
    if plain["accuracy"] is None:
        same = (
            f"gives the same label on {100 * small['agreement']:.1f} % of {examples} made-up inputs"
        )
        return f"{size}, {speed}, and {same}; its accuracy could not be measured."
    points = 100 * (small["accuracy"] - plain["accuracy"])
    if points < -100 * LOSS:
        return (
            f"{size} and {speed}, but it loses {-points:.1f} points of accuracy on {examples} "
            "tests of the run: use the float file where that matters."
        )
    return f"{size}, {speed}, and {points:+.1f} points of accuracy on {examples} tests of the run."

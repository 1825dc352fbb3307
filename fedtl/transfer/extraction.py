"""The ways to run a frozen trunk: ONNX Runtime, torch on the CPU with batch norm folded, CUDA.

Images per second and the differences to eager torch are measured by ``benchmarks/extraction.py``.
Every way is compared with eager float32 on a sample before it is trusted. An exported trunk is
kept, so that later extractions with the same trunk need no torch at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from fedtl import machine
from fedtl.errors import EnvironmentFault, InputError
from fedtl.results.files import write_atomic
from fedtl.transfer.backbones import Backbone
from fedtl.transfer.flops import count_flops
from fedtl.transfer.onnx_forward import (
    CPU_BATCH,
    Batch,
    Export,
    OnnxForward,
    WayRefused,
    one_line,
)
from fedtl.transfer.tracing import ONE_TRACE
from fedtl.types import Float32

if TYPE_CHECKING:
    from torch import nn

WAYS = ("auto", "onnx", "torch")
TOLERANCE = 1e-3  # largest difference to eager over the largest feature; measured ones are 1e-5
_CUDA_BATCH = 128
_OPSET = 17


class Forward(Protocol):
    """One way to run a trunk, ready to be called from several threads.

    Attributes:
        way: "onnx", "torch" or "torch-cuda".
        dim: D.
        batch: images of a call that suit it.
        trunk_hash: state hash of the trunk before anything ran.
        max_difference: to eager float32 on the sample, absolute.
    """

    way: str
    dim: int
    batch: int
    trunk_hash: str
    max_difference: float

    def run(self, pixels: Batch) -> Float32:
        """float32 [n, D] from uint8 [n, S, S, 3]."""
        ...

    def threads(self, count: int) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """Context for ``count`` workers; gives what each of them calls first."""
        ...

    def state_hash(self) -> str:
        """The trunk's state hash now."""
        ...


class Exports:
    """Exported trunks, by the trunk's key: ``<key>.onnx`` and, written last, ``<key>.json``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def refusal(self, backbone: Backbone) -> str | None:
        """Why an earlier attempt to export this trunk failed, or None."""
        known = self._known(self._key(backbone))
        return known.failure if known else None

    def open(self, backbone: Backbone, sample: Callable[[], Batch]) -> OnnxForward:
        """The exported trunk, exported and compared on the sample where it is not kept yet.

        Raises:
            WayRefused: export failed or the difference is too large; that is kept as well.
        """
        if backbone.graph is not None:
            return OnnxForward(backbone.graph(), Export("", backbone.weights_hash, 0.0))
        key = self._key(backbone)
        path = self._folder / f"{key}.onnx"
        known = self._known(key)
        if known is not None and known.failure is not None:
            raise WayRefused(known.failure)
        if known is not None and path.is_file():
            content = path.read_bytes()
            if hashlib.blake2b(content).hexdigest() == known.digest:
                return OnnxForward(content, known)
        return self._export(backbone, key, sample())

    def _export(self, backbone: Backbone, key: str, sample: Batch) -> OnnxForward:
        trunk, before, reference = _eager(backbone, sample)
        flops = count_flops(trunk, sample[:1])
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            content = export_onnx(trunk, sample[:1])
            export = Export(hashlib.blake2b(content).hexdigest(), before, 0.0)
            exported = _run_exported(OnnxForward(content, export), sample)
            difference = largest_difference(exported, reference)
        except WayRefused as refusal:
            self._keep(key, Export("", before, 0.0, str(refusal)))
            raise
        refuse_changed(before, backbone.state_hash(trunk))
        export = Export(export.digest, before, difference, flops=flops)
        write_atomic(self._folder / f"{key}.onnx", content)
        self._keep(key, export)
        return OnnxForward(content, export)

    def _keep(self, key: str, export: Export) -> None:
        write_atomic(self._folder / f"{key}.json", json.dumps(asdict(export)).encode())

    def _known(self, key: str) -> Export | None:
        try:
            return Export(**json.loads((self._folder / f"{key}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None  # none yet, or a damaged one: exported again

    @staticmethod
    def _key(backbone: Backbone) -> str:
        # Another runtime may run, or refuse, the same graph otherwise: it is compared anew.
        runtime = {"onnxruntime": metadata.version("onnxruntime"), "format": 2}
        return digest_of({**backbone.identity(), **runtime})


class TorchForward:
    """Torch with batch norm folded and channels last; on CUDA one call at a time."""

    def __init__(self, backbone: Backbone, sample: Batch, *, cuda: bool = False) -> None:
        from fedtl.transfer import folding

        self.way = "torch-cuda" if cuda else "torch"
        self.batch = _CUDA_BATCH if cuda else CPU_BATCH
        self._backbone, self._cuda, self._gate = backbone, cuda, threading.Lock()
        self._trunk, self.trunk_hash, reference = _eager(backbone, sample)
        self.dim = reference.shape[1]
        self.flops = count_flops(self._trunk, sample[:1])
        device = "cuda" if cuda else "cpu"
        self._module = folding.fold_batch_norm(self._trunk, sample[:1]).to(device)
        try:
            self.max_difference = largest_difference(self.run(sample), reference)
        except WayRefused:  # folding went wrong: the plain module is the fallback
            self._module = folding.copy_channels_last(self._trunk).to(device)
            self.max_difference = largest_difference(self.run(sample), reference)
        self._module_hash = backbone.state_hash(self._module)

    def run(self, pixels: Batch) -> Float32:
        """float32 [n, D] from uint8 [n, S, S, 3]."""
        import torch

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            batch = torch.from_numpy(pixels)
            if self._cuda:
                stack.enter_context(self._gate)
                # TF32 has 10 bits of mantissa: its features are another's at the third digit.
                stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
                batch = batch.to("cuda")
            features: Float32 = self._module(batch).float().cpu().numpy()
            return features

    @contextlib.contextmanager
    def threads(self, count: int) -> Iterator[Callable[[], None]]:
        """One torch thread per worker, so that the workers share the cores; restored after."""
        import torch

        before = torch.get_num_threads()
        try:
            yield lambda: torch.set_num_threads(1)
        finally:
            torch.set_num_threads(before)

    def state_hash(self) -> str:
        """The trunk's state hash now; another one as well if the folded copy changed."""
        if self._backbone.state_hash(self._module) != self._module_hash:
            return "the folded copy changed"
        return self._backbone.state_hash(self._trunk)


def resolve_way(way: str, device: str, backbone: Backbone, exports: Exports) -> str:
    """Which way ``way`` means on this machine, without importing torch unless a GPU is there.

    Args:
        way: "auto", "onnx", "torch" or "torch-cuda".
        device: "auto", "cpu" or "cuda".
        backbone: whose export may be known to fail.
        exports: what is known of exports.

    Returns:
        "onnx", "torch" or "torch-cuda".

    Raises:
        InputError: an unknown way.
        EnvironmentFault: CUDA was asked for and is not there.
    """
    if way not in (*WAYS, "torch-cuda"):
        raise InputError(
            "unknown way of extraction",
            where="backbone.extraction",
            got=repr(way),
            allowed=", ".join(WAYS),
        )
    if backbone.graph is not None:
        if way not in ("auto", "onnx"):
            raise InputError(
                f"{backbone.name} is run by ONNX Runtime alone",
                where="backbone.extraction",
                got=repr(way),
                allowed="auto, onnx",
            )
        return "onnx"
    wanted = way == "torch-cuda" or (device == "cuda" and way != "onnx")
    if wanted or (device == "auto" and way != "onnx" and machine.gpu_present()):
        if _cuda_works():
            return "torch-cuda"
        if wanted:
            raise EnvironmentFault(
                "torch sees no CUDA device",
                where="engine.device",
                do="Set engine.device = 'cpu'; 'fedtl doctor' shows what this machine has",
            )
    if way == "auto":
        return "torch" if exports.refusal(backbone) else "onnx"
    return way


def open_forward(
    way: str, backbone: Backbone, exports: Exports, sample: Callable[[], Batch]
) -> Forward:
    """The resolved way, compared with eager torch on the sample.

    Raises:
        WayRefused: way "onnx", and the trunk cannot go it.
    """
    if way == "onnx":
        return exports.open(backbone, sample)
    return TorchForward(backbone, sample(), cuda=way == "torch-cuda")


def export_onnx(trunk: nn.Module, example: Batch) -> bytes:
    """A trunk as an ONNX graph of any batch size, normalisation included.

    Raises:
        WayRefused: this trunk has operations that cannot be exported.
    """
    import io

    import torch

    buffer = io.BytesIO()
    # Two images: an axis of one would be taken for a constant by some models.
    axes = {0: "n"}
    if example.ndim == 2:  # tokens of texts: any number of them, and not that of the sample
        axes, example = {0: "n", 1: "t"}, example[:, 1:]
    pixels = torch.from_numpy(np.repeat(example, 2, axis=0))
    with ONE_TRACE:
        fused_attention = torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # ONNX has no such operator
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                # The tracing exporter is called legacy; the new one needs a further package and
                # takes thirty times as long.
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    trunk,
                    (pixels,),
                    cast(Any, buffer),  # any file object will do; its annotation says path
                    input_names=["pixels"],
                    output_names=["features"],
                    dynamic_axes={"pixels": axes, "features": {0: "n"}},
                    opset_version=_OPSET,
                    dynamo=False,
                )
        except Exception as error:  # tracing runs the model's own code: anything may come
            raise WayRefused(f"export to ONNX failed: {one_line(error)}") from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fused_attention)
    return buffer.getvalue()


def _run_exported(forward: OnnxForward, sample: Batch) -> Float32:
    try:
        return forward.run(sample)
    except Exception as error:  # a shape that tracing took for a constant, and other surprises
        raise WayRefused(f"ONNX Runtime cannot run it: {one_line(error)}") from error


def largest_difference(features: Float32, reference: Float32) -> float:
    """The largest absolute difference of a sample's features to eager ones.

    Raises:
        WayRefused: it is more than ``TOLERANCE`` of the largest feature, or not finite.
    """
    difference = float(np.abs(features - reference).max())
    scale = float(np.abs(reference).max())
    if not difference <= TOLERANCE * scale:
        raise WayRefused(f"features differ from eager torch by {difference:.2g} of {scale:.2g}")
    return difference


def digest_of(identity: dict[str, Any]) -> str:
    """BLAKE2b-128 over plain values, 32 hex digits."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _eager(backbone: Backbone, sample: Batch) -> tuple[nn.Module, str, Float32]:
    """The trunk, its state hash and its eager features of the sample."""
    import torch

    from fedtl.transfer.trunks import refuse_training_mode

    trunk = backbone.trunk()
    refuse_training_mode(trunk)
    before = backbone.state_hash(trunk)
    with torch.inference_mode():
        reference: Float32 = trunk(torch.from_numpy(sample)).numpy()
    refuse_changed(before, backbone.state_hash(trunk))
    if not np.isfinite(reference).all():
        raise InputError(
            "the trunk gives NaN or infinity for the first images",
            where="backbone.weights",
            do="Try backbone.weights = 'default'",
        )
    return trunk, before, reference


def refuse_changed(before: str, after: str) -> None:
    """Raise InputError where the two state hashes of a trunk differ (METHODS T1.7)."""
    if before != after:
        raise InputError(
            "the trunk changed while it ran: it is not frozen",
            where="backbone",
            got=f"state hash {after[:12]}",
            allowed=before[:12],
            do="Put every layer into evaluation mode and let none keep running statistics",
        )


def _cuda_works() -> bool:
    import torch

    return torch.cuda.is_available()

"""``fedtl doctor``: can this machine run fedtl, and what must be mended where it cannot?"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path

from fedtl import machine

EXTRAS = {"text": "transformers", "timm": "timm", "tune": "optuna", "serve": "fastapi"}
"""What may be installed beside fedtl, and a package that shows whether it is."""

NEEDED_MEMORY_BYTES = 2 * 2**30
NEEDED_DISK_BYTES = 1 * 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what, whether it is good, the detail, and the mend."""

    what: str
    ok: bool
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Look at everything ``fedtl run quickstart`` stands on, in a few seconds."""
    return [look() for look in LOOKS]


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding("python", good, sys.version.split()[0], "Install Python 3.11 or newer")


def _packages() -> Finding:
    needed = ("torch", "torchvision", "numba", "onnxruntime", "numpy", "pandas", "pyarrow")
    missing = []
    for name in needed:
        try:
            import_module(name)
        except ImportError as error:
            missing.append(f"{name}: {error}")
    shown = ", ".join(f"{n} {metadata.version(n)}" for n in needed[:4] if not missing)
    return Finding("packages", not missing, "; ".join(missing) or shown, "Type 'uv sync'")


def _cores() -> Finding:
    cores = machine.allowed_cores()
    return Finding("cores", True, f"{cores} of {os.cpu_count()} allowed, {machine.cpu_model()}")


def _memory() -> Finding:
    available = machine.available_memory_bytes()
    detail = "unknown" if available is None else f"{available / 2**30:.1f} GiB available"
    good = available is None or available >= NEEDED_MEMORY_BYTES
    return Finding("memory", good, detail, "Close other programs: 2 GiB are needed")


def _gpu() -> Finding:
    if not machine.gpu_present():
        return Finding("gpu", True, "none; everything runs on the CPU")
    import torch

    if not torch.cuda.is_available():
        return Finding(
            "gpu", False, "a driver is there, but torch cannot use it", "Set engine.device = cpu"
        )
    return Finding("gpu", True, torch.cuda.get_device_name())


def _store() -> Finding:
    from fedtl.transfer.features import FeatureStore

    return writable("feature store", FeatureStore().root)


def _runs() -> Finding:
    return writable("run folder", Path.cwd())


def writable(what: str, folder: Path) -> Finding:
    """Whether a folder can be written to and has room."""
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(what, False, f"{folder}: {error.strerror}", "Choose a folder you may write")
    detail = f"{folder}: {free / 2**30:.1f} GiB free"
    return Finding(what, free >= NEEDED_DISK_BYTES, detail, "Free some space: 1 GiB is needed")


def _assets() -> Finding:
    from fedtl.data.sources import load_examples
    from fedtl.errors import FedtlError
    from fedtl.scenario import schema
    from fedtl.transfer.backbones import open_backbone

    try:
        examples = load_examples(schema.Data())
        backbone = open_backbone(schema.Backbone(), 0)
    except (FedtlError, ImportError) as error:
        return Finding("offline assets", False, str(error), "Type 'uv sync'")
    detail = f"{len(examples):,} digits, {backbone.name} {backbone.weights_hash[:8]}"
    return Finding("offline assets", True, detail)


def _extras() -> Finding:
    found = {name: find_spec(package) is not None for name, package in EXTRAS.items()}
    detail = ", ".join(f"{name} {'yes' if here else 'no'}" for name, here in found.items())
    missing = [name for name, here in found.items() if not here]
    if missing:
        detail += f" ('uv sync --extra {missing[0]}' installs what {missing[0]} needs)"
    return Finding("extras", True, detail)


def _kernel() -> Finding:
    import numpy as np

    try:
        from fedtl.clients.batches import batch_order

        order = batch_order(1, 5, 0)
    except RuntimeError as error:  # Numba found no folder to keep compiled code in
        fix = "Set NUMBA_CACHE_DIR to a folder you may write"
        return Finding("compiled kernel", False, str(error).splitlines()[0], fix)
    good = bool((np.sort(order) == np.arange(5)).all())
    return Finding("compiled kernel", good, "compiles and runs", "Reinstall numba")


LOOKS: tuple[Callable[[], Finding], ...] = (
    _python, _packages, _extras, _cores, _memory, _gpu, _store, _runs, _assets, _kernel,
)  # fmt: skip
"""In the order in which they are shown."""

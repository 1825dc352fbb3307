"""How fast the ways to run a trunk are, and how far each is from eager float32.

    python benchmarks/extraction.py [--sizes 64 96 224] [--weights FILE] [--images ZIP_OR_FOLDER]

Every measurement is a process of its own, since malloc is tuned by the environment. Printed per
way: images per second (best of the repetitions), the ratio to malloc-tuned eager, and the largest
absolute difference to eager. Then, from JPEG files through the feature store: end to end against
the forward pass alone.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtl.data.examples import Pixels
from fedtl.machine import allowed_cores, cpu_model
from fedtl.scenario import schema
from fedtl.transfer import extraction
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.features import FeatureStore

WAYS = ("eager", "eager, tuned", "torch", "torch, tuned", "onnx")
MODELS = ("efficientnet_lite0", "mobilenet_v2")
# glibc: never give memory back, so that no pass pays for fresh pages again.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
IMAGES = {64: 1536, 96: 768, 128: 512, 224: 160}
EAGER_BATCH = 32
SUFFIXES = (".jpg", ".jpeg")


def main() -> None:
    """Measure everything and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 224])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--weights", default="none", help="weights file for mobilenet_v2")
    parser.add_argument("--images", type=Path, help="zip or folder of JPEGs; default: synthetic")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_one(**json.loads(options.one))))
        return
    print(f"{cpu_model()}, {allowed_cores()} cores")
    print(f"{'model':19} {'px':>4} {'way':13} {'images/s':>9} {'ratio':>6} {'difference':>11}")
    for model in options.models:
        for size in options.sizes:
            compare_ways(model, size, options.weights, options.repetitions)
    with tempfile.TemporaryDirectory() as folder:
        files = jpeg_files(options.images, Path(folder))
        print(f"\nfrom {len(files)} JPEG files")
        print(f"{'px':>4} {'forward/s':>10} {'end to end/s':>13} ratio")
        for size in options.sizes:
            from_files(files, size, options.repetitions)


def compare_ways(model: str, size: int, weights: str, repetitions: int) -> None:
    """One block of the first table."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            output = str(Path(folder) / f"{way}.npy")
            task = {
                "way": way.split(",")[0],
                "model": model,
                "size": size,
                "weights": weights,
                "repetitions": repetitions,
                "output": output,
            }
            environment = {**os.environ, **(TUNED if "tuned" in way else {})}
            command = [sys.executable, __file__, "--one", json.dumps(task)]
            reply = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            found[way] = {**json.loads(reply.stdout), "features": np.load(output)}
    for way, result in found.items():
        difference = np.abs(result["features"] - found["eager"]["features"]).max()
        ratio = result["speed"] / found["eager, tuned"]["speed"]
        print(
            f"{model:19} {size:4} {way:13} {result['speed']:9.0f} {ratio:6.2f} {difference:11.1e}",
            flush=True,
        )


def measure_one(
    way: str, model: str, size: int, weights: str, repetitions: int, output: str
) -> dict[str, float]:
    """One way in this process: images per second; the first features go to ``output``."""
    count = IMAGES.get(size, 256)
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    backbone = backbone_of(model, size, weights)
    if way == "eager":
        features, seconds = run_eager(backbone, pixels, repetitions)
    else:
        with tempfile.TemporaryDirectory() as folder:
            exports = extraction.Exports(Path(folder))
            forward = extraction.open_forward(way, backbone, exports, lambda: pixels[:16])
            features, seconds = run_forward(forward, pixels, repetitions)
    np.save(output, features[:64])
    return {"speed": count / seconds}


def run_eager(
    backbone: Backbone, pixels: Pixels, repetitions: int
) -> tuple[npt.NDArray[np.float32], float]:
    """Plain torch as most people write it: contiguous NCHW, inference mode, all cores."""
    import torch

    torch.set_num_threads(allowed_cores())
    trunk = backbone.trunk()
    best = float("inf")
    for _ in range(repetitions):
        began, parts = time.perf_counter(), []
        with torch.inference_mode():
            for start in range(0, len(pixels), EAGER_BATCH):
                batch = torch.from_numpy(pixels[start : start + EAGER_BATCH])
                images = batch.permute(0, 3, 1, 2).contiguous().float()
                parts.append(trunk.body((images - trunk.offset) / trunk.scale).numpy())
        best = min(best, time.perf_counter() - began)
    return np.concatenate(parts), best


def run_forward(
    forward: extraction.Forward, pixels: Pixels, repetitions: int
) -> tuple[npt.NDArray[np.float32], float]:
    """One of fedtl's ways over pixels in memory, one worker per core as in the pipeline."""
    starts = range(0, len(pixels), forward.batch)
    threads, best = allowed_cores(), float("inf")
    with (
        forward.threads(threads) as start_thread,
        ThreadPoolExecutor(threads, initializer=start_thread) as pool,
    ):
        for _ in range(repetitions):
            began = time.perf_counter()
            parts = list(pool.map(lambda s: forward.run(pixels[s : s + forward.batch]), starts))
            best = min(best, time.perf_counter() - began)
    return np.concatenate(parts), best


def from_files(files: list[Path], size: int, repetitions: int) -> None:
    """One line of the second table: the store from files against the forward pass alone."""
    backbone = backbone_of("efficientnet_lite0", size, "default")
    images = JpegImages(files)
    pixels = np.stack([backbone.preprocessing.apply(images.load(i)) for i in range(len(images))])
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore(Path(folder))
        exports = extraction.Exports(Path(folder) / "trunks")
        forward = exports.open(backbone, lambda: pixels[:16])
        _, alone = run_forward(forward, pixels, repetitions)
        whole = min(
            store.features(
                backbone, images, f"{size} {i}", way="onnx", threads=allowed_cores()
            ).seconds
            for i in range(repetitions)
        )
    count = len(files)
    print(f"{size:4} {count / alone:10.0f} {count / whole:13.0f} {whole / alone:5.2f}", flush=True)


class JpegImages:
    """Image files, decoded one at a time."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def load(self, i: int) -> Pixels:
        """Image ``i``, uint8 [h, w, 3]."""
        from PIL import Image

        with Image.open(self._files[i]) as image:
            return np.asarray(image.convert("RGB"))

    def where(self, i: int) -> str:
        """The file's name."""
        return self._files[i].name


def jpeg_files(source: Path | None, folder: Path) -> list[Path]:
    """JPEG files to read: a folder's, a zip's (unpacked into ``folder``), or synthetic ones."""
    if source is not None and source.is_dir():
        return sorted(
            path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")
        )
    if source is not None:
        with zipfile.ZipFile(source) as archive:
            names = [n for n in archive.namelist() if n.lower().endswith(SUFFIXES)]
            for i, name in enumerate(names):
                (folder / f"{i:05}.jpg").write_bytes(archive.read(name))
    else:
        from PIL import Image

        draw = np.random.default_rng(0)
        for i in range(512):
            coarse = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(coarse).resize((227, 227)).save(buffer, "JPEG", quality=90)
            (folder / f"{i:05}.jpg").write_bytes(buffer.getvalue())
    return sorted(folder.glob("*.jpg"))


def backbone_of(model: str, size: int, weights: str) -> Backbone:
    """The backbone with its own weights where they are packaged, else with ``weights``."""
    own = "default" if model == "efficientnet_lite0" else weights
    return open_backbone(schema.Backbone(name=model, weights=own, image_size=size), seed=0)


if __name__ == "__main__":
    main()

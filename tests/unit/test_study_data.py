"""What the studies' data are made of, on small files of the same form."""

from __future__ import annotations

import gzip
import importlib.util
import io
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from fedtl.data.arrays import load_arrays
from fedtl.scenario.schema import Data

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """A module of ``benchmarks/``, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


data = benchmark("study_data")


def some_images(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side)).astype(np.uint8)


def readable(arrays: dict[str, np.ndarray], folder: Path) -> None:
    """fedtl reads the file without a complaint."""
    np.savez(folder / "read.npz", **arrays)
    examples = load_arrays(Data(source="arrays", path=str(folder / "read.npz")))
    assert len(examples) == len(arrays["y"])


def test_an_untouched_scanner_changes_no_bit() -> None:
    x = some_images(5, 28)
    same = data.Hospital("a", "as published", 1.0, 0.5)
    assert np.array_equal(data.scanned(x, same, np.random.default_rng(1)), x)


def test_a_scanner_does_what_its_figures_say() -> None:
    x = np.full((200, 28, 28), 128, np.uint8)
    x[:, :, 14:] = 178
    kind = data.Hospital
    low = data.scanned(x, kind("a", "", 1, 0.5, contrast=0.5), np.random.default_rng(1))
    assert set(np.unique(low)) == {128, 153}
    noisy = data.scanned(x, kind("a", "", 1, 0.5, noise=10.0), np.random.default_rng(1))
    assert (noisy.astype(float) - x).std() == pytest.approx(10.0, rel=0.02)
    again = data.scanned(x, kind("a", "", 1, 0.5, noise=10.0), np.random.default_rng(1))
    assert np.array_equal(noisy, again)
    blurred = data.scanned(x, kind("a", "", 1, 0.5, blur=1.2), np.random.default_rng(1))
    assert blurred.mean() == pytest.approx(x.mean(), abs=0.5)
    assert np.abs(np.diff(blurred.astype(int), axis=2)).max() < 25  # the edge of 50 is spread out
    assert np.array_equal(blurred[0], blurred[-1])  # and no picture runs into the next


def test_levels_and_sizes() -> None:
    assert data.in_levels(np.array([0.0, 0.5, 1.0, 1.2])).tolist() == [0, 128, 255, 255]
    x = some_images(3, 28)
    assert data.resized(x, 28) is x
    flat = np.full((2, 16, 16), 77, np.uint8)
    assert np.array_equal(data.resized(flat, 28), np.full((2, 28, 28), 77, np.uint8))


def test_digits_of_three_sensors(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="extra studies is not installed")
    folder = tmp_path / "digits"
    folder.mkdir()
    mnist = some_images(4, 28)
    with gzip.open(folder / "mnist_5k.csv.gz", "wt") as file:
        for image, label in zip(mnist, [3, 1, 4, 1], strict=True):
            file.write(",".join(map(str, [*image.ravel(), label])) + "\n")
    with h5py.File(folder / "usps.h5", "w") as file:
        for part, labels in (("train", [5, 9]), ("test", [2])):
            file[f"{part}/data"] = np.full((len(labels), 256), 0.5, np.float32)
            file[f"{part}/target"] = np.array(labels, np.int32)
    lines = [[1.0] * 256 + [int(k == label) for k in range(10)] for label in (6, 0)]
    np.savetxt(folder / "semeion.data", lines, fmt="%g")
    made = data.digits_three_sensors(tmp_path)
    assert made["x"].shape == (9, 28, 28)
    assert np.array_equal(made["x"][:4], mnist)
    assert set(np.unique(made["x"][4:7])) == {128}
    assert set(np.unique(made["x"][7:])) == {255}
    assert made["y"].tolist() == [3, 1, 4, 1, 5, 9, 2, 6, 0]
    assert made["domain"].tolist() == ["mnist"] * 4 + ["usps"] * 3 + ["semeion"] * 2
    readable(made, tmp_path)


def test_drawers_of_omniglot(tmp_path: Path) -> None:
    (tmp_path / "omniglot").mkdir()
    with zipfile.ZipFile(tmp_path / "omniglot" / "images_background_small1.zip", "w") as archive:
        for alphabet in ("Greek", "Latin"):
            for drawer in ("01", "02"):
                buffer = io.BytesIO()
                Image.new("1", (105, 105), int(drawer == "01")).save(buffer, "PNG")
                path = f"images_background_small1/{alphabet}/character01/0394_{drawer}.png"
                archive.writestr(path, buffer.getvalue())
    made = data.omniglot_drawers(tmp_path)
    assert made["x"].shape == (4, 105, 105)
    assert made["x"].dtype == np.uint8
    assert made["y"].tolist() == ["Greek", "Greek", "Latin", "Latin"]
    assert made["client"].tolist() == ["drawer 01", "drawer 02"] * 2
    assert made["x"][:, 0, 0].tolist() == [255, 0, 255, 0]
    readable(made, tmp_path)


def test_hospitals_of_the_pneumonia_set(tmp_path: Path) -> None:
    (tmp_path / "pneumonia").mkdir()
    x = some_images(2_000, 28)
    y = (np.arange(2_000) % 4 > 0).astype(np.uint8)
    x[1_999] = x[0]  # of the test part and of the training part: stays in the test part
    parts = {"train": slice(500, None), "val": slice(300, 500), "test": slice(0, 300)}
    arrays = {f"{part}_images": x[rows] for part, rows in parts.items()}
    arrays |= {f"{part}_labels": y[rows, None] for part, rows in parts.items()}
    np.savez(tmp_path / "pneumonia" / "pneumoniamnist_rebuilt.npz", **arrays)
    made = data.pneumonia_hospitals(tmp_path)
    assert len(made["y"]) == 1_999
    assert (made["split"] == "test").sum() == 300
    sick = {}
    for hospital in data.HOSPITALS:
        for part in ("train", "test"):
            mine = (made["client"] == hospital.name) & (made["split"] == part)
            assert mine.any()
            assert set(made["domain"][mine]) == {hospital.scanner}
            sick[hospital.name, part] = made["y"][mine].mean()
    for part in ("train", "test"):
        order = sorted(data.HOSPITALS, key=lambda one: sick[one.name, part])
        assert [one.name for one in order] == [
            one.name for one in sorted(data.HOSPITALS, key=lambda one: one.sick)
        ]
    sizes = [(made["client"] == one.name).sum() for one in data.HOSPITALS]
    assert sizes == sorted(sizes, reverse=True)
    again = data.pneumonia_hospitals(tmp_path)
    assert all(np.array_equal(made[name], again[name]) for name in made)
    readable(made, tmp_path)

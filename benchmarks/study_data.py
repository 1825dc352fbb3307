"""Makes the .npz files that the studies' scenarios read, from data that cannot be shipped.

    uv run --extra studies python benchmarks/study_data.py --data ../shared/data

What each study is made from is said at its function; what has to lie where below ``--data`` is said
by its paths. Every file is the same bits on every machine. PACS needs no preparation: its scenarios
read the zips as they are. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter

from fedtl import seeding
from fedtl.data.leakage import content_hashes

TARGET = Path("~/.cache/fedtl/studies")
SEED = 1
"""Of the hospitals: who gets which picture, and the noise of their scanners."""

Pixels = npt.NDArray[np.uint8]
Arrays = dict[str, npt.NDArray[Any]]

DIGIT_SIDE = 28
"""All digits are brought to MNIST's size: USPS and Semeion are 16 x 16, enlarged bilinearly."""


@dataclass(frozen=True)
class Hospital:
    """One hospital of the pneumonia study, and what its scanner does to a picture.

    Attributes:
        size: its share of all pictures, before ``sick`` is weighed in.
        sick: the prevalence it would have if the whole set's were its hospitals' mean.
        contrast: distance of every pixel from mid-grey (128) is multiplied by this.
        blur: standard deviation of a Gaussian, in pixels of the 28 x 28 picture.
        noise: standard deviation of Gaussian noise, in grey levels of 255.
    """

    name: str
    scanner: str
    size: float
    sick: float
    contrast: float = 1.0
    blur: float = 0.0
    noise: float = 0.0


HOSPITALS = (
    Hospital("university", "as published", 0.40, 0.65),
    Hospital("city", "low contrast", 0.25, 0.80, contrast=0.5),
    Hospital("county", "noisy", 0.15, 0.92, noise=25.0),
    Hospital("coast", "blurred", 0.12, 0.75, blur=1.2),
    Hospital("clinic", "hard contrast, noisy", 0.08, 0.45, contrast=1.6, noise=10.0),
)


def digits_three_sensors(source: Path) -> Arrays:
    """MNIST (5,000), USPS (9,298) and Semeion (1,593): one label set, three ways to capture it.

    USPS is the official training and test part together; its grey values in [0, 1] and Semeion's
    bits become 0 to 255. Framing is left as it is (MNIST has a margin, the others have none): it is
    part of how the digits were captured.
    """
    import h5py

    folder = source / "digits"
    mnist = np.loadtxt(folder / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    semeion = np.loadtxt(folder / "semeion.data")
    with h5py.File(folder / "usps.h5") as file:
        usps = np.concatenate([file[part]["data"][:] for part in ("train", "test")])
        usps_labels = np.concatenate([file[part]["target"][:] for part in ("train", "test")])
    parts: dict[str, tuple[Pixels, npt.NDArray[Any]]] = {
        "mnist": (mnist[:, :784].reshape(-1, 28, 28), mnist[:, 784]),
        "usps": (in_levels(usps.reshape(-1, 16, 16)), usps_labels),
        "semeion": (in_levels(semeion[:, :256].reshape(-1, 16, 16)), semeion[:, 256:].argmax(1)),
    }
    return {
        "x": np.concatenate([resized(x, DIGIT_SIDE) for x, _ in parts.values()]),
        "y": np.concatenate([y.astype(np.int64) for _, y in parts.values()]),
        "domain": np.repeat(list(parts), [len(y) for _, y in parts.values()]),
    }


def omniglot_drawers(source: Path) -> Arrays:
    """Which of five alphabets (136 characters), with the 20 drawers as natural clients.

    Not which character: each drawer drew each character once, so nobody would have one to be judged
    on. The drawer is the number at the end of a file's name. It stands for one person within an
    alphabet; that it is the same person in the next one, the set does not say.
    """
    x, y, client = [], [], []
    with zipfile.ZipFile(source / "omniglot" / "images_background_small1.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".png")):
            _, alphabet, _, file = name.split("/")
            x.append(np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("L")))
            y.append(alphabet)
            client.append(f"drawer {Path(file).stem.rpartition('_')[2]}")
    return {"x": np.stack(x), "y": np.array(y), "client": np.array(client)}


def pneumonia_hospitals(source: Path) -> Arrays:
    """PneumoniaMNIST dealt to five hospitals that differ in size, prevalence and scanner.

    The set's own test part, other patients than in training by its makers, is dealt in the same way
    and is the hospitals' test part; its validation part is trained on. A picture that occurs twice
    stays once, in the test part if it is in both.
    """
    with np.load(source / "pneumonia" / "pneumoniamnist_rebuilt.npz") as file:
        parts = [(file[f"{part}_images"], file[f"{part}_labels"][:, 0]) for part in
                 ("test", "train", "val")]  # fmt: skip
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    is_test = np.arange(len(x)) < len(parts[0][0])
    first = np.sort(np.unique(content_hashes(x), axis=0, return_index=True)[1])
    x, y, is_test = x[first], y[first], is_test[first]
    owner = np.empty(len(x), dtype=np.int64)
    for part in (False, True):
        for sick in (0, 1):
            rows = np.flatnonzero((is_test == part) & (y == sick))
            rows = seeding.generator(SEED, "hospital", part, sick).permutation(rows)
            weights = [one.size * (one.sick if sick else 1 - one.sick) for one in HOSPITALS]
            edges = np.rint(np.cumsum(weights) / sum(weights) * len(rows)).astype(np.int64)
            owner[rows] = np.searchsorted(edges, np.arange(len(rows)), side="right")
    for index, hospital in enumerate(HOSPITALS):
        mine = owner == index
        x[mine] = scanned(x[mine], hospital, seeding.generator(SEED, "scanner", index))
    return {
        "x": x,
        "y": y.astype(np.int64),
        "classes": np.array(["normal", "pneumonia"]),
        "client": np.array([one.name for one in HOSPITALS])[owner],
        "domain": np.array([one.scanner for one in HOSPITALS])[owner],
        "split": np.where(is_test, "test", "train"),
    }


def solar_plants(source: Path) -> Arrays:
    """Photographs of 2,624 solar cells, mono- and polycrystalline, sound or defective.

    Defective is a probability above one half, as its experts gave it. From the package
    ``elpv-dataset``, not from ``--data``. Several cells are of one module, and the set does not say
    which: cells of a module may be in training and test.
    """
    from elpv_dataset.utils import load_dataset

    x, probability, kind = load_dataset()
    return {
        "x": x,
        "y": (probability > 0.5).astype(np.int64),
        "classes": np.array(["sound", "defective"]),
        "domain": kind,
    }


def in_levels(values: npt.NDArray[Any]) -> Pixels:
    """Values in [0, 1] as 0 to 255."""
    levels: Pixels = np.rint(np.clip(values, 0.0, 1.0) * 255).astype(np.uint8)
    return levels


def resized(x: Pixels, side: int) -> Pixels:
    """Grey images [n, h, w] as [n, side, side], bilinear by Pillow; unchanged at that size."""
    if x.shape[1:] == (side, side):
        return x
    bilinear = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side), bilinear)) for one in x])


def scanned(x: Pixels, hospital: Hospital, generator: np.random.Generator) -> Pixels:
    """Grey images [n, h, w] as the hospital's scanner would show them: contrast, blur, noise."""
    grey = 128.0 + hospital.contrast * (x.astype(np.float64) - 128.0)
    grey = gaussian_filter(grey, (0.0, hospital.blur, hospital.blur))
    grey += hospital.noise * generator.standard_normal(x.shape)
    shown: Pixels = np.rint(np.clip(grey, 0.0, 255.0)).astype(np.uint8)
    return shown


STUDIES: Mapping[str, Callable[[Path], Arrays]] = {
    "digits-three-sensors": digits_three_sensors,
    "omniglot-drawers": omniglot_drawers,
    "pneumonia-hospitals": pneumonia_hospitals,
    "solar-plants": solar_plants,
}
"""What makes each study's arrays, by the name of its scenario."""


def main() -> None:
    """Write the files that are missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="raw data")
    parser.add_argument("--target", type=Path, default=TARGET, help=f"default {TARGET}")
    options = parser.parse_args()
    target = options.target.expanduser()
    target.mkdir(parents=True, exist_ok=True)
    for name, make in STUDIES.items():
        path = target / f"{name}.npz"
        if not path.is_file():
            arrays = make(options.data)
            np.savez(path, **arrays)  # type: ignore[arg-type]
            print(f"{path}: x {arrays['x'].dtype} {list(arrays['x'].shape)}")


if __name__ == "__main__":
    main()

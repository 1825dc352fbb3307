"""Trunks of rows against what they are meant to be, and against loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.preprocessing import QuantileTransformer

from fedtl import seeding
from fedtl.data.examples import Examples
from fedtl.data.scaling import alone
from fedtl.data.tables import load_table
from fedtl.errors import InputError, SecurityRefusal
from fedtl.scenario import schema
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.row_trunks import (
    LEAVES,
    STATISTICS,
    rows_through,
    rows_width,
    window_statistics,
)
from fedtl.types import Float32

ARRAYS = schema.Data(source="arrays", path="a.npz")


def trunk(name: str, seed: int = 3, **keys: Any) -> Backbone:
    return open_backbone(schema.Backbone.model_validate({"name": name, **keys}), seed)


def rows(num: int = 50, columns: int = 6, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).normal(size=(num, columns)).astype(np.float32)


def test_fourier_features_have_the_products_of_the_gaussian_kernel() -> None:
    x, scale = rows(40, 4), 0.7
    distances = cdist(x, x, "sqeuclidean")
    kernel = np.exp(-distances / (2 * (scale * np.sqrt(4)) ** 2))
    errors = []
    for width in (256, 4096, 65_536):
        made = rows_through(trunk("fourier", width=width, scale=scale), x, ARRAYS)
        assert made.shape == (40, width)
        errors.append(np.abs(made @ made.T - kernel).max())
    assert errors[2] < 0.02 < errors[0]  # each entry has a deviation of 1 / sqrt(width) at most
    assert errors == sorted(errors, reverse=True)


def test_fourier_features_are_seeded() -> None:
    x = rows()
    made = rows_through(trunk("fourier"), x, ARRAYS)
    assert made.tobytes() == rows_through(trunk("fourier"), x, ARRAYS).tobytes()
    assert (made != rows_through(trunk("fourier", seed=4), x, ARRAYS)).any()
    one, two = trunk("fourier").identity(), trunk("fourier", seed=4).identity()
    assert one["weights"] != two["weights"]
    assert one != trunk("fourier", scale=2.0).identity()
    assert one != trunk("fourier", width=100).identity()
    assert seeding.key(3, "backbone") != seeding.key(4, "backbone")


@pytest.fixture
def public(tmp_path: Path) -> Path:
    """A public source set, csv: the label follows from two of three numbers, and from a name."""
    rng = np.random.default_rng(7)
    lines = ["a,b,c,kind,label"]
    for _ in range(400):
        a, b, c = rng.normal(size=3)
        kind = rng.choice(["u", "v"])
        lines.append(f"{a},{b},{c},{kind},{int(a * b > 0) ^ (kind == 'u')}")
    path = tmp_path / "public.csv"
    path.write_text("\n".join(lines))
    return path


def table_data(path: Path) -> schema.Data:
    given = {
        "categorical": ["kind"],
        "categories": {"kind": ["u", "v"]},
        "numeric": ["a", "b", "c"],
    }
    return schema.Data.model_validate({"source": "table", "path": str(path), **given})


@pytest.mark.parametrize(
    ("model", "kind"), [("forest", RandomForestClassifier), ("extra_trees", ExtraTreesClassifier)]
)
def test_leaves_of_a_forest_of_the_public_set(model: str, kind: Any, public: Path) -> None:
    data = table_data(public)
    table = load_table(data).table
    assert table is not None
    x = alone(table, data)
    backbone = trunk("forest", path=str(public), model=model, width=100)
    made = rows_through(backbone, x[:80], data)
    trees = 100 // LEAVES
    assert made.shape == (80, trees * LEAVES)
    assert backbone.dim == trees * LEAVES
    key = seeding.key(3, "backbone") % 2**32
    forest = kind(n_estimators=trees, max_leaf_nodes=LEAVES, random_state=key)
    leaves = forest.fit(x, load_table(data).labels).apply(x[:80])
    proximity = (leaves[:, None] == leaves[None]).mean(axis=2)
    np.testing.assert_allclose(made @ made.T, proximity, atol=1e-6)
    assert ((made > 0).sum(axis=1) == trees).all()


def test_quantiles_of_the_public_set(public: Path) -> None:
    data = table_data(public)
    table = load_table(data).table
    assert table is not None
    x = alone(table, data)
    made = rows_through(trunk("forest", path=str(public), model="quantiles"), x[:30], data)
    wanted = QuantileTransformer(n_quantiles=400).fit(x).transform(x[:30])
    np.testing.assert_allclose(made, wanted, atol=1e-6)
    assert 0 <= made.min() <= made.max() <= 1


def test_a_forest_of_ready_features(tmp_path: Path) -> None:
    x = rows(60, 2)
    lines = [f"{a},{b},{int(a > b)}" for a, b in x.tolist()]
    (tmp_path / "p.csv").write_text("f,g,y\n" + "\n".join(lines))
    backbone = trunk("forest", path=str(tmp_path / "p.csv"), width=64)
    made = rows_through(backbone, x, ARRAYS)
    assert made.shape == (60, 64)
    with pytest.raises(InputError, match="public source set has 2 columns, and the data have 6"):
        rows_through(backbone, rows(), ARRAYS)


def test_a_public_set_is_known_by_its_hash(public: Path) -> None:
    first = trunk("forest", path=str(public))
    public.write_text(public.read_text() + "\n0,0,0,u,1")
    assert trunk("forest", path=str(public)).identity() != first.identity()
    with pytest.raises(SecurityRefusal):
        rows_through(first, rows(5, 8), table_data(public))
    with pytest.raises(SecurityRefusal):
        trunk("forest", path=str(public), sha256="0" * 64)
    with pytest.raises(InputError):
        trunk("forest", path=str(public.with_name("none.csv")))


def slow(series: list[list[float]], window: int) -> list[float]:
    """One series' statistics by definition."""
    steps, channels = len(series), len(series[0])
    size = min(window, steps)
    starts = list(range(0, steps, size))
    if starts[-1] + size > steps:
        starts[-1] = steps - size
    found = []
    for start in starts:
        for channel in range(channels):
            part = np.array([series[start + i][channel] for i in range(size)])
            slope = np.polyfit(np.arange(size), part, 1)[0] if size > 1 else 0.0
            step = np.abs(part[1:] - part[:-1]).mean() if size > 1 else 0.0
            found += [part.mean(), part.std(), part.min(), part.max(), slope, step]
    return found


@pytest.mark.parametrize(
    ("steps", "channels", "window"), [(12, 1, 4), (13, 2, 4), (3, 3, 8), (5, 1, 1), (9, 2, 9)]
)
def test_windows_against_loops(steps: int, channels: int, window: int) -> None:
    x = rows(7, steps * channels)
    backbone = trunk("windows", window=window, channels=channels)
    made = rows_through(backbone, x, ARRAYS, channels)
    series = x.reshape(7, steps, channels)
    wanted = [slow(one.tolist(), window) for one in series]
    np.testing.assert_allclose(made, wanted, atol=1e-5)
    assert made.tobytes() == window_statistics(series, window).tobytes()
    assert made.shape[1] % len(STATISTICS) == 0


def test_channels_that_do_not_come_out_even() -> None:
    with pytest.raises(InputError, match=r"backbone.channels: rows of 7 numbers are no whole"):
        rows_through(trunk("windows", channels=2), rows(4, 7), ARRAYS)
    with pytest.raises(InputError, match=r"backbone.channels: the series have another number"):
        rows_through(trunk("windows", channels=2), rows(4, 6), ARRAYS, 3)
    assert rows_through(trunk("fourier"), rows(4, 6), ARRAYS, 3).shape == (4, 512)


@pytest.mark.parametrize(
    "keys", [{"name": "fourier", "width": 300}, {"name": "windows", "window": 4}]
)
def test_a_row_alone_is_the_row_among_others(keys: dict[str, Any]) -> None:
    x, backbone = rows(1500, 9), trunk(**keys)
    together = rows_through(backbone, x, ARRAYS)
    some = np.array([0, 3, 700, 1023, 1024, 1499])
    assert together[some].tobytes() == rows_through(backbone, x[some], ARRAYS).tobytes()
    assert together.dtype == np.float32


def test_widths_are_known_before() -> None:
    labels = np.zeros(5, np.int32)
    for keys in ({"name": "identity"}, {"name": "fourier"}, {"name": "windows", "window": 2}):
        backbone = trunk(**keys)
        x = rows(5, 6)
        examples = Examples(labels, ("a", "b"), "f", features=x)
        wanted = rows_through(backbone, x, ARRAYS).shape[1]
        assert rows_width(backbone, examples, ARRAYS) == wanted

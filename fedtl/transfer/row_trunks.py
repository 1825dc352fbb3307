"""Trunks of rows: random Fourier features, forests of a public source set, windows of a series.

Each row goes through by itself, in the same order of additions whatever rows are beside it, so that
a client alone has the same features as in a simulation.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from fedtl.data.arrays import load_arrays
from fedtl.data.examples import Examples
from fedtl.data.scaling import alone, column_labels
from fedtl.data.tables import load_table
from fedtl.errors import InputError
from fedtl.scenario import schema
from fedtl.transfer import weights
from fedtl.transfer.backbones import NO_PREPROCESSING, Backbone
from fedtl.types import Float32, Float64, Int64

ROWS_AT_ONCE = 1024
LEAVES = 16
"""Of each tree of a forest."""

STATISTICS = ("mean", "deviation", "minimum", "maximum", "slope", "step")
"""Of a window: ``slope`` per step is that of the least-squares line, ``step`` the mean absolute
difference of neighbours."""

Embed = Callable[[Float32], Float32]


def open_rows(section: schema.Backbone, key: int) -> Backbone:
    """The trunks ``fourier``, ``forest`` and ``windows``; nothing is fitted yet.

    ``fourier``: sqrt(2 / D) cos(W x + b), whose products approach the Gaussian kernel
    exp(-|x - y|^2 / (2 s^2)) of bandwidth s = scale * sqrt(columns) as D grows. Source: Rahimi and
    Recht 2007, algorithm 1.
    ``forest``: leaves as features. ``forest`` and ``extra_trees`` are scikit-learn's classifiers
    of width / 16 trees with 16 leaves at most, fitted on a public source set of the same columns;
    a row is 1 / sqrt(trees) at the leaf it falls into, so that products are the share of trees
    in which two rows meet (Breiman's proximity). ``quantiles`` replaces each column by its
    quantile in the public set.
    ``windows``: mean, deviation, minimum, maximum, slope and step of each window and channel of a
    series; the last window ends with it, and overlaps where the steps do not come out even.

    Args:
        section: the scenario's ``[backbone]``.
        key: 64-bit, of the seed's stream ``backbone``.

    Raises:
        InputError: a public set that is not there.
        SecurityRefusal: it has not the stated hash.
    """
    return {"fourier": _open_fourier, "forest": _open_forest, "windows": _open_windows}[
        section.name
    ](section, key)


def rows_through(
    backbone: Backbone, rows: Float32, data: schema.Data, channels: int | None = None
) -> Float32:
    """What a trunk that takes rows makes of them, float32 [n, d] -> [n, D].

    Args:
        data: the scenario's; a public set is read as the private ones are.
        channels: of series, where the data say how many.

    Raises:
        InputError: rows of a width that the trunk cannot take, or a public set unlike them.
    """
    embed = backbone.embed
    if embed is None:
        return rows
    expected = backbone.settings.get("channels", channels)
    if channels not in (None, expected):
        raise InputError(
            "the series have another number of channels",
            where="backbone.channels",
            got=expected,
            allowed=channels,
        )
    if backbone.name == "forest":
        embed = fitted(backbone, data, rows.shape[1])
    return embed(rows)


def rows_width(backbone: Backbone, examples: Examples, data: schema.Data) -> int:
    """D of these rows, before any went through."""
    if examples.table is not None:
        columns = len(column_labels(examples.table, data))
    else:
        columns = np.asarray(examples.features).shape[1]
    if backbone.name in ("windows", "onnx") and backbone.embed is not None:
        return int(backbone.embed(np.zeros((1, columns), np.float32)).shape[1])
    return backbone.known_dim or int(columns)


def _open_fourier(section: schema.Backbone, key: int) -> Backbone:
    def embed(rows: Float32) -> Float32:
        return _in_parts(rows, *fourier_weights(rows.shape[1], section.width, section.scale, key))

    settings = {"width": section.width, "scale": section.scale}
    digest = hashlib.sha256(f"fourier {key} {settings}".encode()).hexdigest()
    return _described(section, "cosine", digest, "random", section.width, settings, embed)


def fourier_weights(columns: int, width: int, scale: float, key: int) -> tuple[Float64, Float64]:
    """W [columns, width], normal with deviation 1 / bandwidth, and b [width] in [0, 2 pi)."""
    generator = np.random.Generator(np.random.Philox(key=key))
    bandwidth = scale * math.sqrt(columns)
    directions = generator.standard_normal((columns, width)) / bandwidth
    return directions, generator.uniform(0.0, 2 * np.pi, width)


def _in_parts(rows: Float32, directions: Float64, phases: Float64) -> Float32:
    width = len(phases)
    made = np.empty((len(rows), width), np.float32)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows[start : start + ROWS_AT_ONCE].astype(np.float64)
        angles = np.tile(phases, (len(part), 1))
        for column in range(part.shape[1]):  # a product of matrices adds in an order of its own
            angles += part[:, column, None] * directions[column]
        made[start : start + ROWS_AT_ONCE] = math.sqrt(2 / width) * np.cos(angles)
    return made


def _open_windows(section: schema.Backbone, key: int) -> Backbone:
    def embed(rows: Float32) -> Float32:
        steps, rest = divmod(rows.shape[1], section.channels)
        if rest:
            raise InputError(
                f"rows of {rows.shape[1]} numbers are no whole number of steps of that many "
                "channels",
                where="backbone.channels",
                got=section.channels,
            )
        series = rows.reshape(len(rows), steps, section.channels)
        return window_statistics(series, section.window)

    settings = {"window": section.window, "channels": section.channels}
    return _described(section, "statistics", "none", "none", 0, settings, embed)


def window_statistics(series: Float32, window: int) -> Float32:
    """``STATISTICS`` of each window and channel.

    Args:
        series: float32 [n, steps, channels].
        window: steps; a shorter series is one window.

    Returns:
        float32 [n, windows * channels * 6], in this order.
    """
    steps, size = series.shape[1], min(window, series.shape[1])
    starts = [*range(0, steps - size, size), steps - size]
    time = np.arange(size) - (size - 1) / 2
    slopes = time / max(float((time**2).sum()), 1.0)
    made = []
    for start in starts:
        part = series[:, start : start + size].astype(np.float64)
        step = np.abs(np.diff(part, axis=1)).mean(axis=1) if size > 1 else 0.0 * part[:, 0]
        slope = (part * slopes[:, None]).sum(axis=1)
        whole = (part.mean(axis=1), part.std(axis=1), part.min(axis=1), part.max(axis=1))
        made.append(np.stack([*whole, slope, step], axis=2))
    return np.stack(made, axis=1).reshape(len(series), -1).astype(np.float32)


def _open_forest(section: schema.Backbone, key: int) -> Backbone:
    import sklearn

    if section.path is None:
        raise InputError("needs a public source set", where="backbone.path", got=None)
    model = section.model or "forest"
    trees = max(1, section.width // LEAVES)
    settings = {
        "model": model,
        "key": key,
        "fitted with": f"scikit-learn {sklearn.__version__}",
        **({} if model == "quantiles" else {"trees": trees}),
    }
    path = Path(section.path).expanduser()
    digest = weights.hash_file(path, section.sha256)
    width = 0 if model == "quantiles" else trees * LEAVES
    found = _described(section, "leaves", digest, path.name, width, settings, _unfitted)
    return replace(found, weights_path=path)


def _unfitted(rows: Float32) -> Float32:
    raise AssertionError("a forest is fitted first, which takes the scenario's data section")


def _described(
    section: schema.Backbone,
    cut: str,
    digest: str,
    source: str,
    width: int,
    settings: dict[str, Any],
    embed: Embed,
) -> Backbone:
    return Backbone(
        section.name,
        cut,
        NO_PREPROCESSING,
        digest,
        source,
        _no_network,
        width,
        takes="rows",
        settings=settings,
        embed=embed,
    )


def _no_network() -> Any:
    raise InputError(
        "this trunk is no network that could be cut", where="backbone.name", do="Train its head"
    )


def fitted(backbone: Backbone, data: schema.Data, columns: int) -> Embed:
    """The forest or quantiles of the public source set.

    Raises:
        InputError: the set has other columns than the rows.
        SecurityRefusal: the file changed since it was opened.
    """
    assert backbone.weights_path is not None
    weights.hash_file(backbone.weights_path, backbone.weights_hash)
    public, labels = _public(backbone.weights_path, data)
    if public.shape[1] != columns:
        raise InputError(
            f"the public source set has {public.shape[1]} columns, and the data have {columns}",
            where="backbone.path",
            do="State data.numeric and data.categories, which hold for both",
        )
    model, key = backbone.settings["model"], int(backbone.settings["key"]) % 2**32
    if model == "quantiles":
        from sklearn.preprocessing import QuantileTransformer

        quantiles = QuantileTransformer(n_quantiles=min(1000, len(public)), random_state=key)
        quantiles.fit(public)
        return lambda rows: cast(Float32, quantiles.transform(rows).astype(np.float32))
    from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier

    kind = ExtraTreesClassifier if model == "extra_trees" else RandomForestClassifier
    trees = int(backbone.settings["trees"])
    forest = kind(n_estimators=trees, max_leaf_nodes=LEAVES, random_state=key)
    forest.fit(public, labels)
    return functools.partial(leaf_features, forest)


def leaf_features(forest: Any, rows: Float32) -> Float32:
    """float32 [n, trees * 16]: 1 / sqrt(trees) at each tree's leaf, leaves counted within it."""
    leaves, trees = forest.apply(rows), len(forest.estimators_)
    made = np.zeros((len(rows), trees, LEAVES), np.float32)
    for number, tree in enumerate(forest.estimators_):
        ends: Int64 = np.flatnonzero(tree.tree_.children_left == -1)
        made[np.arange(len(rows)), number, np.searchsorted(ends, leaves[:, number])] = 1.0
    return made.reshape(len(rows), -1) / np.float32(math.sqrt(trees))


def _public(path: Path, data: schema.Data) -> tuple[Float32, Any]:
    """Rows and labels of the public source set, read and scaled as one more client's."""
    section = data.model_copy(update={"path": str(path), "domain": None, "client": None})
    if data.source == "table":
        examples = load_table(section)
        assert examples.table is not None
        return alone(examples.table, data), examples.labels
    examples = load_arrays(section)
    if examples.features is None:
        raise InputError("the public source set holds no features", where="backbone.path")
    return examples.features, examples.labels

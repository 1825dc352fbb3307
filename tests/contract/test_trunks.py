"""Every kind of trunk goes through one list of checks: frozen, row by row, stored as it is made,
known by what its features depend on, and rebuilt without its weights where it can be cut."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.data.examples import ArrayImages
from fedtl.scenario import schema
from fedtl.transfer.backbones import OPENERS, Backbone, open_backbone
from fedtl.transfer.features import FeatureStore
from fedtl.transfer.row_trunks import rows_through

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            for _ in range(2)
        ))
        self.drop = nn.Dropout(0.5)

    def forward(self, images):
        return self.drop(self.blocks(self.first(images)).mean((2, 3)))
"""
SCALED = {"mean": [120.0, 110.0, 100.0], "std": [60.0, 61.0, 62.0]}


@dataclass(frozen=True)
class Case:
    """One kind of trunk.

    Attributes:
        section: its ``[backbone]``; what stands in ``paths`` lies in the tests' folder.
        other: keys that give other features, each by itself.
        takes: the kind of its examples.
        licence: what is known of it.
    """

    section: dict[str, Any]
    other: tuple[dict[str, Any], ...]
    takes: str = "images"
    paths: tuple[str, ...] = ()
    licence: str = "unknown"
    seeded: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


CASES = {
    "efficientnet_lite0": Case({"image_size": 32}, ({"image_size": 40}, {"weights": "none"}),
                               licence="Apache-2.0"),
    "torchvision": Case({"name": "squeezenet1_1", "weights": "none", "image_size": 32},
                        ({"image_size": 40}, {"name": "squeezenet1_0"}), seeded=True),
    "timm": Case({"name": "timm", "model": "test_resnet", "weights": "none", "image_size": 32},
                 ({"image_size": 40}, {"model": "test_byobnet"}), seeded=True),
    "hub": Case({"name": "hub", "path": "clone", "model": "net", "image_size": 32, **SCALED},
                ({"image_size": 40}, {"model": "wider"}, {"mean": [0.0] * 3}),
                paths=("path",), seeded=True),
    "module": Case({"name": "module", "path": "own", "model": "contract_net:Net",
                    "weights": "net.safetensors", "image_size": 32, **SCALED},
                   ({"image_size": 40}, {"weights": "none"}, {"std": [1.0] * 3}),
                   paths=("path", "weights"), facts={"weights_source": "net.safetensors"}),
    "onnx": Case({"name": "onnx", "weights": "net.onnx", "image_size": 32, **SCALED},
                 ({"image_size": 40}, {"weights": "nhwc.onnx"}, {"mean": [0.0] * 3},
                  {"output": "map"}),
                 paths=("weights",), facts={"weights_source": "net.onnx"}),
    "onnx, one at a time": Case({"name": "onnx", "weights": "nhwc.onnx"},
                                ({"weights": "net.onnx", "image_size": 32}, SCALED),
                                paths=("weights",)),
    "onnx of rows": Case({"name": "onnx", "weights": "rows.onnx", "licence": "CC-BY-4.0"},
                         ({"output": "centred"},), "rows", ("weights",), "CC-BY-4.0"),
    "identity": Case({"name": "identity"}, ({"name": "fourier"},), "rows"),
    "fourier": Case({"name": "fourier", "width": 20}, ({"scale": 2.0}, {"width": 24}), "rows",
                    seeded=True),
    "forest": Case({"name": "forest", "path": "public.npz", "width": 64},
                   ({"model": "quantiles"}, {"width": 32}), "rows", ("path",), seeded=True),
    "windows": Case({"name": "windows", "window": 3, "channels": 2}, ({"window": 2},), "rows"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A clone, a module, ONNX files and a public set, all tiny."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("trunks")
    (folder / "clone/parts").mkdir(parents=True)
    (folder / "clone/parts/contract_clone.py").write_text(NET)
    (folder / "clone/hubconf.py").write_text(
        "from parts.contract_clone import Net as net\n"
        "def wider():\n    made = net()\n    made.drop = made.drop.train()\n"
        "    made.first.bias.data += 1\n    return made\n"
    )
    (folder / "own").mkdir()
    (folder / "own/contract_net.py").write_text(NET)
    space: dict[str, Any] = {}
    exec(NET, space)
    torch.manual_seed(1)
    net = space["Net"]()
    for norm in (net.blocks[0][1], net.blocks[1][1]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    save_file(net.state_dict(), folder / "net.safetensors")
    write_pictures(net.eval().requires_grad_(False), folder)
    write_rows(folder / "rows.onnx")
    x = np.random.default_rng(5).normal(size=(80, 12)).astype(np.float32)
    np.savez(folder / "public.npz", x=x, y=(x[:, 0] > 0).astype(np.int64))
    yield folder
    for name in ("contract_net", "parts.contract_clone", "parts"):
        sys.modules.pop(name, None)


def write_pictures(net: Any, folder: Path) -> None:
    """``net.onnx``, which takes any number of images of any size, and one for one image NHWC."""
    import onnx
    import torch

    class Last(torch.nn.Module):
        def forward(self, images: Any) -> Any:
            return net(images.permute(0, 3, 1, 2))

    def export(module: Any, example: Any, path: Path, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracing exporter is called legacy
            torch.onnx.export(module, (example,), path, dynamo=False, **options)

    axes = {"images": {0: "n", 2: "h", 3: "w"}, "features": {0: "n"}}
    path, names = folder / "net.onnx", {"input_names": ["images"], "output_names": ["features"]}
    export(net, torch.zeros(2, 3, 32, 32), path, dynamic_axes=axes, **names)
    model = onnx.load(path)
    before = next(n for n in model.graph.node if n.op_type == "ReduceMean").input[0]
    for node in model.graph.node:
        for values in (node.input, node.output):
            values[:] = ["map" if name == before else name for name in values]
    onnx.save(model, path)
    export(Last(), torch.zeros(1, 32, 32, 3), folder / "nhwc.onnx")


def write_rows(path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(2).normal(size=(12, 5)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Sub", ["x", "mean"], ["centred"]),
            helper.make_node("MatMul", ["centred", "weight"], ["y"]),
        ],
        "rows",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.ones(12, np.float32), "mean"),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path
    )


Open = Callable[..., Backbone]


@pytest.fixture(scope="module")
def opened(folder: Path) -> Open:
    """A case's backbone with some keys changed; the same one at every call."""
    known: dict[str, Backbone] = {}

    def open_case(name: str, /, seed: int = 0, **changes: Any) -> Backbone:
        case = CASES[name]
        content = {**case.section, **changes}
        for key in case.paths:
            if content.get(key) not in (None, "none"):
                content[key] = str(folder / content[key])
        key = f"{seed} {content}"
        if key not in known:
            known[key] = open_backbone(schema.Backbone(**content), seed)
        return known[key]

    return open_case


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (9, 36, 33, 3), dtype=np.uint8)


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(4).normal(size=(70, 12)).astype(np.float32)


IMAGES = [name for name, case in CASES.items() if case.takes == "images"]
ROWS = [name for name, case in CASES.items() if case.takes == "rows"]


def at_size(backbone: Backbone, pixels: np.ndarray) -> np.ndarray:
    return np.stack([backbone.preprocessing.apply(image) for image in pixels])


def test_every_kind_is_here() -> None:
    kinds = {case.section.get("name", "efficientnet_lite0") for case in CASES.values()}
    assert set(OPENERS) - kinds == {"hf"}  # tests/unit/transfer holds those of texts


@pytest.mark.parametrize("name", IMAGES)
def test_frozen_finite_and_image_by_image(opened: Open, pixels: np.ndarray, name: str) -> None:
    import torch

    backbone = opened(name)
    trunk = backbone.trunk()
    trunk.train()
    assert not any(part.training for part in trunk.modules())
    assert not any(weight.requires_grad for weight in trunk.parameters())
    before = backbone.state_hash(trunk)
    images = torch.from_numpy(at_size(backbone, pixels))
    with torch.inference_mode():
        found = trunk(images).numpy()
        single = np.concatenate([trunk(image[None]).numpy() for image in images[:4]])
    assert backbone.state_hash(trunk) == before
    assert found.shape == (len(pixels), backbone.dim)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert np.ptp(found, axis=0).max() > 0
    np.testing.assert_allclose(single, found[:4], atol=1e-5 * np.abs(found).max())


@pytest.mark.parametrize("name", IMAGES)
def test_stored_is_what_is_made_again(
    opened: Open, pixels: np.ndarray, name: str, tmp_path: Path
) -> None:
    import torch

    backbone, store = opened(name), FeatureStore(tmp_path)
    images = ArrayImages(pixels)
    first = store.features(backbone, images, name)
    kept = store.features(backbone, images, name)
    assert (first.cached, kept.cached) == (False, True)
    again = store.features(backbone, images, f"{name} again", threads=2)
    assert not again.cached
    assert kept.matrix.tobytes() == first.matrix.tobytes() == again.matrix.tobytes()
    with torch.inference_mode():
        plain = backbone.trunk()(torch.from_numpy(at_size(backbone, pixels))).numpy()
    np.testing.assert_allclose(first.matrix, plain, atol=1e-3 * np.abs(plain).max())


@pytest.mark.parametrize("name", ROWS)
def test_rows_one_by_one(opened: Open, rows: np.ndarray, name: str) -> None:
    backbone, data = opened(name), schema.Data(source="arrays", path="any.npz")
    found = rows_through(backbone, rows, data)
    assert found.dtype == np.float32
    assert len(found) == len(rows)
    assert np.isfinite(found).all()
    assert found.shape[1] == (backbone.dim or found.shape[1])
    single = np.concatenate([rows_through(backbone, row[None], data) for row in rows[:9]])
    np.testing.assert_array_equal(single, found[:9])
    np.testing.assert_array_equal(rows_through(backbone, rows, data), found)


@pytest.mark.parametrize("name", CASES)
def test_known_by_what_its_features_depend_on(opened: Open, name: str) -> None:
    case, identity = CASES[name], opened(name).identity()
    assert opened(name, licence="which no feature depends on").identity() == identity
    for changes in case.other:
        assert opened(name, **changes).identity() != identity, changes
    assert (opened(name, seed=1).identity() != identity) == case.seeded


@pytest.mark.parametrize("name", CASES)
def test_what_is_told_of_it(opened: Open, name: str) -> None:
    backbone, case = opened(name), CASES[name]
    card = backbone.card()
    assert backbone.takes == case.takes
    assert card["licence"] == case.licence
    assert card["weights_sha256"] == backbone.weights_hash
    assert card["weights_source"]
    assert all(getattr(backbone, key) == value for key, value in case.facts.items())
    if case.takes == "images":
        assert card["preprocessing"]["crop"] == backbone.image_size
        if "mean" in case.section:
            assert list(card["preprocessing"]["mean"]) == SCALED["mean"]
    assert opened(name, licence="my own").licence == "my own"


@pytest.mark.parametrize("name", [n for n in IMAGES if not n.startswith("onnx")])
def test_rebuilt_without_its_weights(opened: Open, pixels: np.ndarray, name: str) -> None:
    """Any process makes the same network from plain values; the tensors come by another way."""
    import json

    import torch

    from fedtl.transfer.skeletons import skeleton

    backbone = opened(name)
    trunk = backbone.trunk()
    bare = skeleton(json.loads(json.dumps(dict(backbone.skeleton))))
    bare.load_state_dict(trunk.state_dict())
    images = torch.from_numpy(at_size(backbone, pixels[:3]))
    with torch.inference_mode():
        assert torch.equal(bare(images), trunk(images))


def test_pictures_reach_an_onnx_model_as_they_reach_torch(
    opened: Open, folder: Path, pixels: np.ndarray
) -> None:
    """The same network as a module and as ONNX, in both layouts and cut at a map: one answer."""
    import torch

    images = torch.from_numpy(at_size(opened("module"), pixels))
    with torch.inference_mode():
        wanted = opened("module").trunk()(images).numpy()
        for name, changes in (
            ("onnx", {}),
            ("onnx", {"output": "map"}),
            ("onnx, one at a time", SCALED),
        ):
            found = opened(name, **changes).trunk()(images).numpy()
            np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert opened("onnx", output="map").settings["averaged"]

"""ONNX files: what is read of them, what is refused, and the ways they come from elsewhere."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedtl.errors import InputError, SecurityRefusal
from fedtl.scenario import schema
from fedtl.transfer.backbones import Backbone, open_backbone

ROOT = Path(__file__).resolve().parents[3]
RNG = np.random.default_rng(0)
FLOAT = TensorProto.FLOAT


def opened(path: Path, **changes: Any) -> Backbone:
    return open_backbone(schema.Backbone(name="onnx", weights=str(path), **changes), 0)


def write(
    path: Path,
    shape: list[int | str] | None = None,
    *,
    element: int = FLOAT,
    output: str = "features",
    extra: Callable[[Any], None] | None = None,
) -> Path:
    """[n, 3, h, w] -> ``map`` [n, 4, h, w] -> ``features`` [n, 4], and ``tokens`` [n, 4, h * w]."""
    shape = shape or ["n", 3, 16, 16]
    weight = RNG.normal(size=(4, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["float"], to=FLOAT),
        helper.make_node("Conv", ["float", "weight"], ["map"]),
        helper.make_node("GlobalAveragePool", ["map"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Reshape", ["map", "rows"], ["tokens"]),
        helper.make_node("Transpose", ["map"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("ReduceMax", ["features"], ["largest"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "picture",
        [helper.make_tensor_value_info("x", element, shape)],
        [onnx.ValueInfoProto(name=name) for name in [output]],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(np.array([0, 4, -1]), "rows"),
        ],
    )
    graph.output[0].CopyFrom(helper.make_tensor_value_info(output, FLOAT, None))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    if extra is not None:
        extra(model)
    path.write_bytes(model.SerializeToString())
    return path


def pixels(count: int, size: int = 16) -> np.ndarray:
    return RNG.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def run(backbone: Backbone, images: np.ndarray) -> np.ndarray:
    import torch

    return backbone.trunk()(torch.from_numpy(images)).numpy()


def by_hand(path: Path, images: np.ndarray, mean: Any = 0.0, std: Any = 1.0) -> np.ndarray:
    """The mean of the one convolution of 1 x 1, in float64."""
    weight = numpy_helper.to_array(onnx.load(path).graph.initializer[0])[:, :, 0, 0]
    return ((images.astype(np.float64) - mean) / std).mean((1, 2)) @ weight.T.astype(np.float64)


def test_pixels_as_they_are_or_scaled(tmp_path: Path) -> None:
    path, images = write(tmp_path / "a.onnx"), pixels(5)
    plain = opened(path)
    assert (plain.image_size, plain.dim, plain.takes) == (16, 4, "images")
    assert plain.weights_hash == hashlib.sha256(path.read_bytes()).hexdigest()
    assert plain.weights_path == path
    np.testing.assert_allclose(run(plain, images), by_hand(path, images), rtol=1e-4)
    scaled = opened(path, mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])
    wanted = by_hand(path, images, np.array([1.0, 2, 3]), np.array([4.0, 5, 6]))
    np.testing.assert_allclose(run(scaled, images), wanted, rtol=1e-4)


@pytest.mark.parametrize("element", [TensorProto.UINT8, TensorProto.DOUBLE, TensorProto.FLOAT16])
def test_other_numbers_at_the_door(tmp_path: Path, element: int) -> None:
    path, images = write(tmp_path / "a.onnx", element=element), pixels(3)
    np.testing.assert_allclose(run(opened(path), images), by_hand(path, images), rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 3, "n"])
def test_batches_of_any_size(tmp_path: Path, batch: int | str) -> None:
    path = write(tmp_path / "a.onnx", [batch, 3, 16, 16])
    backbone, images = opened(path), pixels(7)
    for count in (1, 2, 3, 7):
        found = run(backbone, images[:count])
        np.testing.assert_allclose(found, by_hand(path, images[:count]), rtol=1e-4)


def test_a_batch_that_is_said_to_be_free_and_is_not(tmp_path: Path) -> None:
    def fix(model: Any) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, 4]), "one"))
        model.graph.node.append(helper.make_node("Reshape", ["features", "one"], ["fixed"]))
        model.graph.output[0].name = "fixed"

    path, images = write(tmp_path / "a.onnx", extra=fix), pixels(4)
    np.testing.assert_allclose(run(opened(path), images), by_hand(path, images), rtol=1e-4)


def test_any_value_can_be_the_feature_vector(tmp_path: Path) -> None:
    path, images = write(tmp_path / "a.onnx", output="largest"), pixels(3)
    for output, averaged in (("features", False), ("map", True), ("last", True)):
        backbone = opened(path, output=output)
        assert (backbone.cut, backbone.settings["averaged"]) == (output, averaged)
        np.testing.assert_allclose(run(backbone, images), by_hand(path, images), rtol=1e-4)
    with pytest.raises(InputError, match=r"Did you mean 'features'"):
        opened(path, output="feature")


@pytest.mark.parametrize("output", ["map", "tokens", "largest"])
def test_an_output_that_is_no_vector(tmp_path: Path, output: str) -> None:
    with pytest.raises(InputError, match="not a vector") as refused:
        opened(write(tmp_path / "a.onnx", output=output))
    assert "'features'" in str(refused.value)
    assert "shape (" in str(refused.value)
    assert "'map'" in str(refused.value)


@pytest.mark.parametrize(
    ("shape", "changes", "says"),
    [
        (["n", 3, 16, 20], {}, "not square"),
        (["n", 3, 16, 16], {"image_size": 32}, "another size"),
        (["n", 3, "h", "w"], {}, "backbone.image_size"),
        (["n", 3, 16, 16], {"layout": "nhwc"}, "three colours"),
        (["n", 1, 16, 16], {}, "three colours"),
        (["n", 3, 16, 3], {}, "nchw"),
        (["n", 3, 16], {}, "neither images nor rows"),
    ],
)
def test_images_that_do_not_fit(
    tmp_path: Path, shape: list[int | str], changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        opened(write(tmp_path / "a.onnx", shape), **changes)


@pytest.mark.parametrize("element", [TensorProto.STRING, TensorProto.INT8, TensorProto.BOOL])
def test_inputs_that_are_no_numbers(tmp_path: Path, element: int) -> None:
    with pytest.raises(InputError, match="neither pixels nor numbers"):
        opened(write(tmp_path / "a.onnx", element=element))


def test_more_than_one_way_in_or_out(tmp_path: Path) -> None:
    def second_input(model: Any) -> None:
        model.graph.input.append(helper.make_tensor_value_info("mask", FLOAT, ["n"]))

    def second_output(model: Any) -> None:
        model.graph.output.append(helper.make_tensor_value_info("map", FLOAT, None))

    with pytest.raises(InputError, match=r"one input.*'x', 'mask'"):
        opened(write(tmp_path / "a.onnx", extra=second_input))
    both = write(tmp_path / "b.onnx", extra=second_output)
    with pytest.raises(InputError, match=r"'features', 'map'.*backbone\.output"):
        opened(both)
    assert opened(both, output="features").dim == 4


def test_operators_of_others(tmp_path: Path) -> None:
    def custom(model: Any) -> None:
        model.graph.node[3].domain = "my.company"
        model.opset_import.append(helper.make_opsetid("my.company", 1))

    with pytest.raises(InputError, match=r"operators.*'my\.company'"):
        opened(write(tmp_path / "a.onnx", extra=custom))


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x08\x07", b"PK\x03\x04zip"])
def test_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(InputError, match="not a readable ONNX model"):
        opened(tmp_path / "a.onnx")


def test_cut_short_anywhere(tmp_path: Path) -> None:
    content = write(tmp_path / "a.onnx").read_bytes()
    for length in range(0, len(content), 37):
        (tmp_path / "b.onnx").write_bytes(content[:length])
        with pytest.raises(InputError):
            opened(tmp_path / "b.onnx")


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtl.transfer.onnx_files.MAX_BYTES", 50)
    with pytest.raises(InputError, match="at most 50 bytes"):
        opened(write(tmp_path / "a.onnx"))


def test_the_stated_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "a.onnx")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert opened(path, sha256=digest[:8]).weights_hash == digest
    with pytest.raises(SecurityRefusal, match="SHA-256 differs"):
        opened(path, sha256="0" * 64)


def beside(folder: Path, location: str, **more: str) -> Path:
    """A model whose weight lies in another file."""

    def outside(model: Any) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, **more}.items():
            tensor.external_data.add(key=key, value=value)

    return write(folder / "a.onnx", extra=outside)


def test_data_beside_the_model(tmp_path: Path) -> None:
    weight = RNG.normal(size=12).astype(np.float32)
    (tmp_path / "a.bin").write_bytes(weight.tobytes())
    path, images = beside(tmp_path, "a.bin"), pixels(3)
    backbone = opened(path)
    wanted = images.mean((1, 2)) @ weight.reshape(4, 3).T
    np.testing.assert_allclose(run(backbone, images), wanted, rtol=1e-4)
    assert backbone.weights_path is None  # two files, and one can travel
    (tmp_path / "a.bin").write_bytes((weight + 1).tobytes())
    assert opened(path).weights_hash != backbone.weights_hash


@pytest.mark.parametrize(
    "location",
    ["../secret.bin", "/etc/hostname", "below/../../secret.bin", "", "link.bin", "down/secret.bin",
     "C:\\secret.bin", "..\\secret.bin", "a\0.bin"],
)  # fmt: skip
def test_data_from_outside_the_folder(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "down").symlink_to(tmp_path)
    with pytest.raises(SecurityRefusal, match=r"outside its own folder; nothing was read"):
        opened(beside(folder, location))


@pytest.mark.parametrize("more", [{"offset": "-1"}, {"length": "999"}, {"offset": "x"}])
def test_more_data_than_there_are(tmp_path: Path, more: dict[str, str]) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(48))
    with pytest.raises(SecurityRefusal, match="more data than there are"):
        opened(beside(tmp_path, "a.bin", **more))


def test_data_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        opened(beside(tmp_path, "gone.bin"))


def test_data_from_outside_deep_in_the_graph(tmp_path: Path) -> None:
    """A constant inside the branch of an If, which no list of the model's tensors names."""

    def deep(model: Any) -> None:
        constant = numpy_helper.from_array(np.zeros(4, np.float32), "c")
        constant.ClearField("raw_data")
        constant.data_location = TensorProto.EXTERNAL
        constant.external_data.add(key="location", value="../secret.bin")
        node = helper.make_node("Constant", [], ["inner"], value=constant)
        branch = helper.make_graph(
            [node], "b", [], [helper.make_tensor_value_info("inner", FLOAT, [4])]
        )
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        model.graph.node.append(
            helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch)
        )

    with pytest.raises(SecurityRefusal, match="outside its own folder"):
        opened(write(tmp_path / "a.onnx", extra=deep))


def test_run_by_onnx_runtime_alone(tmp_path: Path) -> None:
    from fedtl.transfer.extraction import Exports, resolve_way

    backbone, exports = opened(write(tmp_path / "a.onnx")), Exports(tmp_path)
    assert resolve_way("auto", "cuda", backbone, exports) == "onnx"
    with pytest.raises(InputError, match="ONNX Runtime alone"):
        resolve_way("torch", "cpu", backbone, exports)


def documented(name: str) -> str:
    """A block of docs/trunks.md, as it stands there."""
    found = re.findall(rf"```python {name}\n(.*?)```", (ROOT / "docs/trunks.md").read_text(), re.S)
    assert len(found) == 1
    return str(found[0])


def test_a_pipeline_of_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/trunks.md says: whatever skl2onnx converts takes rows."""
    monkeypatch.chdir(tmp_path)
    x = RNG.normal(size=(100, 6)).astype(np.float32)
    np.save("public.npy", x)
    space: dict[str, Any] = {}
    exec(documented("scikit-learn"), space)
    backbone = opened(tmp_path / "trunk.onnx")
    assert (backbone.takes, backbone.dim) == ("rows", 4)
    assert backbone.embed is not None
    np.testing.assert_allclose(backbone.embed(x), space["fitted"].transform(x), atol=1e-5)
    with pytest.raises(InputError, match=r"another width.*5 columns.*6"):
        backbone.embed(x[:, :5])
    with pytest.raises(InputError, match="takes rows"):
        opened(tmp_path / "trunk.onnx", image_size=32)


MAKE_KERAS = """
import keras, numpy as np
inputs = keras.Input((16, 16, 3))
x = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
x = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(x)
x = keras.layers.BatchNormalization()(x)
x = keras.layers.GlobalAveragePooling2D()(x)
keras.Model(inputs, keras.layers.Dense(10)(x)).save("mine.keras")
"""
CALL_KERAS = """
np.save("y.npy", trunk.predict(np.load("x.npy").astype("float32"), verbose=0))
"""


def test_a_keras_model(tmp_path: Path) -> None:
    """As docs/trunks.md says: cut by Keras, exported by Keras, rescaling inside."""
    images = pixels(3)
    np.save(tmp_path / "x.npy", images)
    code = MAKE_KERAS + documented("keras") + CALL_KERAS
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    backbone = opened(tmp_path / "trunk.onnx")
    assert (backbone.image_size, backbone.dim, backbone.settings["layout"]) == (16, 8, "nhwc")
    np.testing.assert_allclose(run(backbone, images), np.load(tmp_path / "y.npy"), atol=1e-5)


def test_the_backbone_of_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/trunks.md says, but small and not downloaded: a map averaged over its places."""
    import torch

    monkeypatch.chdir(tmp_path)
    code = documented("detector")
    assert 'weights="DEFAULT"' in code
    code = code.replace('weights="DEFAULT"', "weights=None, weights_backbone=None")
    space: dict[str, Any] = {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code.replace("320, 320", "64, 64"), space)
    images, path = pixels(3, 64), tmp_path / "trunk.onnx"
    with pytest.raises(InputError, match=r"'map0', 'map1'"):
        opened(path)
    backbone = opened(path, output="map1", mean=[127.5] * 3, std=[127.5] * 3)
    scaled = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127.5) / 127.5
    wanted = space["detector"].backbone(scaled)["1"].mean((2, 3)).numpy()
    assert backbone.dim == wanted.shape[1]
    np.testing.assert_allclose(run(backbone, images), wanted, atol=1e-5 * np.abs(wanted).max())

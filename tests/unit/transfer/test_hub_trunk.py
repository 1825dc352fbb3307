"""Trunks that are somebody's own code, and timm's: what is found, what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.errors import EnvironmentFault, InputError, SecurityRefusal
from fedtl.scenario import schema
from fedtl.transfer.backbones import Backbone, open_backbone

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3))

class Map(Net):
    def forward(self, x):
        return self.conv(x)

class Pair(Net):
    def forward(self, x):
        return (x, x)

class Raises(Net):
    def forward(self, x):
        raise KeyError("private")

def unready(size):
    return Net()

def number():
    return 7

VALUE = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a module of its own name, so that no other test's is found."""
    (tmp_path / "own_trunks.py").write_text(CODE)
    return tmp_path


@pytest.fixture(autouse=True)
def _forget() -> Any:
    before, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - before:
        if name.startswith(("own_", "broken_")):
            del sys.modules[name]


def module(folder: Path, model: str = "own_trunks:Net", **changes: Any) -> Backbone:
    asked = {"name": "module", "path": str(folder), "model": model, "image_size": 16, **changes}
    return open_backbone(schema.Backbone(**asked), 0)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("own_trunks:Nett", r"no such class in own_trunks.*Did you mean 'Net'"),
        ("own_trunks:VALUE", "no such class"),
        ("nowhere_trunks:Net", r"nowhere_trunks cannot be imported.*ModuleNotFoundError"),
        ("own_trunks:unready", r"cannot be made.*TypeError"),
        ("own_trunks:number", r"makes no torch module.*int"),
        ("own_trunks:Map", r"gives no feature vectors.*shape \(1, 4, 14, 14\)"),
        ("own_trunks:Pair", r"gives no feature vectors.*tuple"),
        ("own_trunks:Raises", r"fails on an image.*KeyError"),
    ],
)
def test_modules_that_are_refused(own: Path, model: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        module(own, model)


def test_code_that_fails_as_it_is_imported(own: Path) -> None:
    (own / "broken_trunks.py").write_text("1 / 0")
    with pytest.raises(InputError, match=r"cannot be imported.*ZeroDivisionError"):
        module(own, "broken_trunks:Net")
    (own / "broken_syntax.py").write_text("def (")
    with pytest.raises(InputError, match=r"cannot be imported.*SyntaxError"):
        module(own, "broken_syntax:Net")


def test_weights_and_code_are_in_the_identity(own: Path) -> None:
    import torch
    from safetensors.torch import save_file

    first = module(own)
    assert first.weights_source == "own"
    assert first.identity() == module(own, weights="none").identity()
    state = {k: torch.ones_like(v) for k, v in first.trunk().body.state_dict().items()}
    save_file(state, own / "ones.safetensors")
    loaded = module(own, weights=str(own / "ones.safetensors"))
    assert loaded.weights_source == "ones.safetensors"
    images = torch.full((2, 16, 16, 3), 2, dtype=torch.uint8)
    wanted = (3 * 9 * 2 + 1 - 1) / np.sqrt(1 + 1e-5) + 1
    np.testing.assert_allclose(loaded.trunk()(images).numpy(), wanted, rtol=1e-6)
    before = first.identity()["settings"]["code"]
    (own / "own_trunks.py").write_text(CODE + "\n# another\n")
    assert module(own).identity()["settings"]["code"] != before
    with pytest.raises(SecurityRefusal, match="SHA-256 differs"):
        module(own, weights=str(own / "ones.safetensors"), sha256="0" * 64)
    save_file({"conv.weight": state["conv.weight"]}, own / "few.safetensors")
    with pytest.raises(InputError, match=r"do not fit.*missing"):
        module(own, weights=str(own / "few.safetensors"))


def test_a_helper_is_in_the_identity(own: Path) -> None:
    before = module(own).identity()["settings"]["code"]
    (own / "helper.py").write_text("SCALE = 2\n")
    assert module(own).identity()["settings"]["code"] != before
    (own / "own_package" / "deep").mkdir(parents=True)
    for folder in ("own_package", "own_package/deep"):
        (own / folder / "__init__.py").write_text("")
    (own / "own_package" / "deep" / "net.py").write_text(CODE)
    before = module(own, "own_package.deep.net:Net").identity()["settings"]["code"]
    (own / "own_package" / "scale.py").write_text("SCALE = 2\n")
    assert module(own, "own_package.deep.net:Net").identity()["settings"]["code"] != before


def test_a_module_of_another_folder_is_not_taken_for_this(own: Path) -> None:
    module(own)
    (own / "other").mkdir()
    (own / "other" / "own_trunks.py").write_text(CODE)
    with pytest.raises(InputError, match="imported before"):
        module(own / "other")
    (own / "json.py").write_text(CODE)
    with pytest.raises(InputError, match="imported before"):
        module(own, "json:Net")


def clone(folder: Path, model: str = "net") -> Backbone:
    asked = schema.Backbone(name="hub", path=str(folder), model=model, image_size=16)
    return open_backbone(asked, 0)


def test_clones_that_are_refused(own: Path) -> None:
    with pytest.raises(InputError, match=r"no hubconf\.py"):
        clone(own)
    (own / "hubconf.py").write_text("from own_trunks import Net as net, Raises as bad\nX = 1 / 0\n")
    with pytest.raises(InputError, match=r"no such entry point.*Did you mean 'net'"):
        clone(own, "nett")
    with pytest.raises(InputError, match=r"cannot be made.*ZeroDivisionError"):
        clone(own)
    (own / "hubconf.py").write_text("def (")
    with pytest.raises(InputError, match="no Python file"):
        clone(own)


def test_a_clone(own: Path) -> None:
    (own / "hubconf.py").write_text("from own_trunks import Net as net\n")
    backbone = clone(own)
    assert (backbone.dim, backbone.cut) == (4, "output")
    before = backbone.identity()["settings"]["code"]
    (own / "more.py").write_text("")
    assert clone(own).identity()["settings"]["code"] != before


def timm_trunk(**changes: Any) -> Backbone:
    asked = {"name": "timm", "model": "test_resnet", "weights": "none", "image_size": 32, **changes}
    return open_backbone(schema.Backbone(**asked), 0)


def test_timm_by_name_and_by_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    import torch
    from safetensors.torch import save_file

    with pytest.raises(InputError, match=r"no model of this name.*Did you mean 'test_resnet'"):
        timm_trunk(model="test_resnt")
    torch.manual_seed(3)
    model = timm.create_model("test_resnet").eval()  # with the classifier that is left out
    save_file(model.state_dict(), tmp_path / "full.safetensors")
    backbone = timm_trunk(weights=str(tmp_path / "full.safetensors"))
    assert backbone.weights_source == "full.safetensors"
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    told = timm.data.resolve_data_config({}, model=model)
    mean, std = (255 * torch.tensor(told[key]) for key in ("mean", "std"))
    with torch.inference_mode():
        scaled = ((images - mean) / std).permute(0, 3, 1, 2)
        wanted = model.forward_head(model.forward_features(scaled), pre_logits=True)
        np.testing.assert_allclose(backbone.trunk()(images), wanted, atol=1e-5)
    with pytest.raises(InputError, match="do not fit the model test_byobnet"):
        timm_trunk(model="test_byobnet", weights=str(tmp_path / "full.safetensors")).trunk()


def test_timm_without_timm_or_the_net(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("timm")

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("Name or service not known")

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub, "get_hf_file_metadata", offline)
    with pytest.raises(EnvironmentFault, match=r"could not be downloaded.*model\.safetensors"):
        timm_trunk(weights="default")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(EnvironmentFault, match="uv sync --extra timm"):
        timm_trunk()


def test_timm_published_weights_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    hub = pytest.importorskip("huggingface_hub")
    from safetensors.torch import save_file

    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "model.safetensors")
    kept = str(tmp_path / "model.safetensors")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: kept)
    backbone = timm_trunk(weights="default", image_size=None)
    facts = timm.get_pretrained_cfg("test_resnet")
    assert backbone.licence == facts.license != ""
    assert backbone.image_size == facts.input_size[-1]
    assert backbone.trunk()

"""Every network that can be cut: what lies in front of a cut and what lies behind it are the whole.

Weights are random and pictures small; the structure is the published one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtl.clients.batched import one_torch_thread
from fedtl.errors import InputError
from fedtl.scenario import schema
from fedtl.transfer import cuts
from fedtl.transfer.backbones import open_backbone

TORCHVISION = {
    "efficientnet_lite0": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
}
TIMM = ("resnet10t", "vit_tiny_patch16_224", "convnext_atto")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_torch_thread():
        yield


def pictures(size: int, count: int = 2) -> Tensor:
    stream = np.random.default_rng(0)
    return torch.from_numpy(stream.integers(0, 256, (count, size, size, 3), dtype=np.uint8))


def same_in_two(trunk: nn.Module, examples: Tensor, seed: int) -> None:
    """Cut at all blocks' ends at random, at other places too, and before everything."""
    graph = cuts.trace(trunk)
    modules = {name.removeprefix("body."): part for name, part in trunk.named_modules()}
    every, blocks = cuts.boundaries(graph.graph), cuts.blocks(graph.graph, modules)
    assert len(blocks) > 2
    stream = np.random.default_rng(seed)
    chosen = [blocks[-1], blocks[stream.integers(len(blocks))], every[stream.integers(len(every))]]
    with torch.inference_mode():
        whole = trunk(examples)
        for place in (None, *chosen):
            front, back = cuts.split(graph, place)
            shape = cuts.value_shape(graph, place, examples) if place else tuple(examples.shape[1:])
            between = front(examples)
            assert between.shape == (len(examples), np.prod(shape))
            again = back(between.reshape(-1, *shape))
            apart = (again - whole).abs().max() / whole.abs().max()
            assert apart <= 1e-5, (place, apart)
            assert not any(name.startswith("body.") for name in back.state_dict())


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_torchvision_network_is_the_same_in_two(name: str) -> None:
    size = TORCHVISION[name]
    section = schema.Backbone(name=name, weights="none", image_size=size)
    same_in_two(open_backbone(section, 1).trunk(), pictures(size), seed=len(name))


@pytest.mark.parametrize("name", TIMM)
def test_a_timm_network_is_the_same_in_two(name: str) -> None:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32} if "vit" in name else {}
    model = timm.create_model(name, pretrained=False, num_classes=0, **options).eval()

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, pixels: Tensor) -> Tensor:
            found: Tensor = self.body(pixels.permute(0, 3, 1, 2).to(torch.float32) / 255)
            return found

    same_in_two(Trunk().eval(), pictures(32), seed=len(name))


class Choosing(nn.Module):
    """Its way depends on its data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found if found.sum() > 0 else -found


def test_a_part_that_cannot_be_followed_stays_whole() -> None:
    trunk = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Choosing(), nn.Linear(4, 4)), Choosing())
    graph = cuts.trace(trunk)
    names = {name for place in cuts.boundaries(graph.graph) for name in place.names}
    assert {"1.0", "1.1", "2"} <= names
    assert "2.layer" not in names
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    front, back = cuts.split(graph, cuts.find(trunk, graph.graph, "2"))
    assert torch.equal(back(front(x)), trunk(x))


def test_a_network_that_cannot_be_followed_at_all_is_refused_with_words() -> None:
    with pytest.raises(InputError) as caught:
        cuts.trace(Choosing())
    assert "depends on its data" in caught.value.what
    assert caught.value.do == 'Use transfer.mode = "head"'


def test_a_wrong_name_gives_the_nearest_and_a_number_too_large_the_range() -> None:
    trunk = open_backbone(
        schema.Backbone(name="resnet18", weights="none", image_size=32), 1
    ).trunk()
    graph = cuts.trace(trunk).graph
    with pytest.raises(InputError) as caught:
        cuts.find(trunk, graph, "layer44")
    assert caught.value.do == "Did you mean 'layer4'? 'fedtl cuts' shows where blocks begin"
    with pytest.raises(InputError) as caught:
        cuts.find(trunk, graph, 9)
    assert caught.value.allowed == "0 to 8"
    # two tensors pass before a residual branch's second convolution
    with pytest.raises(InputError, match="more than one tensor"):
        cuts.find(trunk, graph, "layer4.0.conv2")
    assert cuts.find(trunk, graph, 2) == cuts.find(trunk, graph, "layer4")
    assert cuts.find(trunk, graph, 0) is None


def test_cut_points_say_what_each_cut_takes() -> None:
    trunk = open_backbone(
        schema.Backbone(name="resnet18", weights="none", image_size=32), 1
    ).trunk()
    points = cuts.cut_points(trunk, pictures(32, count=1))
    assert [point.blocks for point in points] == [*range(8, 0, -1)]
    last = points[-1]
    assert (last.name, last.shape) == ("layer4.1", (512, 1, 1))
    assert last.parameters == 2 * 512 * 512 * 9 + 4 * 512
    assert last.flops == 2 * 2 * 512 * 512 * 9  # two convolutions over one pixel
    assert points[0].parameters > points[1].parameters > last.parameters


def test_two_threads_trace_one_after_the_other() -> None:
    """torch.fx changes nn.Module for the whole process, and two at once left it changed."""
    plain, before = nn.Module.__call__, sys.getswitchinterval()
    trunks = [nn.Sequential(*(nn.Linear(4, 4) for _ in range(60))) for _ in range(4)]
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            graphs = list(pool.map(cuts.trace, trunks * 4))
    finally:
        sys.setswitchinterval(before)
    assert nn.Module.__call__ is plain
    assert all(sum(n.op == "call_module" for n in g.graph.nodes) == 60 for g in graphs)

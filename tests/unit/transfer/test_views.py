"""Views of images: the same pixels wherever they are drawn, rows where they belong."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedtl.build import open_data, open_examples, population_of
from fedtl.data.examples import ArrayImages, Examples
from fedtl.data.leakage import find_leaks
from fedtl.deployment.private_data import owned
from fedtl.forecast import forecast
from fedtl.ready_features import ReadyFeatures, make_features
from fedtl.scenario.schema import Augmentation, Scenario
from fedtl.transfer.features import FeatureStore
from fedtl.transfer.views import KINDS, Recipe

ALL = Recipe(KINDS, 5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small pictures of two classes at three clients."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("pictures") / "mine.npz"
    x = rng.integers(0, 255, (40, 24, 20, 3), dtype=np.uint8)
    client = np.array(["a", "b", "c"])[rng.integers(0, 3, 40)]
    np.savez(path, x=x, y=np.arange(40) % 2, client=client)
    return path


def scenario_of(pictures: Path, views: int, **data: object) -> Scenario:
    return Scenario.model_validate(
        {
            "name": "views",
            "data": {"source": "arrays", "path": str(pictures), **data},
            "clients": {"partition": "natural"},
            "backbone": {"name": "squeezenet1_1", "weights": "none", "image_size": 32},
            "augmentation": {"views": views},
            "engine": {"device": "cpu", "threads": 1},
        }
    )


@pytest.fixture(scope="module")
def plain(pictures: Path) -> ReadyFeatures:
    return make_features(open_data(scenario_of(pictures, 1)))


@pytest.fixture(scope="module")
def viewed(pictures: Path, plain: ReadyFeatures) -> ReadyFeatures:
    return make_features(open_data(scenario_of(pictures, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_is_another_picture_of_the_same_size(kind: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    recipe = Recipe((kind,), 5)
    assert recipe.view(pixels, 0) is pixels
    views = [recipe.view(pixels, number) for number in range(1, 9)]
    assert all(view.shape == pixels.shape and view.dtype == np.uint8 for view in views)
    assert any((view != pixels).any() for view in views)
    assert len({view.tobytes() for view in views}) >= 2


def test_pixels_follow_from_seed_image_and_number_alone() -> None:
    import torch

    rng = np.random.default_rng(2)
    images = [rng.integers(0, 255, (16, 18, 3), dtype=np.uint8) for _ in range(6)]
    asked = [(image, number) for image in images for number in (1, 2)]
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = [ALL.view(image, number) for image, number in asked]
    assert torch.equal(torch.rand(3), expected)  # the process's generator is as it was
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda one: ALL.view(*one), reversed(asked)))[::-1]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((ALL.view(i, 1) != replace(ALL, seed=6).view(i, 1)).any() for i in images)


def test_images_are_not_all_treated_alike() -> None:
    rng = np.random.default_rng(4)
    images = [rng.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(20)]
    turned = [(Recipe(("flip",), 5).view(image, 1) != image).any() for image in images]
    assert 0 < sum(turned) < 20


def test_kinds_are_done_in_one_order() -> None:
    turned = Augmentation(kinds=["colour", "flip", "crop", "flip"])
    assert Recipe.of(turned, 1) == Recipe(("crop", "flip", "colour"), 1)


def test_every_training_image_is_several_rows_of_its_own_client(
    plain: ReadyFeatures, viewed: ReadyFeatures
) -> None:
    count = len(plain.examples)
    assert viewed.views == 2 * len(plain.split.train.index)
    assert len(viewed.examples) == len(viewed.matrix) == count + viewed.views
    assert (viewed.matrix[:count] == plain.matrix).all()
    assert (viewed.split.test.index == plain.split.test.index).all()
    hashes = [row.tobytes() for row in plain.content]
    assert len(set(hashes)) == count
    for client in range(len(plain.split.names)):
        rows, own = viewed.split.train.of(client), plain.split.train.of(client)
        assert (np.diff(rows) > 0).all()
        origins = [hashes.index(viewed.content[row].tobytes()) for row in rows]
        assert sorted(origins) == sorted(own.tolist() * 3)
        assert (viewed.examples.labels[rows] == plain.examples.labels[origins]).all()
    assert find_leaks(viewed.content, viewed.split, viewed.examples).train_test == 0
    assert population_of(viewed).train.counts.sum() == 3 * len(plain.split.train.index)
    assert viewed.examples.identity == plain.examples.identity


def test_rows_are_the_trunks_features_of_the_views(
    pictures: Path, plain: ReadyFeatures, viewed: ReadyFeatures
) -> None:
    opened = open_data(scenario_of(pictures, 3))
    images, recipe = opened.examples.images, Recipe.of(opened.scenario.augmentation, 0)
    assert images is not None
    assert viewed.examples.images is not None
    train = np.sort(plain.split.train.index)
    for number in (1, 2):
        pixels = np.stack([recipe.view(images.load(int(i)), number) for i in train])
        made = FeatureStore().features(opened.backbone, ArrayImages(pixels), f"by hand {number}")
        low = len(plain.examples) + (number - 1) * len(train)
        assert (viewed.matrix[low : low + len(train)] == made.matrix).all()
        assert (viewed.examples.images.load(low) == pixels[0]).all()
        assert f"view {number}" in viewed.examples.where(low)
    assert (viewed.matrix[len(plain.examples) :] != 0).any()


def test_more_views_find_the_fewer(
    pictures: Path, plain: ReadyFeatures, viewed: ReadyFeatures
) -> None:
    assert plain.facts["through_trunk"] == 40
    train = len(plain.split.train.index)
    assert viewed.facts["through_trunk"] == 2 * train
    scenario = scenario_of(pictures, 4)
    planned = forecast(open_data(scenario))
    width = plain.matrix.shape[1]
    assert (planned.cached, planned.feature_bytes) == (False, 4 * width * (40 + 3 * train))
    more = make_features(open_data(scenario))
    assert more.facts["through_trunk"] == train
    assert more.facts["num_bytes"] == planned.feature_bytes
    assert forecast(open_data(scenario)).cached
    again = make_features(open_data(scenario))
    assert (again.facts["cached"], again.facts["through_trunk"]) == (True, 0)
    assert (again.matrix == more.matrix).all()


def _at_home(examples: Examples, name: str) -> Examples:
    """What a client of this name has on its own disk."""
    assert examples.clients is not None
    rows = np.flatnonzero(examples.clients == examples.client_names.index(name))
    return examples.subset(rows)


@pytest.mark.parametrize("shots", [None, 3])
def test_a_real_client_makes_the_rows_of_its_simulated_self(
    pictures: Path, shots: int | None
) -> None:
    scenario = scenario_of(pictures, 2, shots=shots)
    simulated = make_features(open_data(scenario))
    whole = open_data(scenario_of(pictures, 1)).examples
    for client, name in enumerate(simulated.split.names):
        mine = owned(_at_home(whole, name), whole.classes, name)
        real = make_features(open_examples(scenario, mine))
        for of in ("train", "test"):
            here, there = (getattr(f.split, of).of(k) for f, k in ((simulated, client), (real, 0)))
            assert (simulated.matrix[here] == real.matrix[there]).all()
            assert (simulated.examples.labels[here] == real.examples.labels[there]).all()


def test_bad_pictures_leave_with_their_views(fedtl: Callable[..., object], tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    (tmp_path / "pictures" / "cat" / "bad.png").write_bytes(b"no picture")
    content = scenario_of(tmp_path / "pictures", 3, source="folder", on_bad_file="skip", shots=4)
    natural = content.model_copy(
        update={"clients": content.clients.model_copy(update={"partition": "iid", "num": 2})}
    )
    ready = make_features(open_data(natural))
    train, test = ready.split.train.counts.sum(), ready.split.test.counts.sum()
    assert ready.views == train - train // 3
    assert len(ready.examples) - ready.views == train // 3 + test
    assert not any("bad" in ready.examples.where(i) for i in range(len(ready.examples)))

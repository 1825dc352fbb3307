from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtl.data.examples import ArrayImages, BadImage
from fedtl.errors import EnvironmentFault, InputError
from fedtl.scenario import schema
from fedtl.transfer import entries
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.extraction import OnnxForward
from fedtl.transfer.features import FeatureStore, StoredFeatures

Tiny = Callable[..., Backbone]


class Spoilt(ArrayImages):
    """Images of which some cannot be decoded."""

    def __init__(self, pixels: np.ndarray, bad: tuple[int, ...]) -> None:
        super().__init__(pixels)
        self.bad = bad

    def load(self, i: int) -> np.ndarray:
        if i in self.bad:
            raise BadImage(self.where(i), "it is cut short")
        return super().load(i)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "store")


def folders(store: FeatureStore) -> set[str]:
    """What lies in the store, locks apart."""
    return {path.name for path in (store.root / "features").iterdir()} - {"locks"}


def get(store: FeatureStore, backbone: Backbone, pixels: Any, **options: Any) -> StoredFeatures:
    images = ArrayImages(pixels) if isinstance(pixels, np.ndarray) else pixels
    return store.features(backbone, images, "data", **{"threads": 2, **options})


def test_features_are_made_once(store: FeatureStore, tiny: Tiny, pixels: np.ndarray) -> None:
    import torch

    backbone = tiny()
    made, found = get(store, backbone, pixels), get(store, backbone, pixels)
    assert (made.cached, found.cached) == (False, True)
    squares = np.stack([backbone.preprocessing.apply(p) for p in pixels])
    with torch.inference_mode():
        expected = np.asarray(backbone.trunk()(torch.from_numpy(squares)))
    for stored in (made, found):
        assert stored.way == "onnx"
        assert np.abs(stored.matrix - expected).max() <= 1e-4
        assert stored.matrix.dtype == np.float32
        assert isinstance(stored.matrix, np.memmap)
        assert not stored.matrix.flags.writeable
        assert stored.kept.tolist() == list(range(50))
        assert stored.content.shape == (50, 16)
        assert stored.num_bytes == 50 * 8 * 4
        assert stored.notes == ()
        assert np.array_equal(np.load(stored.path, mmap_mode="r"), stored.matrix)
    assert len({row.tobytes() for row in made.content}) == 50


def test_content_hashes_are_of_decoded_pixels(store: FeatureStore, tiny: Tiny) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    images[2] = images[0]
    content = get(store, tiny(), images).content
    assert (content[0] == content[2]).all()
    assert (content[0] != content[1]).any()
    turned = store.features(tiny(), ArrayImages(images.reshape(3, 6, 4, 3)), "turned").content
    assert (turned[0] != content[0]).any()  # same bytes, other shape


def test_the_key_holds_all_that_matters(
    store: FeatureStore, tiny: Tiny, pixels: np.ndarray
) -> None:
    base = get(store, tiny(), pixels).path
    others = [
        get(store, tiny(weights_hash="other"), pixels),
        get(store, tiny(name="other"), pixels),
        get(store, tiny(cut="other"), pixels),
        get(store, tiny(preprocessing=tiny().preprocessing.at(17)), pixels),
        get(store, tiny(), pixels, dtype="float16"),
        get(store, tiny(), pixels, way="torch"),
        store.features(tiny(), ArrayImages(pixels), "other data"),
    ]
    assert not any(stored.cached for stored in others)
    assert len({base, *(stored.path for stored in others)}) == 8
    assert others[4].matrix.dtype == np.float16


def test_bits_do_not_depend_on_workers(tmp_path: Path, tiny: Tiny, pixels: np.ndarray) -> None:
    made = [
        get(FeatureStore(tmp_path / str(n)), tiny(), pixels, threads=n, way=way)
        for way in ("onnx", "torch")
        for n in (1, 2, 5)
    ]
    for way in (made[:3], made[3:]):
        assert all((stored.matrix == way[0].matrix).all() for stored in way)


@pytest.mark.parametrize("way", ["onnx", "torch"])
def test_bits_do_not_depend_on_the_other_images(
    store: FeatureStore, pixels: np.ndarray, way: str
) -> None:
    # torch's kernels give this model's images other bits in a batch of one than in one of eight
    backbone = open_backbone(schema.Backbone(name="mobilenet_v3_small", weights="none"), 0)
    whole = get(store, backbone, pixels[:21], way=way).matrix
    for rows in ([4], [20, 3, 11], [*range(19)], [*range(2, 20), 1, 0]):
        some = store.features(backbone, ArrayImages(pixels[rows]), str(rows), way=way).matrix
        assert some.tobytes() == whole[rows].tobytes(), rows


def test_bad_images_stop_and_all_are_named(
    store: FeatureStore, tiny: Tiny, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Spoilt(pixels, (3, 20, 21, 30, 40, 49))
    with pytest.raises(InputError) as error:
        get(store, tiny(), images)
    line = error.value.line()
    assert all(f"row {i}: it is cut short" in line for i in (3, 20, 21, 30, 40))
    assert "6 images" in line
    assert "and 1 more" in line
    assert "on_bad_file = 'skip'" in line
    assert folders(store) == set()

    calls: list[int] = []
    right = OnnxForward.run
    monkeypatch.setattr(OnnxForward, "run", lambda self, x: calls.append(len(x)) or right(self, x))
    with pytest.raises(InputError):
        get(store, tiny(), Spoilt(pixels, (0, 49)), threads=1)
    assert calls == []  # the trunk never ran, the last bad image was found all the same


def test_bad_images_are_skipped_when_asked(
    store: FeatureStore, tiny: Tiny, pixels: np.ndarray, tmp_path: Path
) -> None:
    bad = (0, 17, 49)
    skipped = get(store, tiny(), Spoilt(pixels, bad), on_bad_file="skip")
    rows = [i for i in range(50) if i not in bad]
    assert skipped.kept.tolist() == rows
    assert "left out 3 images: row 0: it is cut short; row 17" in skipped.notes[0]
    whole = get(FeatureStore(tmp_path / "whole"), tiny(), pixels)
    assert (skipped.matrix == whole.matrix[rows]).all()
    assert (skipped.content == whole.content[rows]).all()
    again = get(store, tiny(), Spoilt(pixels, bad), on_bad_file="skip")
    assert again.cached
    assert again.notes == skipped.notes
    with pytest.raises(InputError, match="row 17"):  # the same store, asked to stop
        get(store, tiny(), Spoilt(pixels, bad), on_bad_file="stop")


def test_nothing_to_do_is_an_error(store: FeatureStore, tiny: Tiny, pixels: np.ndarray) -> None:
    with pytest.raises(InputError, match="no image can be decoded"):
        get(store, tiny(), Spoilt(pixels, tuple(range(50))), on_bad_file="skip")
    with pytest.raises(InputError, match="no image"):
        get(store, tiny(), pixels[:0])


@pytest.mark.parametrize("harm", ["flip", "cut", "gone", "manifest", "swap"])
@pytest.mark.parametrize("name", entries.ARRAYS)
def test_a_damaged_entry_is_made_again(
    store: FeatureStore, tiny: Tiny, pixels: np.ndarray, harm: str, name: str
) -> None:
    before = get(store, tiny(), pixels)
    good, path = before.matrix.copy(), before.path.with_name(name)
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-5])
    elif harm == "gone":
        path.unlink()
    elif harm == "manifest":
        (path.parent / entries.MANIFEST).write_text('{"blake2b": ')
    else:
        path.write_bytes(b"")
    made = get(store, tiny(), pixels)
    assert not made.cached
    assert (made.matrix == good).all()
    assert "damaged" in made.notes[0]
    assert folders(store) == {path.parent.name, "quarantine"}
    assert get(store, tiny(), pixels).cached


def test_a_trunk_that_changes_is_found_out_at_the_end(
    store: FeatureStore, tiny: Tiny, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtl.transfer.extraction import TorchForward

    right = TorchForward.run

    def moving(self: TorchForward, batch: np.ndarray) -> np.ndarray:
        self._trunk.body.norm.running_mean += 1  # type: ignore[union-attr, operator]
        return right(self, batch)

    backbone = tiny()
    backbone.trunk()
    monkeypatch.setattr(TorchForward, "run", moving)
    with pytest.raises(InputError, match="not frozen"):
        get(store, backbone, pixels, way="torch")
    assert folders(store) == set()


def test_a_trunk_that_onnx_refuses_goes_by_torch(
    store: FeatureStore, tiny: Tiny, pixels: np.ndarray
) -> None:
    made = get(store, tiny("unexportable"), pixels)
    assert made.way == "torch"
    assert "run by torch" in made.notes[0]
    found = get(store, tiny("unexportable"), pixels)
    assert (found.way, found.cached) == ("torch", True)
    with pytest.raises(EnvironmentFault, match="extraction = 'auto'"):
        get(store, tiny("unexportable"), pixels, way="onnx")


@pytest.mark.parametrize(
    ("kind", "dtype", "way"), [("huge", "float16", "onnx"), ("nan", "float32", "torch")]
)
def test_features_beyond_numbers_are_refused(
    store: FeatureStore, tiny: Tiny, pixels: np.ndarray, kind: str, dtype: str, way: str
) -> None:
    with pytest.raises(InputError, match=r"too large for float16|NaN or infinity"):
        get(store, tiny(kind), pixels, dtype=dtype, way=way)
    assert folders(store) == set()


def test_a_full_disk(
    store: FeatureStore, tiny: Tiny, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(store.root.parent)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(EnvironmentFault, match="1,000 bytes free") as error:
            get(store, tiny(), pixels)
    assert error.value.exit_code == 3
    assert "FEDTL_CACHE" in error.value.line()

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, block: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    right = entries.FeatureFile.__init__

    def broken(self: entries.FeatureFile, *arguments: Any) -> None:
        right(self, *arguments)
        self._file = Full(self._file)  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        patch.setattr(entries.FeatureFile, "__init__", broken)
        with pytest.raises(EnvironmentFault, match="disk is full"):
            get(store, tiny(), pixels)
    assert folders(store) == set()
    assert not get(store, tiny(), pixels).cached


def test_an_unwritable_store_is_an_environment_fault(
    tiny: Tiny, pixels: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault):
        get(FeatureStore(tmp_path / "file"), tiny(), pixels)


def test_an_interrupt_leaves_nothing(store: FeatureStore, tiny: Tiny, pixels: np.ndarray) -> None:
    def interrupt(done: int, count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(store, tiny(), pixels, progress=interrupt)
    assert folders(store) == set()
    assert not get(store, tiny(), pixels).cached


def test_listing_and_removing(store: FeatureStore, tiny: Tiny, pixels: np.ndarray) -> None:
    assert store.entries() == ()
    first, second = get(store, tiny(), pixels), get(store, tiny(name="b"), pixels)
    os.utime(second.path.with_name(entries.MANIFEST), (1, 1))
    older, newer = store.entries()
    assert (older.backbone, newer.backbone, newer.images) == ("b", "tiny", 50)
    assert older.last_used == 1 < newer.created
    assert newer.key == first.path.parent.name
    assert newer.num_bytes > first.num_bytes
    with pytest.raises(InputError, match="cache ls"):
        store.remove("../features")
    assert store.remove(older.key) == older.num_bytes
    assert [entry.key for entry in store.entries()] == [newer.key]
    assert store.remove() > newer.num_bytes  # the exported trunk goes as well
    assert folders(store) == set()
    assert not (store.root / "trunks").exists()


def test_the_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTL_CACHE", "/somewhere")
    assert FeatureStore().root == Path("/somewhere")
    monkeypatch.delenv("FEDTL_CACHE")
    assert FeatureStore().root == Path.home() / ".cache" / "fedtl"


CHILD = """
import json, os, signal, sys, time
import numpy as np
from pathlib import Path
from fedtl.data.examples import ArrayImages
from fedtl.transfer.backbones import Backbone, open_backbone
from fedtl.transfer.features import FeatureStore
from fedtl.transfer.preprocessing import Preprocessing

def unbuildable():
    raise AssertionError("the export is kept: nothing to build")

class Slow(ArrayImages):
    def load(self, i):
        if i == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return super().load(i)

values = json.loads(sys.argv[2])
values["preprocessing"] = Preprocessing(**values["preprocessing"])
pixels = np.random.default_rng(3).integers(0, 256, (50, 20, 24, 3), dtype=np.uint8)
store = FeatureStore(Path(sys.argv[1]))
made = store.features(Backbone(builder=unbuildable, **values), Slow(pixels), "data", threads=1)
print(json.dumps([made.cached, made.matrix.sum().item(), "torch" in sys.modules]))
"""


def child(store: FeatureStore, backbone: Backbone, die_at: int = -1) -> subprocess.Popen[str]:
    values = {
        "name": backbone.name,
        "cut": backbone.cut,
        "preprocessing": backbone.preprocessing.identity(),
        "weights_hash": backbone.weights_hash,
        "weights_source": backbone.weights_source,
    }
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(store.root), json.dumps(values), str(die_at)],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_of_two_processes_one_builds_and_a_dead_builder_is_no_hindrance(
    store: FeatureStore, tiny: Tiny, pixels: np.ndarray
) -> None:
    # Exporting the trunk here lets the children do without torch: that is part of the test.
    expected = store.features(tiny(), ArrayImages(pixels), "other data").matrix
    store.remove(store.entries()[0].key)

    with child(store, tiny(), die_at=20) as killed:
        assert killed.wait(60) == -signal.SIGKILL
    (left,) = folders(store)
    assert left.startswith(".building-")

    both = [child(store, tiny()) for _ in range(2)]
    told = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert sorted(cached for cached, _, _ in told) == [False, True]
    assert {total for _, total, _ in told} == {expected.sum().item()}
    assert not any(torch_there for _, _, torch_there in told)
    (entry,) = folders(store)
    assert not entry.startswith(".")


def test_an_image_that_gives_nan_is_named(
    store: FeatureStore, tiny: Tiny, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = OnnxForward.run

    def spoil(self: OnnxForward, batch: np.ndarray) -> np.ndarray:
        features = right(self, batch)
        features[(batch == 0).all(axis=(1, 2, 3))] = np.nan
        return features

    pixels[33] = 0
    monkeypatch.setattr(OnnxForward, "run", spoil)
    with pytest.raises(InputError, match="row 33: the trunk gives NaN"):
        get(store, tiny(), pixels)
    assert folders(store) == set()

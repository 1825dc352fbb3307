"""torchvision's sets: from files, from a server on this machine, and without either."""

import errno
import functools
import gzip
import hashlib
import http.server
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedtl.data import torchvision_sets
from fedtl.data.examples import BadImage, Examples
from fedtl.data.torchvision_sets import SETS, load_torchvision, open_part, read_classes, read_labels
from fedtl.errors import EnvironmentFault, InputError
from fedtl.scenario.schema import Data

datasets = pytest.importorskip("torchvision.datasets")

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 28, 28)).astype(np.uint8)
LABELS = np.array([5, 0, 9, 1, 1, 2, 3], dtype=np.uint8)


def idx(array: Any) -> bytes:
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def mnist_files() -> dict[str, bytes]:
    """The four files of MNIST: five training images, two test images."""
    return {
        "train-images-idx3-ubyte": idx(PIXELS[:5]),
        "train-labels-idx1-ubyte": idx(LABELS[:5]),
        "t10k-images-idx3-ubyte": idx(PIXELS[5:]),
        "t10k-labels-idx1-ubyte": idx(LABELS[5:]),
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, data in mnist_files().items():
        (raw / name).write_bytes(data)
    return tmp_path


def load(root: Path, name: str = "MNIST", **options: Any) -> Examples:
    return load_torchvision(Data(source="torchvision", name=name, path=str(root), **options))


def refusal(root: Path, name: str = "MNIST", **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(root, name, **options)
    assert caught.value.exit_code == 2
    return caught.value.line()


@pytest.mark.parametrize(
    ("subset", "rows"), [("train", range(5)), ("test", [5, 6]), ("all", range(7))]
)
def test_subsets_from_files_that_are_there(root: Path, subset: str, rows: Any) -> None:
    examples = load(root, subset=subset)
    assert examples.labels.tolist() == LABELS[list(rows)].tolist()
    assert examples.classes[1] == "1 - one"
    assert examples.is_test is None
    for i, row in enumerate(rows):
        assert (examples.images.load(i) == PIXELS[row][:, :, None]).all()
    assert examples.where(1) == "MNIST row 1"


def test_fingerprints_differ_by_content(root: Path) -> None:
    prints = {load(root, subset=subset).fingerprint for subset in ("train", "test", "all")}
    prints.add(load(root).fingerprint)
    assert len(prints) == 3


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mirror of MNIST on this machine."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name, data in mnist_files().items():
        packed = gzip.compress(data)
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(datasets.MNIST, "resources", resources)
        yield folder
        server.shutdown()
        thread.join()


def test_downloads_what_is_not_there(
    server: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = load(tmp_path / "new" / "root", subset="all")
    assert examples.labels.tolist() == LABELS.tolist()
    assert capsys.readouterr().out == ""
    for file in server.iterdir():
        file.unlink()
    again = load(tmp_path / "new" / "root", subset="all")
    assert again.fingerprint == examples.fingerprint


def test_a_download_with_the_wrong_checksum_is_refused(server: Path, tmp_path: Path) -> None:
    (server / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"tampered"))
    assert "could not be fetched" in refusal(tmp_path / "new")


def test_no_network_names_the_folder_and_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
    text = refusal(tmp_path)
    assert str(tmp_path / "MNIST" / "raw") in text
    assert "t10k-images-idx3-ubyte.gz" in text
    assert "data.path" in text


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_sets, "TIMEOUT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = silent.getsockname()[1]
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{port}/"])
        assert "timed out" in refusal(tmp_path)
    assert socket.getdefaulttimeout() is None


def test_sets_that_cannot_be_fetched(tmp_path: Path) -> None:
    text = refusal(tmp_path, "ImageNet")
    assert str(tmp_path) in text
    assert "torchvision.datasets.ImageNet" in text


def test_damaged_files_are_fetched_again_or_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.MNIST, "mirrors", [])
    (root / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(b"\0\0")
    assert "could not be fetched" in refusal(root)


def test_unknown_names(tmp_path: Path) -> None:
    assert "Did you mean 'CIFAR10'?" in refusal(tmp_path, "cifar10")
    assert "unknown torchvision data set" in refusal(tmp_path, "CocoDetection")
    with pytest.raises(InputError, match=r"data\.name"):
        load_torchvision(Data(source="torchvision"))


def test_the_table_of_sets_fits_torchvision() -> None:
    import inspect

    for name, parts in SETS.items():
        parameters = inspect.signature(getattr(datasets, name)).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        for arguments in parts:
            assert open_ended or set(arguments) <= set(parameters), name


@pytest.fixture
def eurosat(tmp_path: Path) -> Path:
    """A set of image files in class folders, as EuroSAT unpacks."""
    for name in ("Forest", "River"):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (i, len(name), 0)).save(folder / f"{i}.png")
    return tmp_path


def test_sets_of_files(eurosat: Path) -> None:
    examples = load(eurosat, "EuroSAT", subset="train")
    assert examples.classes == ("Forest", "River")
    assert examples.labels.tolist() == [0, 0, 1, 1]
    assert examples.images.load(3)[0, 0].tolist() == [1, 5, 0]
    file = eurosat / "eurosat" / "2750" / "River" / "1.png"
    Image.new("RGB", (8, 8), (9, 9, 9)).save(file)
    assert load(eurosat, "EuroSAT").fingerprint != examples.fingerprint
    with pytest.raises(BadImage, match="max_pixels = 63"):
        load(eurosat, "EuroSAT", max_pixels=63).images.load(0)
    file.write_bytes(b"nonsense")
    with pytest.raises(BadImage, match="cannot be decoded"):
        load(eurosat, "EuroSAT").images.load(3)
    file.unlink()
    with pytest.raises(BadImage, match="EuroSAT row 3: cannot be read"):
        examples.images.load(3)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_the_machines_fault(tmp_path: Path, code: int) -> None:
    class Set:
        def __init__(self, root: Path, download: Any = False) -> None:
            raise OSError(code, "no way") if download else RuntimeError("not found")

    with pytest.raises(EnvironmentFault, match="no way"):
        open_part(Set, tmp_path, {})


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    class Set:
        def __init__(self, root: Path) -> None:
            raise ModuleNotFoundError("No module named 'h5py'", name="h5py")

    with pytest.raises(EnvironmentFault, match="h5py"):
        open_part(Set, tmp_path, {})


class Part:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> tuple[None, int]:
        return None, 7 + i


def test_labels_and_class_names_of_all_kinds_of_sets() -> None:
    assert read_labels(Part(targets=[3, 4])).tolist() == [3, 4]
    assert read_labels(Part(targets=np.array([[3, 9], [4, 9]]))).tolist() == [3, 4]
    assert read_labels(Part(_labels=[1, 2])).tolist() == [1, 2]
    assert read_labels(Part(_samples=[("a.png", 5), ("b.png", 6)])).tolist() == [5, 6]
    assert read_labels(Part()).tolist() == [7, 8]
    two = np.array([0, 1], np.int32)
    assert read_classes(Part(classes=["a", "b"]), two) == ("a", "b")
    assert read_classes(Part(classes=[("a", "x"), ("b",)]), two) == ("a / x", "b")
    assert read_classes(Part(classes=["a"]), two) == ("0", "1")

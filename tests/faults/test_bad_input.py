"""What people get wrong: one line that says what, where and what to do, the right exit code, no
traceback, nothing half-written."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

IMAGES = """name = "mine"
rounds = 1
[data]
source = "folder"
path = "pictures"
[clients]
num = 2
[backbone]
name = "squeezenet1_1"
weights = "none"
image_size = 32
[training]
local_epochs = 1
[evaluation]
references = []
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of twelve small pictures and a scenario for them."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.jpg")
    (tmp_path / "mine.toml").write_text(IMAGES)
    return tmp_path


def bomb() -> bytes:
    """A PNG of a few dozen bytes that claims 30000 x 30000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def assert_refused(
    done: subprocess.CompletedProcess[str], code: int, *says: str, where: Path
) -> None:
    assert done.returncode == code, done.stderr
    for text in says:
        assert text in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (where / "out").exists()
    assert list(where.rglob("*.tmp")) == []


def test_a_good_folder_runs(fedtl, pictures: Path) -> None:
    done = fedtl("run", "mine.toml", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "fedtl run mine.toml --seeds 3" in done.stdout


CASES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing folder": (lambda p: p.rename(p.with_name("moved")), ["pictures"]),
    "empty folder": (
        lambda p: (p.rename(p.with_name("moved")), p.mkdir()),
        ["pictures"],
    ),
    "a class folder without an image": (lambda p: (p / "cow").mkdir(), ["cow"]),
    "a text named .jpg": (lambda p: (p / "cat" / "t.jpg").write_text("hello"), ["cat/t.jpg"]),
    "a truncated JPEG": (
        lambda p: (p / "dog" / "3.jpg").write_bytes((p / "dog" / "3.jpg").read_bytes()[:-200]),
        ["dog/3.jpg"],
    ),
    "a bomb": (lambda p: (p / "cat" / "b.png").write_bytes(bomb()), ["cat/b.png", "30000"]),
    "the same image twice": (
        lambda p: [(p / "dog" / f"c{i}.jpg").write_bytes((p / "dog" / "0.jpg").read_bytes())
                   for i in range(8)],
        ["data.leakage=allow"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("command", ["run", "check"])
def test_bad_folders(fedtl, pictures: Path, case: str, command: str) -> None:
    break_it, says = CASES[case]
    break_it(pictures / "pictures")
    arguments = ["--out", "out"] if command == "run" else []
    assert_refused(fedtl(command, "mine.toml", *arguments), 2, *says, where=pictures)


def test_bad_files_can_be_skipped(fedtl, pictures: Path) -> None:
    (pictures / "pictures" / "cat" / "t.jpg").write_text("hello")
    (pictures / "pictures" / "cat" / "b.png").write_bytes(bomb())
    done = fedtl("run", "mine.toml", "--set", "data.on_bad_file=skip", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "cat/t.jpg" in done.stdout
    assert "cat/b.png" in done.stdout


def test_leaks_can_be_allowed_and_are_shown(fedtl, pictures: Path) -> None:
    CASES["the same image twice"][0](pictures / "pictures")
    done = fedtl("run", "mine.toml", "--set", "data.leakage=allow", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert "same content" in done.stdout


class Evil:
    """A pickle that would leave a file behind if anybody executed it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


def test_a_malicious_pickle_is_never_executed(fedtl, pictures: Path) -> None:
    import torch

    torch.save({"features.0.weight": Evil(pictures / "canary")}, pictures / "evil.pth")
    done = fedtl("run", "mine.toml", "--set", "backbone.weights=evil.pth", "--out", "out")
    assert_refused(done, 5, "evil.pth", where=pictures)
    assert not (pictures / "canary").exists()


def test_weights_of_another_architecture(fedtl, pictures: Path) -> None:
    import torch

    torch.save({"layer1.weight": torch.zeros(3)}, pictures / "other.pth")
    done = fedtl("run", "mine.toml", "--set", "backbone.weights=other.pth", "--out", "out")
    assert_refused(done, 2, "squeezenet1_1", where=pictures)


def test_a_flipped_bit_against_a_stated_hash(fedtl, pictures: Path) -> None:
    import hashlib

    import torch
    from torchvision.models import squeezenet1_1

    path = pictures / "mine.pth"
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    stated = hashlib.sha256(path.read_bytes()).hexdigest()
    settings = ["--set", "backbone.weights=mine.pth", "--set", f"backbone.sha256={stated}"]
    assert fedtl("check", "mine.toml", *settings).returncode == 0
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    done = fedtl("run", "mine.toml", *settings, "--out", "out")
    assert_refused(done, 5, "mine.pth", where=pictures)


def test_features_that_are_not_finite_and_objects_in_arrays(fedtl, small: Path) -> None:
    path = small.parent / "small.npz"
    content = dict(np.load(path))
    content["x"][3, 1] = np.nan
    np.savez(path, **content)
    done = fedtl("run", str(small), "--out", "out")
    assert_refused(done, 2, "3", where=small.parent)
    np.savez(path, x=np.array([{}] * 3, dtype=object), y=np.arange(3))
    assert_refused(fedtl("run", str(small), "--out", "out"), 5, "x", where=small.parent)


def test_images_into_identity_and_features_into_a_trunk(fedtl, small: Path) -> None:
    done = fedtl("run", str(small), "--set", "backbone.name=resnet18", "--out", "out")
    assert_refused(done, 2, "identity", where=small.parent)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["clients.num=500"], "200"),
        (["clients.partition=domain"], "domain"),
        (["clients.partition=natural"], "client"),
        (["clients.partition=shards", "clients.shards_per_client=999"], "shard"),
        (["clients.min_examples=1000"], "min_examples"),
        (["engine.device=cuda"], "engine.device"),
    ],
)
def test_infeasible_requests(fedtl, small: Path, settings: list[str], says: str) -> None:
    arguments = [part for setting in settings for part in ("--set", setting)]
    code = 3 if settings == ["engine.device=cuda"] else 2
    if code == 3 and os.path.exists("/proc/driver/nvidia/version"):
        pytest.skip("this machine has a GPU")
    done = fedtl("run", str(small), *arguments, "--out", "out")
    assert_refused(done, code, says, where=small.parent)


def test_one_client_one_class_is_defined(fedtl, small: Path) -> None:
    path = small.parent / "small.npz"
    content = dict(np.load(path))
    owner = np.where(content["y"] == 2, 0, np.arange(len(content["y"])) % 3 + 1)
    np.savez(path, **content, client=owner)
    natural = ["--set", "clients.partition=natural", "--set", "clients.fraction=1.0"]
    table = small.read_text().replace("num = 5\n", "")
    small.write_text(table)
    done = fedtl("run", str(small), *natural, "--out", "out", "--json")
    assert done.returncode == 0, done.stderr


def test_a_run_folder_that_exists(fedtl, small: Path) -> None:
    assert fedtl("run", str(small), "--out", "mine").returncode == 0
    again = fedtl("run", str(small), "--out", "mine")
    assert_refused(again, 2, "exists already", where=small.parent)


def test_a_place_that_cannot_be_written(fedtl, small: Path) -> None:
    done = fedtl("run", str(small), "--out", str(small / "out"))
    assert_refused(done, 3, "cannot write", where=small.parent)


def test_divergence_stops_by_policy(fedtl, small: Path) -> None:
    done = fedtl("run", str(small), "--set", "training.learning_rate=1e38", "--out", "run")
    assert done.returncode == 4, done.stderr
    assert "learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


def test_usage_errors(fedtl) -> None:
    for arguments in (["run"], ["rnu"], ["run", "quickstart", "--seeds", "0"], ["cache", "rm"]):
        done = fedtl(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A file system of 3 MiB; needs the right to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a tmpfs here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_under_the_run(fedtl, small: Path, tiny_disk: Path) -> None:
    filler = tiny_disk / "filler"
    filler.write_bytes(bytes(3 * 2**20 - 16 * 4096))
    done = fedtl("run", str(small), "--out", str(tiny_disk / "run"), "--set", "rounds=200")
    assert done.returncode == 3, done.stderr
    assert "disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tiny_disk.rglob("*.tmp")) == []
    filler.unlink()
    if (tiny_disk / "run").exists():
        resumed = fedtl("resume", str(tiny_disk / "run"))
        assert resumed.returncode == 0, resumed.stderr


def test_a_full_disk_under_the_feature_store(fedtl, pictures: Path, tiny_disk: Path) -> None:
    done = fedtl("run", "mine.toml", "--out", "out", env={"FEDTL_CACHE": str(tiny_disk)})
    assert_refused(done, 3, where=pictures)
    assert list(tiny_disk.rglob("*.tmp*")) == []


def test_nobody_reading_does_not_stop_a_run(small: Path) -> None:
    import sys

    command = f"{sys.executable} -m fedtl.cli run {small} --out run | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=small.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (small.parent / "run" / "summary.json").is_file()


def test_a_folder_of_the_users_own_is_not_removed(fedtl, pictures: Path) -> None:
    (pictures / "pictures" / "cat" / "t.jpg").write_text("hello")
    (pictures / "mine").mkdir()
    assert fedtl("run", "mine.toml", "--out", "mine").returncode == 2
    assert list((pictures / "mine").iterdir()) == []
    assert fedtl("run", "mine.toml", "--out", "a/b/c").returncode == 2
    assert not (pictures / "a").exists()


def test_control_characters_in_names_do_not_reach_the_terminal(fedtl, small: Path) -> None:
    content = dict(np.load(small.parent / "small.npz"))
    names = np.array(["\x1b[31mred", "\x1b]0;owned\x07", "plain"])[np.arange(200) % 3]
    np.savez(small.parent / "small.npz", **content, client=names)
    small.write_text(small.read_text().replace("num = 5\n", 'partition = "natural"\n'))
    for command in (["check", str(small)], ["run", str(small), "--out", "run"]):
        done = fedtl(*command)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
    assert "\x1b" not in fedtl("run", "\x1b[2J").stderr


def test_a_pickle_that_asks_for_memory_is_refused(fedtl, pictures: Path) -> None:
    import torch

    class Greedy:
        def __reduce__(self):
            return (bytearray, (3 * 2**30,))

    torch.save({"features.0.weight": torch.zeros(1), "b": Greedy()}, pictures / "greedy.pth")
    done = fedtl("run", "mine.toml", "--set", "backbone.weights=greedy.pth", "--out", "out")
    assert_refused(done, 5, "greedy.pth", where=pictures)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "x" * 300], "too long"),
        (["--set", "data.path=" + "x" * 4000], ""),
        (["--set", "training.batch_size=1" + "0" * 27], "training.batch_size"),
        (["--seeds", "2", "--out", "."], "exists already"),
        (["--set", "seed=9223372036854775807", "--seeds", "2"], "seed"),
    ],
)
def test_absurd_values(fedtl, small: Path, arguments: list[str], says: str) -> None:
    done = fedtl("run", str(small), *arguments)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "bug in fedtl" not in done.stderr


def test_a_split_without_a_test_row_is_refused(fedtl, small: Path) -> None:
    content = dict(np.load(small.parent / "small.npz"))
    owner = np.arange(200) % 2  # one client only trains, the other is only judged
    np.savez(small.parent / "small.npz", **content, split=owner, client=owner)
    small.write_text(small.read_text().replace("num = 5\n", 'partition = "natural"\n'))
    done = fedtl("run", str(small), "--out", "out")
    assert_refused(done, 2, "judged", where=small.parent)

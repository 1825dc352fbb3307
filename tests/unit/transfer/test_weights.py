from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import pickle
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtl.errors import EnvironmentFault, InputError, SecurityRefusal
from fedtl.transfer import weights
from fedtl.transfer.weights import fetch_weights, hash_file, load_weights


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(64, 32, generator=generator),
        "a.count": torch.tensor(3),
    }


def save(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        import safetensors.torch

        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors"])
def test_what_was_saved_is_read(state: dict[str, torch.Tensor], tmp_path: Path, name: str) -> None:
    path = save(state, tmp_path / name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert hash_file(path) == digest
    for expected in (None, digest, digest[:8], digest[:8].upper()):
        loaded = load_weights(path, expected)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_training_checkpoint_is_unwrapped(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = save({"state_dict": state, "epoch": 3}, tmp_path / "w.pth")
    assert load_weights(path).keys() == state.keys()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_flipped_bit_is_refused_by_the_stated_hash(
    state: dict[str, torch.Tensor], tmp_path: Path, name: str
) -> None:
    path = save(state, tmp_path / name)
    stated = hash_file(path)[:8]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for read in (hash_file, load_weights):
        with pytest.raises(SecurityRefusal, match="SHA-256") as refusal:
            read(path, stated)
        assert refusal.value.exit_code == 5


class Canary:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("wrap", ["zip", "legacy", "bare"])
def test_code_in_a_pickle_never_runs(
    state: dict[str, torch.Tensor], tmp_path: Path, wrap: str
) -> None:
    canary, path = tmp_path / "canary", tmp_path / "w.pth"
    evil = {**state, "b": Canary(canary)}
    if wrap == "bare":
        path.write_bytes(pickle.dumps({"b": Canary(canary)}))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=wrap == "zip")
    with pytest.raises(SecurityRefusal) as refusal:
        load_weights(path)
    assert refusal.value.exit_code == 5
    assert not canary.exists()


def test_an_expanded_tensor_is_refused(tmp_path: Path) -> None:
    path = save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "w.pth")
    assert path.stat().st_size < 5000
    with pytest.raises(SecurityRefusal, match="claim more than the file holds"):
        load_weights(path)


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(10_000_000))
    with pytest.raises(SecurityRefusal, match="unpacks to more"):
        load_weights(path)


def lying(header: dict[str, Any], body: bytes = bytes(8)) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


BROKEN = {
    "text.pth": b"<html>404</html>",
    "empty.pth": b"",
    "cut.pth": None,
    "cut.safetensors": None,
    "empty.safetensors": b"",
    "header.safetensors": struct.pack("<Q", 10**12) + b"{}",
    "offsets.safetensors": lying(
        {"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}
    ),
    "shape.safetensors": lying({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(state: dict[str, torch.Tensor], tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = BROKEN[name]
    if content is None:
        whole = save(state, tmp_path / f"whole{path.suffix}").read_bytes()
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    with pytest.raises(InputError, match=name) as error:
        load_weights(path)
    assert error.value.exit_code == 2


def test_other_refusals(
    state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no such weights file"):
        load_weights(tmp_path / "absent.pth")
    with pytest.raises(InputError, match="no tensor"):
        load_weights(save({"a": 3, "b": "text"}, tmp_path / "numbers.pth"))
    with pytest.raises(InputError, match="not tensors by name"):
        load_weights(save([torch.zeros(3)], tmp_path / "list.pth"))
    state["a.weight"][3, 4] = float("nan")
    with pytest.raises(InputError, match=r"NaN or infinity"):
        load_weights(save(state, tmp_path / "nan.pth"))
    monkeypatch.setattr(weights, "MAX_BYTES", 100)
    with pytest.raises(InputError, match="too large"):
        hash_file(tmp_path / "nan.pth")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[[str, bytes, int | None], str]]:
    """Serves one reply on loopback; announces another length where told."""
    replies: dict[str, tuple[bytes, int]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path not in replies:
                self.send_error(404)
                return
            content, announced = replies[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()

        def serve(name: str, content: bytes, announced: int | None = None) -> str:
            replies[f"/{name}"] = (content, len(content) if announced is None else announced)
            return f"http://127.0.0.1:{served.server_port}/{name}"

        yield serve
        served.shutdown()
        thread.join()


def named(content: bytes) -> str:
    return f"model-{hashlib.sha256(content).hexdigest()[:8]}.pth"


def test_a_download_is_checked_and_kept(
    server: Callable[..., str], tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    name = named(buffer.getvalue())
    folder = tmp_path / "hub" / "checkpoints"
    path = fetch_weights(server(name, buffer.getvalue()), folder)
    assert path == folder / name
    assert load_weights(path, weights.stated_hash(name)).keys() == state.keys()
    assert fetch_weights("http://127.0.0.1:9/" + name, folder) == path  # no second download
    assert [file.name for file in folder.iterdir()] == [name]


def test_a_bad_download_leaves_nothing(server: Callable[..., str], tmp_path: Path) -> None:
    good = b"weights" * 1000
    with pytest.raises(SecurityRefusal):
        fetch_weights(server(named(good), good[:-1] + b"!"), tmp_path)
    with pytest.raises(InputError, match="could not be downloaded"):
        fetch_weights(server(named(good), good[:100], len(good)), tmp_path)
    with pytest.raises(InputError) as absent:
        fetch_weights(server("other", b"").replace("other", "gone-12345678.pth"), tmp_path)
    with pytest.raises(InputError) as offline:
        fetch_weights("http://127.0.0.1:9/gone-12345678.pth", tmp_path, timeout_seconds=2.0)
    for error in (absent.value, offline.value):
        assert "gone-12345678.pth" in error.line()
        assert str(tmp_path) in error.line()
        assert "efficientnet_lite0" in error.line()
        assert "http" not in error.line()
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_an_environment_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault):
        fetch_weights("http://127.0.0.1:9/x-12345678.pth", tmp_path / "file" / "below")


def test_the_checkpoint_folder_is_torch_hubs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    for home in (None, str(tmp_path / "t")):
        if home is None:
            monkeypatch.delenv("TORCH_HOME", raising=False)
        else:
            monkeypatch.setenv("TORCH_HOME", home)
        assert weights.checkpoint_folder() == Path(torch.hub.get_dir()) / "checkpoints"

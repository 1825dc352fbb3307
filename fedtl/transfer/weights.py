"""Weights files, read without trust: size first, then hash, then tensors and nothing else.

Nothing here runs code from a file. Torch files are opened with ``weights_only=True`` after their
archive was checked for records larger than the file; what is not a dense tensor is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import pickle
import pickletools
import re
import tempfile
import urllib.error
import urllib.request
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedtl.errors import InputError, SecurityRefusal, writing
from fedtl.scenario import schema

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 4 << 30  # the largest torchvision classification file is 2.6 GB
_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 30.0
_STATED_HASH = re.compile(r"-([0-9a-f]{8,64})\.")


_LEGACY_PICKLES = 5
_CALLS = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"})
_SAFE_NAME = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter|parameter_with_state)"
    r"|torch \w+Storage|torch\.storage (UntypedStorage|TypedStorage)|torch (Size|device)"
    r"|torch\.nn\.parameter Parameter"
)
"""What a state dict calls when it is unpickled, and nothing else."""


def stated_hash(name: str) -> str | None:
    """The beginning of the SHA-256 that a file carries in its name (``resnet18-f37072fd.pth``)."""
    found = _STATED_HASH.search(name)
    return found.group(1) if found else None


def hash_file(path: Path, expected: str | None = None) -> str:
    """SHA-256 of a weights file's bytes, 64 hex digits, without reading it as weights.

    Args:
        path: the file.
        expected: a SHA-256, or at least its first 8 hex digits, which the file must have.

    Raises:
        InputError: no such file, or larger than ``MAX_BYTES``.
        SecurityRefusal: another hash than expected.
    """
    _check_size(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    check_hash(path, digest.hexdigest(), expected)
    return digest.hexdigest()


def identify(section: schema.Backbone, path: Path | None, key: int) -> str:
    """What stands for the weights: their file's SHA-256, or a hash that describes random ones.

    Raises:
        InputError: no such file, or a hash is stated for random weights.
        SecurityRefusal: the file has not the stated hash.
    """
    if path is not None:
        return hash_file(path, section.sha256)
    if section.sha256 is not None:
        raise InputError(
            "random weights have no file to hash",
            where="backbone.sha256",
            do="Leave out backbone.sha256, or name the file in backbone.weights",
        )
    model = f"{section.name} {section.model}" if section.model else section.name
    version = importlib.metadata.version("torch")
    return hashlib.sha256(f"random {model} {key} torch {version}".encode()).hexdigest()


def load_weights(path: Path, expected: str | None = None) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.pth`` or ``.pt`` file by name, on the CPU.

    The bytes that are hashed are the bytes that are loaded: the file is read once.

    Args:
        path: the file.
        expected: a SHA-256, or at least its first 8 hex digits, which the file must have.

    Raises:
        InputError: not there, too large, not a weights file, truncated, or values not finite.
        SecurityRefusal: wrong hash, objects besides tensors, or tensors larger than the file.
    """
    _check_size(path)
    content = path.read_bytes()
    check_hash(path, hashlib.sha256(content).hexdigest(), expected)
    if path.suffix == ".safetensors":
        state = _load_safetensors(path, content)
    else:
        state = _load_torch(path, content)
    _check_tensors(path, state, len(content))
    return state


def _check_size(path: Path) -> None:
    if not path.is_file():
        raise InputError(
            "there is no such weights file",
            where=path,
            do="Give a .safetensors or .pth file in backbone.weights, or 'default'",
        )
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(
            "the weights file is too large",
            where=path,
            got=f"{size:,} bytes",
            allowed=f"at most {MAX_BYTES:,} bytes",
        )


def check_hash(path: Path, digest: str, expected: str | None) -> None:
    """Raise SecurityRefusal where a digest does not begin with what was expected, if anything."""
    if expected is not None and not digest.startswith(expected.lower()):
        raise SecurityRefusal(
            "the weights file is not the one that was stated: its SHA-256 differs",
            where=path,
            got=digest,
            allowed=expected,
            do="Get the file again from a source you trust, or correct backbone.sha256",
        )


def _not_weights(path: Path, why: str) -> InputError:
    return InputError(
        f"this is not a readable weights file: {why}",
        where=path,
        allowed="a state dict in .safetensors or .pth",
        do="Get the file again, or save it anew from model.state_dict(), best as .safetensors",
    )


def _load_safetensors(path: Path, content: bytes) -> dict[str, Tensor]:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _not_weights(path, str(error).splitlines()[0][:200]) from error


def _load_torch(path: Path, content: bytes) -> dict[str, Tensor]:
    import torch

    if content.startswith(b"PK\x03\x04"):
        _check_archive(path, content)
    elif not content.startswith(b"\x80"):
        raise _not_weights(path, "it begins like no torch file")
    _check_pickles(path, content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on pickle protocols: judged below
            loaded = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise _more_than_tensors(path) from error
    except Exception as error:  # torch raises many kinds for damaged archives
        raise _not_weights(path, f"{type(error).__name__} in torch.load") from error
    for name in ("state_dict", "model"):  # the usual wrappings of training checkpoints
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, dict) or not loaded:
        raise _not_weights(path, f"it holds a {type(loaded).__name__}, not tensors by name")
    return loaded


def _more_than_tensors(path: Path) -> SecurityRefusal:
    return SecurityRefusal(
        "the weights file holds more than tensors; nothing of it was executed",
        where=path,
        do="Use a file saved from model.state_dict(), best as .safetensors",
    )


def _check_pickles(path: Path, content: bytes) -> None:
    """Read the names a file calls before torch does: its own list allows ``bytearray(n)``, say.

    A small file could have any amount of memory allocated that way.
    """
    if content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            streams = [archive.read(n) for n in archive.namelist() if n.endswith("data.pkl")]
    else:  # before torch 1.6: magic, protocol, system, state and keys, one pickle after the other
        streams = [content]
    for stream in streams:
        file = io.BytesIO(stream)
        for _ in range(_LEGACY_PICKLES if stream is content else 1):
            try:
                operations = list(pickletools.genops(file))
            except (ValueError, EOFError, UnicodeDecodeError) as error:
                raise _not_weights(path, "its list of tensors is damaged") from error
            for operation, argument, _place in operations:
                named = operation.name == "GLOBAL" and _SAFE_NAME.fullmatch(str(argument))
                if operation.name in _CALLS and not named:
                    raise _more_than_tensors(path)


def _check_archive(path: Path, content: bytes) -> None:
    # torch.save never compresses: records that sum to more than the file are a decompression bomb.
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            claimed = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise _not_weights(path, "its archive is damaged or cut short") from error
    if claimed > len(content):
        raise SecurityRefusal(
            "the weights file unpacks to more than its own size",
            where=path,
            got=f"{claimed:,} bytes claimed",
            allowed=f"{len(content):,} bytes, the file's size",
        )


def _check_tensors(path: Path, state: Mapping[str, Tensor], file_bytes: int) -> None:
    import torch

    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise _not_weights(path, f"entry {str(name)[:80]!r} is no tensor")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise _not_weights(path, f"entry {name[:80]!r} is not a dense tensor")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > file_bytes:
        raise SecurityRefusal(
            "the tensors of the weights file claim more than the file holds",
            where=path,
            got=f"{claimed:,} bytes",
            allowed=f"{file_bytes:,} bytes, the file's size",
        )
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                "the weights hold NaN or infinity",
                where=f"{path}: {name}",
                do="Get the file again, or train it again with a smaller learning rate",
            )


def checkpoint_folder() -> Path:
    """Where torch hub keeps downloaded weights (``$TORCH_HOME`` and so on), without torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or os.path.join(cache, "torch")
    return Path(home).expanduser() / "hub" / "checkpoints"


def fetch_weights(url: str, folder: Path, timeout_seconds: float = _TIMEOUT_SECONDS) -> Path:
    """A published weights file from ``folder``, downloaded into it where it is missing.

    Written to a temporary file beside, checked against the hash in its name, then moved into
    place: a broken download leaves nothing behind.

    Raises:
        InputError: not there and cannot be downloaded.
        SecurityRefusal: what came, or what was there, does not have the stated hash.
        EnvironmentFault: the folder cannot be written.
    """
    name = url.rsplit("/", 1)[-1]
    path = folder / name
    if path.is_file():
        return path
    with writing("downloaded weights", folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                _download(url, name, folder, file, timeout_seconds)
                file.flush()
                os.fsync(file.fileno())
            hash_file(Path(temporary), stated_hash(name))
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


def _download(
    url: str, name: str, folder: Path, file: io.BufferedWriter, timeout_seconds: float
) -> None:
    received = 0
    try:
        with urllib.request.urlopen(url, timeout=timeout_seconds) as reply:
            announced = int(reply.headers.get("Content-Length") or 0)
            while received <= MAX_BYTES and (chunk := reply.read(_CHUNK)):
                received += len(chunk)
                file.write(chunk)
    except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
        reason = getattr(error, "reason", None) or type(error).__name__
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise _offline(name, folder, str(reason)) from error
    if received > MAX_BYTES or (announced and received != announced):
        raise _offline(name, folder, f"it ended after {received:,} of {announced:,} bytes")


def _offline(name: str, folder: Path, reason: str) -> InputError:
    return InputError(
        f"the weights file {name} is not on this machine and could not be downloaded: {reason}",
        where="backbone.weights",
        got="'default'",
        do=f"Put {name} into {folder}, or set backbone.weights to a file you have, "
        "or use backbone.name = 'efficientnet_lite0', whose weights are installed",
    )

"""Modules that are none, or lie: one line and exit code 2, whatever is in the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

PLAIN = {"name": "mobilenet_v2", "weights": "none"}
CARD = {
    "format": "fedtl-module 1", "fedtl": "0", "scenario_hash": "0" * 64,
    "backbone": "mobilenet_v2", "backbone_sha256": "ab" * 32, "cut": "avgpool", "kind": "linear",
    "mode": "head", "classes": "a\nb", "seed": "1",
    "sections": json.dumps({"backbone": PLAIN}),
    "preprocessing": "{}", "settings": "{}", "trained_on": "{}", "measured": "{}",
    "aligned": "none", "whole": "yes",
}  # fmt: skip


def module(**changes: Any) -> bytes:
    head = {"weight": np.zeros((2, 4), np.float32), "bias": np.zeros(2, np.float32)}
    return save(head, metadata={**CARD, **changes})


def header(size: int, rest: bytes = b"{}") -> bytes:
    return struct.pack("<Q", size) + rest


def refused(done: Any, *says: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in says), done.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "was cut off"),
        (b"\x80\x04\x95 a pickle", "safetensors"),
        (module()[:-3], "safetensors"),
        (header(2**62), "was cut off"),
        (header(2**23, b" " * 2**23), "a header of 8,388,608 bytes"),
        (header(2, b"{}" * 9), "safetensors"),
        (save({"weight": np.zeros((2, 4), np.float32)}), "no card"),
        (module(format="something"), "format 'something'"),
    ],
)
@pytest.mark.parametrize("command", [["show"], ["apply", "--data", "."]])
def test_what_is_no_module(fedtl, tmp_path: Path, command, content, says) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    refused(fedtl("module", command[0], "m.safetensors", *command[1:]), "no module", says)


@pytest.mark.parametrize("name", ["gone.safetensors", "a" * 5000, "nul\0", ".", "last"])
def test_no_such_module(fedtl, name: str) -> None:
    refused(fedtl("module", "show", name))


def test_other_trunk_and_other_classes(fedtl, small: Path, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(module())
    done = fedtl("module", "apply", "m.safetensors", "--to", "small.toml")
    refused(done, "for another trunk", "mobilenet_v2", "abababababab", "--to")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sections": "{"}, "damaged"),
        ({"sections": json.dumps({"backbone": {"name": "hub", "path": "/x"}})}, "bring code"),
        ({"sections": json.dumps({"backbone": PLAIN, "transfer": {"mode": "y"}})}, "mode"),
        ({"seed": "-1"}, "seed"),
        ({"seed": "9" * 40}, "seed"),
        ({"settings": "[" * 100_000}, "damaged"),
        ({"measured": "[]"}, "damaged"),
    ],
)
def test_cards_that_lie(fedtl, tmp_path: Path, changes, says) -> None:
    (tmp_path / "m.safetensors").write_bytes(module(**changes))
    (tmp_path / "data.zip").write_bytes(b"")
    refused(fedtl("module", "apply", "m.safetensors", "--data", "data.zip"), says)


def test_text_from_outside_is_shown_as_it_is_and_bounded(fedtl, tmp_path: Path) -> None:
    hostile = "[red]x[/red]\x1b[2Jy" + "z" * 5000
    content = module(backbone=hostile, kind=hostile, measured='{"accuracy": "[link=a]"}')
    (tmp_path / "m.safetensors").write_bytes(content)
    for arguments in (["show", "m.safetensors"], ["ls", "."]):
        done = fedtl("module", *arguments)
        assert done.returncode == 0, done.stderr
        assert "[red]x" in done.stdout
        assert "\x1b" not in done.stdout
        assert len(done.stdout) < 6000


def test_on_which_data(fedtl, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(module())
    refused(fedtl("module", "apply", "m.safetensors"), "on which data")


def test_a_card_has_nothing_fetched(fedtl, tmp_path: Path) -> None:
    sections = json.dumps({"backbone": {"name": "mobilenet_v2"}})
    (tmp_path / "m.safetensors").write_bytes(module(sections=sections))
    done = fedtl("module", "apply", "m.safetensors", "--data", ".")
    command = "fedtl module apply m.safetensors --to SCENARIO --data ."
    refused(done, "would have to be fetched", "'mobilenet_v2', weights 'default'", command)


def test_a_folder_of_anything(fedtl, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "x.safetensors").mkdir()
    (tmp_path / "y.safetensors").write_bytes(b"no")
    done = fedtl("module", "ls", ".", "--json")
    assert done.returncode == 0
    assert [one["path"] for one in json.loads(done.stdout)["others"]] == ["y.safetensors"]

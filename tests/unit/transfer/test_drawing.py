"""Draws from torch's one generator: everyone's own stream, whoever else draws."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fedtl
from fedtl.transfer.drawing import seeded

KEYS = [3, 2**63 + 3, 2**64 - 1]


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads that take turns as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def drawn(key: int) -> Tensor:
    with seeded(key):
        return torch.stack([nn.Linear(2, 2, bias=False).weight.detach() for _ in range(20)])


@pytest.mark.usefixtures("restless")
def test_threads_draw_each_from_its_own_stream() -> None:
    keys = [*KEYS, *range(40)] * 3
    alone = {key: drawn(key) for key in keys}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(drawn, keys))
    wrong = [k for k, own in zip(keys, together, strict=True) if not torch.equal(own, alone[k])]
    assert not wrong
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("key", KEYS)
def test_a_stream_is_torchs_own_and_what_is_outside_stays(key: int) -> None:
    expected = torch.rand(4, generator=torch.Generator().manual_seed(key))
    before = torch.random.get_rng_state()
    with seeded(key):
        first = torch.rand(2)
        with seeded(key + 1 if key < 2**64 - 1 else 0):  # a network built while another draws
            torch.rand(3)
        second = torch.rand(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(torch.cat([first, second]), expected)


def test_a_fault_inside_changes_nothing_outside() -> None:
    def fails() -> None:
        with seeded(1):
            torch.rand(1)
            raise ValueError("mine")

    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="mine"):
        fails()
    assert torch.equal(torch.random.get_rng_state(), before)
    with ThreadPoolExecutor(1) as pool:  # the lock was let go
        assert torch.equal(pool.submit(drawn, 1).result(timeout=60), drawn(1))


def test_nobody_seeds_torch_anywhere_else() -> None:
    package = Path(fedtl.__file__).parent
    who = re.compile(r"\bmanual_seed\(|\bfork_rng\(")
    found = [p for p in package.rglob("*.py") if who.search(p.read_text())]
    assert found == [package / "transfer/drawing.py"]

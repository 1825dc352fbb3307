"""A client with a good key that lies; run by tests as ``python lying_client.py NAME``.

In round n its update is changed as the n-th of ``LIES`` says; other rounds are honest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fedtl.deployment import taking_part
from fedtl.engines.node import Node
from fedtl.engines.wire import pack, unpack
from fedtl.errors import FedtlError
from fedtl.interrupts import Interrupts
from fedtl.terminal import PatientConsole

Facts, Tensors = dict[str, Any], dict[str, np.ndarray[Any, Any]]
KEPT: list[bytes] = []
WEIGHT = "head.weight"


def not_a_number(facts: Facts, tensors: Tensors) -> None:
    tensors[WEIGHT] = np.full_like(tensors[WEIGHT], np.nan)


def broadcastable(facts: Facts, tensors: Tensors) -> None:
    tensors[WEIGHT] = tensors[WEIGHT][:, :1]


def other_dtype(facts: Facts, tensors: Tensors) -> None:
    tensors[WEIGHT] = tensors[WEIGHT].astype(np.float64)


def missing_key(facts: Facts, tensors: Tensors) -> None:
    del tensors["head.bias"]


def huge(facts: Facts, tensors: Tensors) -> None:
    tensors[WEIGHT] = tensors[WEIGHT] * np.float32(1e9)


def many_examples(facts: Facts, tensors: Tensors) -> None:
    tensors["examples"] = tensors["examples"] + 10**12


def negative_examples(facts: Facts, tensors: Tensors) -> None:
    tensors["examples"] = tensors["examples"] * 0 - 9


def stale(facts: Facts, tensors: Tensors) -> None:
    facts["round"] -= 1


def other_run(facts: Facts, tensors: Tensors) -> None:
    facts["run"] = "0" * 32


LIES: list[Callable[[Facts, Tensors], None] | str] = [
    not_a_number, broadcastable, other_dtype, missing_key, huge, many_examples, negative_examples,
    stale, other_run, "replay", "garbage",
]  # fmt: skip


class Liar(Node):
    """A node that computes honestly and says something else."""

    def answer(self, kind: str, content: bytes, signature: bytes = b"") -> bytes:
        reply = super().answer(kind, content, signature)
        facts, tensors = unpack(reply, 10**7)
        round = facts["round"]
        if kind != "train" or round == 0 or "error" in facts:
            return reply
        KEPT.append(reply)
        if round > len(LIES):
            return reply
        lie = LIES[round - 1]
        if isinstance(lie, str):
            return KEPT[0] if lie == "replay" else b"\x80\x04\x95 not ours"
        changed = dict(tensors)
        lie(facts, changed)
        return pack(facts, changed)


if __name__ == "__main__":
    taking_part.Node = Liar
    try:
        with Interrupts() as interrupts:
            taking_part.take_part(
                Path("join.toml"), sys.argv[1], Path("data.npz"), Path(), "cpu",
                PatientConsole(), interrupts,
            )  # fmt: skip
    except FedtlError as error:
        print(error.line(), flush=True)
        sys.exit(error.exit_code)

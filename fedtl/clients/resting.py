"""What a head stands on while nothing behind the cut moves: made once, not anew in every epoch.

Rows pass the network at rest (in eval mode, so that a row's activations are its own) in slices of
``JUDGED_THROUGH``, in their client's order: bits depend on no engine, worker or other client. While
the network is still the pretrained one, as in a warm-up, the activations of a slice are the same in
every round and for whoever asks, so they are kept for as long as the features that they were made
from. Whether they are found or made again changes no bit.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedtl.clients.networks import JUDGED_THROUGH, network
from fedtl.types import TAIL, Float32, Int64, Tail

if TYPE_CHECKING:
    import torch

Features = npt.NDArray[np.floating[Any]]

KEPT_BYTES = 2**28
"""Of activations that a process keeps for one array of features; further ones are made again."""


def rested(
    tail: Tail, tensors: Mapping[str, torch.Tensor], features: Features, rows: Int64, device: str
) -> Float32:
    """What features [N, A] of some rows [n] become, float32 [n, D], on the CPU.

    Args:
        tensors: by a head's names; those behind the cut are used in place of the tail's own.
    """
    import torch

    found = np.empty((len(rows), tail.width), np.float32)
    kept = _Kept.of(features) if _pretrained(tail, tensors) else None
    with network(tail) as through, torch.no_grad():
        for low in range(0, len(rows), JUDGED_THROUGH):
            part = rows[low : low + JUDGED_THROUGH]
            key = (tail.digest, device, part.tobytes())
            made = None if kept is None else kept.parts.get(key)
            if made is None:
                x = torch.from_numpy(features[part].astype(np.float32)).to(device)
                made = through(tensors, x).cpu().numpy()
                if kept is not None:
                    kept.keep(key, made)
            found[low : low + JUDGED_THROUGH] = made
    return found


def _pretrained(tail: Tail, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether nothing behind the cut has ever moved, to the last bit."""
    return all(
        tail.tensors[name[len(TAIL) :]].dtype == np.float32
        and np.array_equal(
            own.cpu().numpy().view(np.int32), tail.tensors[name[len(TAIL) :]].view(np.int32)
        )
        for name, own in tensors.items()
        if name.startswith(TAIL)
    )


class _Kept:
    """What slices of one array of features became, by tail, device and rows; forgotten with it."""

    def __init__(self, features: Features) -> None:
        self.parts: dict[tuple[str, str, bytes], Float32] = {}
        self._bytes, self._lock = 0, threading.Lock()
        key = id(features)
        self._features = weakref.ref(features, lambda _: _KEPT.pop(key, None))

    @staticmethod
    def of(features: Features) -> _Kept:
        """That of an array."""
        if id(features) not in _KEPT:
            _KEPT.setdefault(id(features), _Kept(features))
        return _KEPT[id(features)]

    def keep(self, key: tuple[str, str, bytes], made: Float32) -> None:
        """Keeps what was made where it fits."""
        with self._lock:
            if key not in self.parts and self._bytes + made.nbytes <= KEPT_BYTES:
                self.parts[key] = made
                self._bytes += made.nbytes


_KEPT: dict[int, _Kept] = {}
"""By the identity of the features: an array has no hash."""

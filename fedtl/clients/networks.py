"""Heads of any form, with or without a network before them, as torch functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedtl.types import TAIL, Head, Int32, Int64, Tail

if TYPE_CHECKING:
    import torch

JUDGED = 1024
"""Rows scored at once."""

JUDGED_THROUGH = 64
"""Rows that pass the network before the head at once."""

Network = Callable[[Mapping[str, "torch.Tensor"], "torch.Tensor"], "torch.Tensor"]
"""From tensors by name and activations [n, A] to what the head stands on [n, D]."""


def nothing(tensors: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The network where none stands before the head."""
    return x


@contextmanager
def network(
    tail: Tail | None, training: bool = False, still: tuple[str, ...] = ()
) -> Iterator[Network]:
    """What stands between the cut and the head, for one thread; nothing at all without a tail.

    Args:
        training, still: see ``OpenTail.running``.
    """
    if tail is None:
        yield nothing
        return
    from fedtl.transfer.tails import open_tail

    opened = open_tail(tail)
    with opened.running(training, still) as module:
        yield lambda tensors, x: opened.forward(module, tensors, x)


def pretrained(
    tail: Tail | None, features: npt.NDArray[np.floating[Any]]
) -> npt.NDArray[np.floating[Any]]:
    """What a head stands on before any training, [n, D]; without a tail the features themselves."""
    if tail is None:
        return features
    import torch

    from fedtl.clients.batched import one_torch_thread

    made = np.empty((len(features), tail.width), np.float32)
    with one_torch_thread(), network(tail) as through, torch.no_grad():
        for low in range(0, len(features), JUDGED_THROUGH):
            x = torch.from_numpy(features[low : low + JUDGED_THROUGH].astype(np.float32))
            made[low : low + JUDGED_THROUGH] = through({}, x).numpy()
    return made


def head_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the head alone, without the network before it."""
    return {name: own for name, own in tensors.items() if not name.startswith(TAIL)}


def scores(
    tensors: Mapping[str, torch.Tensor],
    x: torch.Tensor,
    through: Network | None = None,
    dropped: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Scores [n, C] from activations [n, A]; autograd passes through.

    Args:
        through: the network before the head, None for none.
        dropped: what is done to what enters the head's last layer [n, H], None for nothing.
    """
    from fedtl.clients.batched import classify, entering

    head = head_of(tensors)
    x = entering(head, x if through is None else through(tensors, x))
    return classify(head, x if dropped is None else dropped(x))


def judge(
    features: npt.NDArray[np.floating[Any]],
    labels: Int32,
    rows: Int64,
    head: Head,
    device: str,
) -> tuple[float, npt.NDArray[np.bool_]]:
    """Judge one head of any form on some rows.

    Returns:
        Summed cross-entropy in nats, and which rows are predicted right, bool [n].
    """
    import torch

    from fedtl.clients.batched import checked_device

    checked_device(device)
    tensors = {name: torch.tensor(tensor, device=device) for name, tensor in head.items()}
    loss, right = 0.0, np.zeros(len(rows), dtype=np.bool_)
    torch.set_num_threads(1)
    with torch.no_grad():
        for low in range(0, len(rows), JUDGED):
            part = rows[low : low + JUDGED]
            x = torch.from_numpy(features[part].astype(np.float32)).to(device)
            found = scores(tensors, x).cpu()
            own = torch.from_numpy(labels[part].astype(np.int64))
            loss += float(torch.nn.functional.cross_entropy(found.double(), own, reduction="sum"))
            # numpy's argmax takes the lowest of equal classes; torch's does not promise it.
            right[low : low + JUDGED] = found.numpy().argmax(1) == labels[part]
    return loss, right

"""One stream at a time from torch's one generator of the process.

Layers draw their first weights from it, torchvision its augmentations, dropout what it drops: none
of them takes a generator of ours.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_DRAWING = threading.RLock()
"""Of a thread that draws; another's draws would come out of its stream. A network may be built
while another draws, so it is taken again by who has it. Nobody draws while ``tracing.ONE_TRACE`` is
held, so that whoever needs both takes this one first."""


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """What torch draws on the CPU inside follows from ``key`` alone; outside nothing has changed.

    Other threads that want to draw wait until it is left.

    Args:
        key: in [0, 2**64).
    """
    import torch

    with _DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        yield

"""Float operations of a network for one example, counted once where it is built anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedtl.types import Tail

if TYPE_CHECKING:
    from torch import nn


def count_flops(network: nn.Module, example: npt.NDArray[np.generic]) -> float:
    """Of a forward pass; a multiply-add is two.

    Products of matrices and convolutions count, the rest is small beside them
    (``torch.utils.flop_counter``).

    Args:
        example: a batch of one.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.from_numpy(example))
    return float(counter.get_total_flops())


def tail_flops(tail: Tail | None) -> float:
    """Of what stands between the cut and the head; 0 where nothing does."""
    if tail is None:
        return 0.0
    from fedtl.transfer.tails import open_tail

    with open_tail(tail).running() as module:
        return count_flops(module, np.zeros((1, *tail.shape), np.float32))

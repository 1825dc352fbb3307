"""Cross-entropy and its gradient, written out, for clients side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def residuals(
    scores: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the weighted cross-entropy in the scores, and each example's cross-entropy.

    Args:
        scores: [L, B, C], minus infinity where a class is padding.
        labels: int64 [L, B].
        weight: [L, B], of each example; where it is 0 the gradient is 0, whatever the scores are.

    Returns:
        [L, B, C] and [L, B].
    """
    import torch

    logs = torch.log_softmax(scores, dim=2)
    place = labels[:, :, None]
    loss = -logs.gather(2, place)[:, :, 0]
    delta = logs.exp()
    delta.scatter_add_(2, place, torch.full_like(place, -1, dtype=delta.dtype))
    return torch.where(weight[:, :, None] > 0, delta * weight[:, :, None], 0.0), loss

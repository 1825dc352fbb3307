"""Trunks of rows as torch modules, see ``transfer.row_trunks``. This file imports torch."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from fedtl.transfer.row_trunks import fourier_weights


class Fourier(nn.Module):
    """sqrt(2 / D) cos(x W + b), see ``transfer.row_trunks``."""

    directions: Tensor
    phases: Tensor

    def __init__(self, columns: int, width: int, scale: float, key: int) -> None:
        super().__init__()
        directions, phases = fourier_weights(columns, width, scale, key)
        self.register_buffer("directions", torch.tensor(directions.astype(np.float32)))
        self.register_buffer("phases", torch.tensor(phases.astype(np.float32)))

    def forward(self, rows: Tensor) -> Tensor:
        """float32 [n, D] from [n, d]."""
        factor = math.sqrt(2 / len(self.phases))
        return factor * torch.cos(torch.addmm(self.phases, rows, self.directions))


class Windows(nn.Module):
    """Mean, deviation, least, largest, slope and step of each window, see ``row_trunks``."""

    slopes: Tensor

    def __init__(self, columns: int, channels: int, window: int) -> None:
        super().__init__()
        self.channels, steps = channels, columns // channels
        self.size = min(window, steps)
        self.starts = [*range(0, steps - self.size, self.size), steps - self.size]
        time = np.arange(self.size) - (self.size - 1) / 2
        slopes = (time / max(float((time**2).sum()), 1.0)).astype(np.float32)
        self.register_buffer("slopes", torch.tensor(slopes)[None, :, None])

    def forward(self, rows: Tensor) -> Tensor:
        """float32 [n, windows * channels * 6] from [n, steps * channels]."""
        series = rows.reshape(rows.shape[0], -1, self.channels)
        made = []
        for start in self.starts:
            part = series[:, start : start + self.size]
            mean = part.mean(1)
            deviation = ((part - mean[:, None]) ** 2).mean(1).sqrt()
            moved = (part[:, 1:] - part[:, :-1]).abs()
            step = moved.mean(1) if self.size > 1 else 0.0 * mean
            slope = (part * self.slopes).sum(1)
            whole = (mean, deviation, part.amin(1), part.amax(1), slope, step)
            made.append(torch.stack(whole, 2).flatten(1))
        return torch.cat(made, 1)

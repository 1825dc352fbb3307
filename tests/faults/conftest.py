"""A small federation on disk, as a user has one: features in an .npz and a scenario beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

SCENARIO = """name = "small"
seed = 3
rounds = 4
[data]
source = "arrays"
path = "small.npz"
[clients]
num = 5
fraction = 0.6
[backbone]
name = "identity"
[training]
local_epochs = 1
batch_size = 8
[strategy]
name = "fedavgm"
[evaluation]
references = []
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The scenario file of the small federation."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    x[np.arange(200), y] += 2
    np.savez(tmp_path / "small.npz", x=x, y=y)
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO)
    return path

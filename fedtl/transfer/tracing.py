"""One trace at a time: torch records a network by changing what belongs to the whole process.

``torch.fx`` puts its own ``nn.Module.__call__`` in place of torch's and puts back what it found; of
two traces at once the one that ends last leaves the other's behind for good. The exporters to ONNX
and to torch programs, and the switch of fused attention, are the process's too.
"""

from __future__ import annotations

import threading

ONE_TRACE = threading.RLock()
"""Held while a network is traced or exported."""

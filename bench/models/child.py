"""Measurements that need a process of their own: ``python -m bench.models.child {open,memory} FOLDER`` prints JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

__all__ = ["MEASUREMENTS", "measure_memory", "measure_open"]


def measure_open(folder: Path) -> dict[str, float]:
    """Seconds from opening a packed folder to the first output of its first layer. Imports are not included."""
    import numpy as np

    import marlin_cy.moe  # noqa: F401
    from marlin_cy import get_backend, open_checkpoint

    backend = get_backend("cpu")
    begin = time.perf_counter()
    checkpoint = open_checkpoint(folder, backend=backend)
    layer = checkpoint.moe_layer(0)
    x = np.ones((1, layer.hidden_size), np.float32)
    layer(backend.new_context(), x, x @ checkpoint.router_weight(0).astype(np.float32).T)
    return {"seconds": time.perf_counter() - begin}


def measure_memory(folder: Path) -> dict[str, float]:
    """Bytes that a loaded model adds to the process: ``resident`` after a first token, and at the ``peak``."""
    import resource

    import torch

    from marlin_cy.integrations.transformers import load

    # The buffers, threads and code of the libraries themselves are loaded before the count starts.
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
    before = _resident_bytes()
    model = load(folder)
    with torch.no_grad():
        model(torch.zeros((1, 8), dtype=torch.int64))
    after = _resident_bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"resident": after - before, "peak": peak - before}


def _resident_bytes() -> int:
    """The memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


MEASUREMENTS = {"memory": measure_memory, "open": measure_open}

if __name__ == "__main__":
    print(json.dumps(MEASUREMENTS[sys.argv[1]](Path(sys.argv[2]))))

"""Times a product's first and second call in a process of its own; prints ``{name: seconds}`` as JSON.

``python -m bench.opencl.first_call TIER DEVICE K N EXPERTS GROUP_SIZE``. The environment says where compiled programs
are kept: run twice on an empty folder, the process shows the cost of compiling, then of loading. ``python -m bench
opencl show`` runs it.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from bench.common.shapes import random_ids
from bench.opencl.calls import ROUTED_EXPERTS, GemmCase, Shape, Weights, open_backend

TOKENS = 16


def main(tier: str, device: str, *sizes: str) -> None:
    """Print the JSON object."""
    rng = np.random.default_rng(0)
    k, n, experts, group_size = map(int, sizes)
    backend = open_backend(device=device, tier=tier)
    weights = Weights(backend, Shape(k, n, experts, group_size=group_size))
    ctx = backend.new_context()
    seconds: dict[str, float] = {}
    marks = [time.perf_counter()]

    def mark(name: str) -> None:
        marks.append(time.perf_counter())
        seconds[name] = marks[-1] - marks[-2]

    backend.tier  # noqa: B018  (the first access checks the tier)
    mark("check of the tier")
    inputs = backend.from_host(rng.standard_normal((TOKENS, k)).astype(np.float16))
    case = GemmCase(weights, ctx, inputs, [random_ids(rng, TOKENS, experts, ROUTED_EXPERTS)])
    ctx.finish()
    marks.append(time.perf_counter())
    for name in ("first call", "second call"):
        case.calls[0]()
        ctx.finish()
        mark(name)
    programs = backend.runtime.programs
    print(json.dumps({**seconds, "compiled": programs.compiled, "loaded": programs.loaded}))


if __name__ == "__main__":
    main(*sys.argv[1:])

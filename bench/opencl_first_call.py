"""Seconds of a product's first call and of a warm one, in a process of its own: ``{name: seconds}`` as JSON.

``python opencl_first_call.py TIER DEVICE K N EXPERTS GROUP_SIZE``; the environment says where compiled
programs are kept. Run twice on a folder that was empty, it shows what compiling costs, and what loading
costs. ``--show`` does that.
"""

import json
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np

from bench.opencl_calls import GemmCase, Shape, Weights, random_ids
from marlin_cy import get_backend


def main(tier, device, *sizes):
    """Print the JSON object."""
    rng = np.random.default_rng(0)
    k, n, experts, group_size = map(int, sizes)
    backend = get_backend("opencl", device=device, tier=tier)
    weights = Weights(backend, Shape(k, n, experts, group_size=group_size))
    ctx = backend.new_context()
    seconds, marks = {}, [time.perf_counter()]

    def mark(name):
        marks.append(time.perf_counter())
        seconds[name] = marks[-1] - marks[-2]

    backend.tier  # noqa: B018  (checks it)
    mark("check of the tier")
    inputs = backend.from_host(rng.standard_normal((16, k)).astype(np.float16))
    case = GemmCase(weights, ctx, inputs, [random_ids(rng, 16, experts)])
    ctx.finish()
    marks.append(time.perf_counter())
    for name in ("first call", "second call"):
        case.calls[0]()
        ctx.finish()
        mark(name)
    programs = backend.runtime.programs
    print(json.dumps(seconds | {"compiled": programs.compiled, "loaded": programs.loaded}))


if __name__ == "__main__":
    main(*sys.argv[1:])

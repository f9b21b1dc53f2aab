"""One side of ``python -m bench before-after``: makes cases with an installed marlin_cy and times calls of them.

The file is run by the interpreter of each side, ``PYTHON -I before_after_worker.py [FOLDER]``. The package of a side
may be older than this repository, so the file imports nothing of ``bench`` and uses only public names of marlin_cy.
FOLDER comes first on the module search path: it holds the package if it is built in place and not installed.

Requests come on stdin and replies go to stdout, one JSON object per line:

================================================  ================================================================
``{"do": "make", "case": CASE}``                  builds the case and calls it once: ``{"digest": SHA-256 of the
                                                  output}``
``{"do": "block", "first": i, "min_seconds": s}``  calls i, i + 1, ... until they took ``s`` seconds together:
                                                  ``{"seconds": [of each call]}``
================================================  ================================================================

The first line of stdout is written without a request: :meth:`Worker.describe`. A request that failed gets
``{"error": message}``. The process ends when stdin ends. CASE has a ``kind`` and what that kind needs:

``"product"``: ``stack``, ``experts_per_call``, ``rows``
    ``gemm_phase_batched``: ``rows`` rows through each of ``experts_per_call`` experts. A call uses the next experts.
``"routed"``: ``stack``, ``copies``, ``routings``
    ``gemm_phase_vllm``: rows gathered by expert. A call uses the next of ``copies`` equal stacks and the next routing,
    ``[tokens][top_k]`` expert ids.
``"layer"``: ``gate_up``, ``down``, ``copies``, ``routings``
    ``MoeLayer``, its routing included. A call uses the next of ``copies`` layers and the next routing.

A stack is ``[experts, k, n, group_size]``. Every case also has ``compute_dtype``, ``threads`` and ``isa``; the last two
may be null. Weights and activations follow from these numbers alone, so both sides compute the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

DISTINCT_WEIGHTS = 4  # shared by the experts; packing gives each expert memory of its own
BLOCK_SIZE = 16  # of the alignment of routed rows
CHOSEN_LOGIT = 20.0  # is added to the router logits of the experts that a routing names


def main(folders: Sequence[str]) -> None:
    """Answer requests until stdin ends."""
    sys.path[:0] = folders
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints to stdout must not mix with replies
    try:
        worker = Worker()
        answer(replies, worker.describe())
    except Exception as error:
        answer(replies, failure(error))
        return
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "make":
                answer(replies, {"digest": worker.make(request["case"])})
            else:
                answer(replies, {"seconds": worker.block(request["first"], request["min_seconds"])})
        except Exception as error:
            answer(replies, failure(error))


def answer(stream: TextIO, message: dict[str, Any]) -> None:
    """Write one reply."""
    stream.write(json.dumps(message) + "\n")
    stream.flush()


def failure(error: Exception) -> dict[str, Any]:
    """The reply to a request that raised ``error``."""
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


class Worker:
    """Makes cases and times the latest one. Stacks and contexts are kept for later cases."""

    def __init__(self) -> None:
        import marlin_cy

        self._package = marlin_cy
        self._backend: Any = marlin_cy.get_backend("cpu")
        self._stacks: dict[Any, Any] = {}
        self._contexts: dict[Any, Any] = {}
        self._call: Callable[[int], object] = lambda i: None

    def describe(self) -> dict[str, Any]:
        """Version and folder of the package, and what it uses of the machine."""
        context = self._backend.new_context()
        return {
            "version": self._package.__version__,
            "folder": os.path.dirname(str(self._package.__file__)),
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            "isa": context.isa,
            "threads": context.num_threads,
        }

    def make(self, case: dict[str, Any]) -> str:
        """Build the case, call it once, and return the SHA-256 of its output."""
        makers = {"product": self._product, "routed": self._routed, "layer": self._layer}
        self._call, out = makers[case["kind"]](case)
        out[:] = np.nan
        self._call(0)
        return hashlib.sha256(out.view(np.uint8)).hexdigest()

    def block(self, first: int, min_seconds: float) -> list[float]:
        """Seconds of each of several calls that take at least ``min_seconds`` together; at least one call."""
        call, clock = self._call, time.perf_counter
        seconds: list[float] = []
        total = 0.0
        while not seconds or total < min_seconds:
            start = clock()
            call(first + len(seconds))
            seconds.append(clock() - start)
            total += seconds[-1]
        return seconds

    def _product(self, case: dict[str, Any]) -> tuple[Callable[[int], object], Any]:
        context, stack = self._context(case), self._stack(case["stack"])
        per_call, rows = case["experts_per_call"], case["rows"]
        x = activations(per_call * rows, stack.k)
        out = np.empty((per_call * rows, stack.n_per_expert), x.dtype)
        begins = np.arange(per_call) * rows
        dispatches = []
        for turn in range(np.lcm(stack.num_experts, per_call) // per_call):
            experts = (turn * per_call + np.arange(per_call)) % stack.num_experts
            dispatches.append(np.stack([experts, begins, begins, np.full(per_call, rows)], axis=1))
        turns = len(dispatches)
        return lambda i: stack.gemm_phase_batched(context, x, dispatches[i % turns], out, stack.k), out

    def _routed(self, case: dict[str, Any]) -> tuple[Callable[[int], object], Any]:
        context = self._context(case)
        stacks = [self._stack(case["stack"], copy) for copy in range(case["copies"])]
        routings = [np.array(ids, np.int32) for ids in case["routings"]]
        tokens, top_k = routings[0].shape
        align = self._package.moe_align_block_size
        aligned = [align(ids, BLOCK_SIZE, stacks[0].num_experts) for ids in routings]
        x = activations(tokens, stacks[0].k)
        out = np.empty((tokens * top_k, stacks[0].n_per_expert), x.dtype)

        def call(i: int) -> None:
            stack = stacks[i % len(stacks)]
            stack.gemm_phase_vllm(context, x, *aligned[i % len(aligned)], out, tokens, BLOCK_SIZE, top_k)

        return call, out

    def _layer(self, case: dict[str, Any]) -> tuple[Callable[[int], object], Any]:
        context = self._context(case)
        routings = [np.array(ids) for ids in case["routings"]]
        tokens, top_k = routings[0].shape
        layers = [
            self._package.MoeLayer(self._stack(case["gate_up"], copy), self._stack(case["down"], copy), top_k=top_k)
            for copy in range(case["copies"])
        ]
        x = activations(tokens, layers[0].hidden_size)
        out = np.empty_like(x)
        rng = np.random.default_rng(1)
        logits = []
        for ids in routings:
            drawn = rng.standard_normal((tokens, layers[0].num_experts), np.float32)
            np.put_along_axis(drawn, ids, np.take_along_axis(drawn, ids, axis=1) + CHOSEN_LOGIT, axis=1)
            logits.append(drawn)
        return lambda i: layers[i % len(layers)](context, x, logits[i % len(logits)], out=out), out

    def _context(self, case: dict[str, Any]) -> Any:
        key = case["threads"], case["compute_dtype"], case["isa"]
        if key not in self._contexts:
            threads, compute_dtype, isa = key
            self._contexts[key] = self._backend.new_context(num_threads=threads, compute_dtype=compute_dtype, isa=isa)
        return self._contexts[key]

    def _stack(self, sizes: Sequence[int], copy: int = 0) -> Any:
        """A stack of random symmetric GPTQ weights, made once. Copies hold the same values in other memory."""
        experts, k, n, group_size = sizes
        key = experts, k, n, group_size, copy
        if key in self._stacks:
            return self._stacks[key]
        rng, groups = np.random.default_rng(0), -(-k // group_size)
        distinct = [
            (
                rng.integers(0, 1 << 32, (k // 8, n), np.uint32).view(np.int32),
                rng.uniform(0.005, 0.015, (groups, n)).astype(np.float16),
                np.full((groups, n // 8), 0x77777777, np.int32),
            )
            for _ in range(min(DISTINCT_WEIGHTS, experts))
        ]
        tensors = zip(*(distinct[expert % len(distinct)] for expert in range(experts)), strict=True)
        self._stacks[key] = self._backend.load_gptq_stacked(
            *map(list, tensors), bits=4, group_size=group_size, k=k, n_per_expert=n
        )
        return self._stacks[key]


def activations(rows: int, width: int) -> npt.NDArray[Any]:
    """Normal bfloat16 ``[rows, width]``: the dtype that models have."""
    from ml_dtypes import bfloat16

    return np.random.default_rng(2).standard_normal((rows, width), np.float32).astype(bfloat16)


if __name__ == "__main__":
    main(sys.argv[1:])

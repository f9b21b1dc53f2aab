"""One host of ``python -m bench mpi``. Rank 0 prints what was measured, as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def main(settings: Mapping[str, Any]) -> None:
    """Measure with all hosts together."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[comm.rank % len(cpus)]})
    figures = _Host(comm, settings).measure()
    if comm.rank == 0:
        print(json.dumps(figures))


class _Host:
    """A layer of Qwen3-30B-A3B's shape: whole on rank 0, and shared out over all hosts."""

    def __init__(self, comm: Any, settings: Mapping[str, Any]) -> None:
        # These load OpenMP, which must see the CPU that was chosen.
        from bench.common.shapes import build_stack
        from marlin_cy import MoeLayer, get_backend
        from marlin_cy.distributed import Group

        self._comm, self._settings = comm, settings
        # The bare gathers must not be between those of the group.
        self._group = Group(comm.Dup())
        rng = np.random.default_rng(0)
        experts = settings["experts"]
        hidden, inner = (256, 128) if settings["quick"] else (2048, 768)
        backend = get_backend("cpu")
        self._ctx = backend.new_context(num_threads=1, compute_dtype=settings["compute_dtype"])
        gate_up = build_stack(backend, experts, hidden, 2 * inner, 128)
        down = build_stack(backend, experts, inner, hidden, 128)
        self._whole = MoeLayer(gate_up, down, top_k=min(8, experts))
        self._share = self._group.layer(self._whole)
        self._x = rng.standard_normal((settings["tokens"], hidden), dtype=np.float32)
        self._logits = rng.standard_normal((settings["tokens"], experts), dtype=np.float32)

    def measure(self) -> dict[str, Any]:
        """The document's figures."""
        from bench.common.timing import exact, ratios, spread

        alone, together, exchanges, bare = (list[float]() for _ in range(4))
        messages = self._messages()
        for number in range(self._settings["rounds"] + 1):
            one = self._timed(lambda: self._whole(self._ctx, self._x, self._logits), only_first=True)
            all_hosts = self._timed(lambda: self._share(self._ctx, self._x, self._logits))
            ours = self._timed(lambda: self._exchange(messages))
            theirs = self._timed(lambda: self._gather(messages))
            if number:  # the first round warms up
                alone.append(one)
                together.append(all_hosts)
                exchanges.append(ours)
                bare.append(theirs)
        expected = self._whole(self._ctx, self._x, self._logits)
        assert np.array_equal(self._share(self._ctx, self._x, self._logits), expected)
        return {
            "speedup": ratios(alone, together)._asdict(),
            "exchange": ratios(exchanges, bare)._asdict(),
            "memory": exact(self._memory())._asdict(),
            "ms": {
                name: spread(np.multiply(seconds, 1e3))._asdict()
                for name, seconds in (
                    ("alone", alone),
                    ("together", together),
                    ("exchanges", exchanges),
                    ("bare", bare),
                )
            },
        }

    def _timed(self, call: Callable[[], object], only_first: bool = False) -> float:
        """Seconds until the last host has made a call."""
        self._comm.Barrier()
        start = time.perf_counter()
        if not only_first or self._comm.rank == 0:
            call()
        self._comm.Barrier()
        return time.perf_counter() - start

    def _messages(self) -> list[tuple[Any, Any, list[int]]]:
        """``(sent, received, counts)`` of each exchange of a layer."""
        plan = self._share.plan
        assert plan.shard is not None
        made = []
        for cut, rows in ((plan.shard.inner, plan.top_k * len(self._x)), (plan.shard.outputs, len(self._x))):
            counts = [int(width) * rows * 4 for width in np.diff(cut)]
            made.append((np.ones(counts[self._comm.rank], np.uint8), np.ones(sum(counts), np.uint8), counts))
        return made

    def _exchange(self, messages: list[tuple[Any, Any, list[int]]]) -> None:
        """As a layer does: compare the arguments, and exchange. Rows are put together as they are quantised."""
        from marlin_cy.distributed.group import checksum

        self._group.agree("layer", {"hidden_states": checksum(self._x), "router_logits": checksum(self._logits)})
        for message in messages:
            self._group.gather(*message)

    def _gather(self, messages: list[tuple[Any, Any, list[int]]]) -> None:
        for sent, received, counts in messages:
            self._comm.Allgatherv(sent, [received, counts])

    def _memory(self) -> float:
        """The most bytes of a host over its part of all bytes, where one tile of each expert is not counted."""
        most = 0.0
        plan, whole = self._share.plan, self._whole
        for part, stack, runs in ((plan.gate_up, whole.gate_up, 2), (plan.down, whole.down, 1)):
            tiles = runs * stack.num_experts * stack.as_any().store.layout.tile_stride
            extra = part.metadata.packed_bytes - tiles
            most = max(most, extra * self._comm.size / stack.metadata.packed_bytes)
        return float(max(self._comm.allgather(most)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

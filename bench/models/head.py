"""The head of a large vocabulary alone: a model whose only layer is as small as a layer can be."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from marlin_cy import get_backend
from marlin_cy.decoder.plan import AttentionPlan, DecoderPlan, DenseLinear, LayerPlan, MlpPlan
from marlin_cy.decoder.program import Batch

__all__ = ["HeadStep", "write_head"]

WIDTH = 16  # of the layer's heads and of its feed-forward network
STEPS = 5
DISTINCT_ROWS = 1024


def write_head(path: Path, vocab_size: int, hidden_size: int) -> None:
    """Write a head's weights, bfloat16 ``[vocab_size, hidden_size]``. Rows repeat, which speed does not depend on."""
    rows = np.random.default_rng(0).standard_normal((DISTINCT_ROWS, hidden_size), np.float32) / np.sqrt(hidden_size)
    data = rows.astype(ml_dtypes.bfloat16).view(np.uint16)
    with path.open("wb") as file:
        for begin in range(0, vocab_size, DISTINCT_ROWS):
            file.write(data[: vocab_size - begin].tobytes())


class HeadStep:
    """Steps of one row, whose time is that of the head: the layer has a thousandth of the head's weights.

    Parameters
    ----------
    path : Path
        A file that :func:`write_head` wrote. It is mapped, as the files of a checkpoint are.
    vocab_size, hidden_size : int
    threads : int or None
    isa : str or None
    """

    def __init__(self, path: Path, vocab_size: int, hidden_size: int, threads: int | None, isa: str | None) -> None:
        mapped = np.memmap(path, np.uint16, "r", shape=(vocab_size, hidden_size))
        weight = np.asarray(mapped).view(ml_dtypes.bfloat16)
        rng = np.random.default_rng(0)

        def dense(n: int, k: int) -> DenseLinear:
            return DenseLinear((rng.standard_normal((n, k), np.float32) / np.sqrt(k)).astype(ml_dtypes.bfloat16))

        ones = np.ones(hidden_size, np.float32)
        q, k, v, gate, up = (dense(WIDTH, hidden_size) for _ in range(5))
        o, down = (dense(hidden_size, WIDTH) for _ in range(2))
        attention = AttentionPlan(q, k, v, o, num_heads=1, num_kv_heads=1, head_dim=WIDTH, scale=1.0)
        layer = LayerPlan(ones, attention, ones, MlpPlan(gate, up, down, "silu"))
        plan = DecoderPlan(hidden_size, vocab_size, 16, 1e-6, weight, [layer], ones, DenseLinear(weight))
        backend = get_backend("cpu")
        context = backend.new_context(num_threads=threads, isa=isa)
        self._program: Any = backend.new_decoder(context, plan, 1, 0, "float16")
        segments = np.array([[0, 1, 0, -1]], np.int64)
        self._batch = Batch(np.zeros(1, np.int32), segments, np.zeros((1, 1), np.int32), np.zeros(1, np.int32))

    def seconds(self) -> float:
        """Seconds of a step: the median of some."""
        seconds = []
        for _ in range(STEPS):
            start = time.perf_counter()
            self._program.step(self._batch)
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds))

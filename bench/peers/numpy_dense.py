"""Weights dequantised to float32 when loaded and multiplied by NumPy, as ferrum-kernels does on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.peers.forms import require_plain
from bench.peers.interface import Array, Peer, Projection
from marlin_cy import reference
from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["NumpyDense"]


class NumpyDense(Peer):
    """NumPy's BLAS. Its number of threads was set by the environment when NumPy was imported.

    OpenBLAS uses as many threads as the process has CPUs, or ``OPENBLAS_NUM_THREADS``. ``num_threads`` has no effect.
    """

    name, accuracy, distribution = "numpy_dense", "float32", "numpy"
    weight_bytes = 4

    def available(self) -> str | None:
        return None

    def load(self, weight: CanonicalWeight) -> Projection:
        require_plain(weight)
        return _Dense(reference.dequantize_weight(weight).astype(np.float32))


class _Dense(Projection):
    def __init__(self, weight: Array) -> None:
        self._weight = weight

    def prepare(self, x: Array) -> Any:
        return np.ascontiguousarray(x, np.float32)

    def run(self, prepared: Any) -> Any:
        return prepared @ self._weight

    def result(self, out: Array) -> Array:
        return out

"""Weights expanded to float32 when loaded, multiplied by NumPy: what ferrum-kernels does on a CPU."""

import numpy as np

from marlin_cy import reference

from .interface import Peer, Projection, require_plain

__all__ = ["NumpyDense"]


class NumpyDense(Peer):
    """NumPy's BLAS, whose threads are as many as its environment said when NumPy was imported.

    OpenBLAS takes the CPUs that the process may run on, or ``OPENBLAS_NUM_THREADS``; ``num_threads`` does not
    change them.
    """

    name, accuracy, distribution = "numpy_dense", "float32", "numpy"
    weight_bytes = 4

    def available(self):
        return None

    def load(self, weight):
        require_plain(weight)
        return _Dense(reference.dequantize_weight(weight).astype(np.float32))


class _Dense(Projection):
    def __init__(self, weight):
        self._weight = weight

    def prepare(self, x):
        return np.ascontiguousarray(x, np.float32)

    def run(self, prepared):
        return prepared @ self._weight

    def result(self, out):
        return out

"""The first use of a build of dense products by tensor cores: checked on two products, with the very same program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.opencl.buffers import TYPES, WEIGHT_CODES, as_bytes
from marlin_cy.opencl.checks.verdicts import unchecked_backend
from marlin_cy.opencl.decoder.dense_mma import FLOAT8, INT8, WAVE_K
from marlin_cy.opencl.memory import uploaded, zeroed_buffers
from marlin_cy.opencl.recording import RecordingContext

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.decoder.dense_mma import DenseKernel

__all__ = ["reason_wrong", "results"]

TOLERANCE = 1e-4  # of the norm: rows in two parts give 1e-5, and in one part of bfloat16 2e-3
BATCH = 2


def reason_wrong(backend: OpenClBackend, kernel: DenseKernel) -> str | None:
    """None if a build gives correct results, else a description of the error."""
    # Two stages of K and a part of a third, more than one tile of rows and columns.
    sizes = kernel.rows + 3, kernel.columns + 5, WAVE_K * (2 * kernel.k_waves) + 24
    actual, expected = results(unchecked_backend(backend), kernel, *sizes, np.random.default_rng(0))
    error = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    if not error <= TOLERANCE:  # a NaN is wrong, too
        return f"its results are wrong: relative error {error:.2g}, expected at most {TOLERANCE:g}"
    return None


def results(
    backend: OpenClBackend, kernel: DenseKernel, rows: int, n: int, k: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Results of a kernel, and the expected results, with strides between rows; NaN is what the kernel left unwritten.

    What lies between the rows and behind the weights is NaN.
    """
    x_stride, out_stride = BATCH * k + 16, BATCH * n + 3
    x = np.full((rows, x_stride), np.nan, TYPES[kernel.input_type])
    x[:, 8 : 8 + BATCH * k] = rng.standard_normal((rows, BATCH * k))
    dtype = tuple(WEIGHT_CODES)[kernel.weight_type]
    weight = np.full(BATCH * n * k + 1024, 127 if dtype == np.int8 else np.nan, dtype)
    weight[: BATCH * n * k] = rng.standard_normal(BATCH * n * k) * (30 if kernel.weight_type == INT8 else 1)
    matrices = weight[: BATCH * n * k].reshape(BATCH, n, k).astype(np.float64)
    scales = None
    if kernel.weight_type in (FLOAT8, INT8):  # the matrices of a batch have the same scales
        scale_k = kernel.scale_k or k
        scales = rng.uniform(0.5, 2, (n, -(-k // scale_k))).astype(np.float32)
        matrices *= np.repeat(scales, scale_k, axis=1)[:, :k].astype(np.float64)
    bias = rng.standard_normal(n).astype(np.float32)
    inputs = x[:, 8 : 8 + BATCH * k].astype(np.float64).reshape(rows, BATCH, k)
    expected = np.einsum("rbk,bnk->rbn", inputs, matrices) + bias
    runtime, ctx = backend.runtime, backend.new_context()
    recorder = RecordingContext(backend, ctx.queue)
    (out,) = zeroed_buffers(runtime, [4 * rows * out_stride], "output of a check")
    cl.enqueue_fill_buffer(ctx.queue, out, b"\xff" * 4, 0, out.size)
    kernel.record(
        recorder,
        BATCH,
        "dense",
        {
            "x": uploaded(runtime, as_bytes(x), "rows of a check"),
            "x_offset": 8,
            "x_stride": x_stride,
            "x_batch": k,
            "weight": uploaded(runtime, as_bytes(weight), "weights of a check"),
            "scales": None if scales is None else uploaded(runtime, scales, "scales of a check"),
            "bias": uploaded(runtime, bias, "bias of a check"),
            "out": out,
            "out_offset": 1,
            "out_stride": out_stride,
            "out_batch": n,
            "rows": rows,
            "n": n,
            "k": k,
        },
    )
    recorder.recording.enqueue(ctx.queue)
    found = np.empty((rows, out_stride), np.float32)
    cl.enqueue_copy(ctx.queue, found, out)
    return found[:, 1 : 1 + BATCH * n].reshape(rows, BATCH, n).astype(np.float64), expected

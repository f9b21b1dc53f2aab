"""The first use of the launch that norms rows, computes the router's product and chooses experts: checked on four rows.

If it is wrong, experts are chosen by a launch of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyopencl as cl

from marlin_cy.opencl.buffers import TYPES, WEIGHT_CODES, memory_of
from marlin_cy.opencl.checks.routing import (
    alignment_error,
    device_rows,
    new_chosen,
    read,
    routing_kind,
    topk_error,
)
from marlin_cy.opencl.checks.verdicts import unchecked_backend
from marlin_cy.opencl.decoder.maker import Maker
from marlin_cy.opencl.decoder.norm_router import MOST_FUSED_ROWS, Choice, NormRouter, NormRows
from marlin_cy.opencl.decoder.projections import DenseMatrix, Uploads
from marlin_cy.opencl.decoder.step import StepLayout
from marlin_cy.opencl.layer.align import routing_arrays
from marlin_cy.opencl.memory import uploaded, zeroed_buffers
from marlin_cy.opencl.recording import RecordingContext

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend

__all__ = ["is_choice_correct"]

UNWRITTEN = b"\xff" * 4  # no expert's number, and a NaN
LOGITS_TOLERANCE = 1e-4  # of the norm; sums in float32 of some thousand terms give 1e-6
ROWS_TOLERANCE = {0: 1e-5, 1: 1e-3, 2: 8e-3}
"""Of the norm, by the element type of the normed rows."""


def is_choice_correct(backend: OpenClBackend, launch: NormRouter, output_type: int) -> bool:
    """Whether the launch chooses correctly; ``output_type``: of its normed rows."""
    verdicts = backend.runtime.verdicts
    if verdicts is None:
        return True
    router = launch.router
    sizes = f"width {router.k}, weights {router.type_code}, bias {router.bias is not None}, rows {TYPES[output_type]}"
    kind = f"norm, router, route, align: {routing_kind(launch.routing)}, {sizes}"
    reason = verdicts.reason_wrong(kind, lambda: reason_wrong(backend, launch, output_type))
    if reason is not None:
        name = backend.runtime.capabilities.name
        verdicts.warn(f"{name}: the launch 'norm_router, route, align'", reason, stacklevel=6)
    return reason is None


def reason_wrong(backend: OpenClBackend, launch: NormRouter, output_type: int) -> str | None:
    """None if some rows are normed and routed correctly, else a description of the error."""
    backend, rng = unchecked_backend(backend), np.random.default_rng(0)
    runtime, ctx, routing = backend.runtime, backend.new_context(), launch.routing
    recorder, rows = RecordingContext(backend, ctx.queue), MOST_FUSED_ROWS
    width: int = launch.router.k
    experts: int = launch.router.n
    x, added = rng.standard_normal((2, rows, width), np.float32)
    weight = rng.uniform(0.5, 1.5, width).astype(np.float32)
    dtype = tuple(WEIGHT_CODES)[launch.router.type_code]
    matrix = (rng.standard_normal((experts, width)) / width**0.5).astype(dtype)
    bias = None if launch.router.bias is None else rng.standard_normal(experts).astype(np.float32)
    router = DenseMatrix(Uploads(runtime), matrix, bias)
    total = x.astype(np.float64) + added
    normed = total / np.sqrt(np.mean(total**2, axis=1, keepdims=True) + 1e-6) * weight
    expected = normed @ matrix.astype(np.float64).T + (0 if bias is None else bias)
    maker = Maker(recorder, zeroed_buffers(runtime, [4096], "step of a check")[0], StepLayout(rows), rows)
    output, logits = maker.room("output of a check", width, output_type), maker.room("logits of a check", experts)
    y = maker.room("sum of a check", width)
    chosen, ids, weights = new_chosen(backend, rows, routing.top_k)
    work = routing_arrays(recorder, chosen, rows * routing.top_k, experts)
    of_rows = NormRows(
        device_rows(backend, x), device_rows(backend, added), y, uploaded(runtime, weight, "check"), 1e-6, output
    )
    (unused,) = zeroed_buffers(runtime, [4], "counter of a check")
    NormRouter(router, routing).record(maker, of_rows, logits, Choice(chosen, work), unused)
    for _ in range(2):  # the second launch starts with the counters that the first one left
        for buffer, nbytes in ((memory_of(ids), ids.nbytes), (logits.data, 4 * rows * experts)):
            assert buffer is not None
            cl.enqueue_fill_buffer(ctx.queue, buffer, UNWRITTEN, 0, nbytes)
        recorder.recording.enqueue(ctx.queue)
        found = read(ctx, logits.data, np.float32, rows * experts).reshape(rows, experts)
        if not np.linalg.norm(found - expected) <= LOGITS_TOLERANCE * np.linalg.norm(expected):
            return "the logits are wrong"
        stored = read(ctx, output.data, TYPES[output_type], rows * width).reshape(rows, width).astype(np.float64)
        if not np.linalg.norm(stored - normed) <= ROWS_TOLERANCE[output_type] * np.linalg.norm(normed):
            return "the normed rows are wrong"
        topk = backend.to_host(ids)
        reason = topk_error(found, routing, topk, backend.to_host(weights))
        reason = reason or alignment_error(ctx, work, topk, experts)
        if reason is not None:
            return reason
    return None

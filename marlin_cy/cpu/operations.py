"""The CPU's operations of a decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.cpu import _attention, _operations, fork
from marlin_cy.cpu.context import workspace_of
from marlin_cy.decoder.operations import DecoderOperations
from marlin_cy.interface import Context

__all__ = ["CpuOperations"]

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int32]


class CpuOperations(DecoderOperations):
    """The same bits for any number of threads and every instruction set."""

    def embedding_rows(self, ctx: Context, table: Array, tokens: Indices, out: Array) -> None:
        fork.run(_operations.embedding_rows, workspace_of(ctx), table, tokens, out)

    def rms_norm(
        self, ctx: Context, x: Array, weight: Array | None, eps: float, out: Array, *, residual: Array | None = None
    ) -> None:
        fork.run(_operations.rms_norm, workspace_of(ctx), x, weight, eps, out, residual)

    def gated_rms_norm(self, ctx: Context, x: Array, weight: Array | None, gate: Array, eps: float, out: Array) -> None:
        fork.run(_operations.gated_rms_norm, workspace_of(ctx), x, weight, gate, eps, out)

    def l2_normalize(self, ctx: Context, x: Array, factor: float) -> None:
        fork.run(_operations.l2_normalize, workspace_of(ctx), x, factor)

    def rope(
        self, ctx: Context, x: Array, cos: Array, sin: Array, positions: Indices, *, interleaved: bool = False
    ) -> None:
        fork.run(_operations.rope, workspace_of(ctx), x, cos, sin, positions, interleaved)

    def dense(self, ctx: Context, x: Array, weight: Array, bias: Array | None, out: Array) -> None:
        """As in the base class. ``x`` and ``out`` may also be float16 or bfloat16; results are rounded once."""
        fork.run(_operations.dense, workspace_of(ctx), x, weight, bias, out)

    def append_to_cache(
        self, ctx: Context, keys: Array, values: Array, k: Array, v: Array, page_table: Indices, start: int
    ) -> None:
        fork.run(_attention.append_to_cache, workspace_of(ctx), keys, values, k, v, page_table, start)

    def attention(
        self,
        ctx: Context,
        q: Array,
        keys: Array,
        values: Array,
        page_table: Indices,
        start: int,
        out: Array,
        *,
        scale: float,
        window: int | None = None,
        sinks: Array | None = None,
        soft_cap: float | None = None,
    ) -> None:
        arguments = q, keys, values, page_table, start, out, scale, window, sinks, soft_cap
        fork.run(_attention.attention, workspace_of(ctx), *arguments)

    def short_conv(self, ctx: Context, x: Array, weight: Array, state: Array, out: Array) -> None:
        fork.run(_operations.short_conv, workspace_of(ctx), x, weight, state, out)

    def delta_gates(
        self, ctx: Context, a: Array, b: Array, a_log: Array, dt_bias: Array, decay: Array, beta: Array
    ) -> None:
        fork.run(_operations.delta_gates, workspace_of(ctx), a, b, a_log, dt_bias, decay, beta)

    def delta_rule(
        self, ctx: Context, q: Array, k: Array, v: Array, decay: Array, beta: Array, state: Array, out: Array
    ) -> None:
        fork.run(_operations.delta_rule, workspace_of(ctx), q, k, v, decay, beta, state, out)

"""The launches of gated DeltaNet: a short convolution, the delta rule, and a gated norm between products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from marlin_cy.decoder.plan import DeltaNetPlan
from marlin_cy.opencl.decoder.projections import ProjectionGroup
from marlin_cy.opencl.tiers.configuration import FLOAT32

if TYPE_CHECKING:
    from marlin_cy.opencl.buffers import Rows
    from marlin_cy.opencl.decoder.cache import StatePool
    from marlin_cy.opencl.decoder.maker import Maker
    from marlin_cy.opencl.decoder.merged import Merger
    from marlin_cy.opencl.decoder.projections import Uploads
    from marlin_cy.opencl.decoder.step import Known

__all__ = ["DeltaNet"]

STATE_COLUMNS = 32
"""Columns of a state in a work-group of ``delta_rule``: a row of work-items reads a whole line of the state."""
PART_KEYS = 32
"""Values of a column in the registers of a work-item, at most."""
HEAD_ITEMS, CPU_HEAD_ITEMS = 64, 8
CONV_ITEMS = 64


class DeltaNet:
    """A layer of gated DeltaNet.

    Parameters
    ----------
    uploads : Uploads
    merger : Merger
    plan : DeltaNetPlan
    pool : StatePool
    """

    def __init__(self, uploads: Uploads, merger: Merger, plan: DeltaNetPlan, pool: StatePool) -> None:
        self._plan, self._pool = plan, pool
        self._inputs = ProjectionGroup(uploads, [plan.qkv, plan.z], merger)
        self._gates = ProjectionGroup(uploads, [plan.b, plan.a])
        self._output = ProjectionGroup(uploads, [plan.o])
        self._conv = uploads(plan.conv, "weights of a convolution")
        self._a_log, self._dt_bias = (uploads(array, "gates") for array in (plan.a_log, plan.dt_bias))
        self._norm = uploads(plan.norm, "norm of values")

    def record(self, maker: Maker, x: Rows, out: Rows, row_type: int) -> None:
        """Record the layer: ``out`` is its output."""
        plan, layout = self._plan, maker.layout
        channels, values = self._pool.channels, plan.num_v_heads * plan.value_dim
        projected = maker.room("heads", self._inputs.width)
        self._inputs.record(maker, x, projected, "qkv, z")
        gates = maker.room("gates", self._gates.width)
        self._gates.record(maker, x, gates, "b, a")
        mixed = maker.room("mixed", channels)
        maker.record(
            "decoder_delta",
            "short_conv",
            self._macros(maker, FLOAT32),
            (-(-channels // CONV_ITEMS) * CONV_ITEMS, maker.rows),
            (CONV_ITEMS, 1),
            "short_conv",
            batch=maker.step,
            segments=layout.segments,
            input=projected.data,
            input_stride=projected.width,
            weight=self._conv,
            states=self._pool.conv,
            output=mixed.data,
            channels=channels,
            conv_width=plan.conv_width,
        )
        y = maker.room("recalled", values)
        macros = self._macros(maker, FLOAT32)
        state_items = macros["STATE_COLUMNS"] * macros["KEY_PARTS"]
        blocks = -(-plan.value_dim // macros["STATE_COLUMNS"])

        def size(known: Known) -> tuple[int, ...]:
            return blocks * state_items, plan.num_v_heads, known.segments

        maker.record(
            "decoder_delta",
            "delta_rule",
            macros,
            size,
            (state_items, 1, 1),
            "delta_rule",
            batch=maker.step,
            segments=layout.segments,
            mixed=mixed.data,
            raw=projected.data,
            raw_stride=projected.width,
            gates=gates.data,
            a_log=self._a_log,
            dt_bias=self._dt_bias,
            output=y.data,
            states=self._pool.states,
            conv_states=self._pool.conv,
            num_k_heads=plan.num_k_heads,
            num_v_heads=plan.num_v_heads,
            conv_width=plan.conv_width,
        )
        type_code = row_type if self._output.quantised else FLOAT32
        normed = maker.room("attention", values, type_code)
        macros = self._macros(maker, type_code)
        items = macros["HEAD_ITEMS"]
        maker.record(
            "decoder_delta",
            "gated_norm_heads",
            macros,
            (maker.rows * items, plan.num_v_heads),
            (items, 1),
            "gated_norm_heads",
            y=y.data,
            gate=projected.data,
            gate_offset=channels,
            gate_stride=projected.width,
            weight=self._norm,
            output=normed.data,
            heads=plan.num_v_heads,
            width=plan.value_dim,
            eps=plan.norm_eps,
        )
        self._output.record(maker, normed, out, "o")

    def _macros(self, maker: Maker, output_type: int) -> dict[str, int]:
        """The macros of the program, which are those of all three kernels."""
        plan = self._plan
        parts = next(
            parts
            for parts in (1, 2, 4, 8, 16, plan.key_dim)
            if plan.key_dim % parts == 0 and plan.key_dim // parts <= PART_KEYS
        )
        cpu = maker.ctx.backend.runtime.capabilities.is_cpu
        return {
            "KEY_DIM": plan.key_dim,
            "VALUE_DIM": plan.value_dim,
            "STATE_COLUMNS": min(STATE_COLUMNS, plan.value_dim),
            "KEY_PARTS": parts,
            "HEAD_ITEMS": CPU_HEAD_ITEMS if cpu else HEAD_ITEMS,
            "OUTPUT_TYPE": output_type,
        }

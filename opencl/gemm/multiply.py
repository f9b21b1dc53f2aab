"""Products of rows with packed experts: the kernels, their arguments, and the number of work-groups.

A product takes at most three launches: rows are prepared, unless the kernel can read them directly; they are
multiplied; and if K is split, the sums of its runs are added. The choices for a kind of call (its :class:`Plan`) are
made once per context and store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import pyopencl as cl

from marlin_cy.opencl.arguments import arguments_of, product_input_values, product_output_values
from marlin_cy.opencl.buffers import Rows
from marlin_cy.opencl.checks.products import right_configuration
from marlin_cy.opencl.gemm.prepare import Prepared, are_aligned, needs_preparation, prepare
from marlin_cy.opencl.gemm.work import RoutedBlocks, Work
from marlin_cy.opencl.launch import Launch
from marlin_cy.opencl.tiers.configuration import (
    FLOAT16,
    FLOAT16_ROWS,
    FLOAT32,
    FLOAT32_ROWS,
    PLANES,
    Configuration,
    Problem,
)

if TYPE_CHECKING:
    from marlin_cy.opencl.context import OpenClContext
    from marlin_cy.opencl.device import Capabilities
    from marlin_cy.opencl.store import OpenClGptqStore

__all__ = ["EXPERT_BIAS", "NO_BIAS", "OUTPUT_BIAS", "Weights", "multiply", "problem_of"]

REDUCE_LOCAL_SIZE = 64
MAX_GROUPS = (1 << 31) - 1  # the largest grid of a GPU
NO_BIAS, OUTPUT_BIAS, EXPERT_BIAS = range(3)  # BIAS of common.cl
# The INPUT_TYPE of a gemm that reads prepared rows.
PREPARED_INPUT_TYPE = {FLOAT32_ROWS: FLOAT32, FLOAT16_ROWS: FLOAT16, PLANES: FLOAT32}


class Weights(Protocol):
    """The weights of a product: a stack or a view of one.

    Attributes
    ----------
    store : OpenClGptqStore
    bias_kind : int
        NO_BIAS, OUTPUT_BIAS or EXPERT_BIAS.
    bias_buffer : pyopencl.Buffer or None
    """

    store: OpenClGptqStore
    bias_kind: int
    bias_buffer: cl.Buffer | None


class Plan(NamedTuple):
    """The choices for a kind of call.

    Attributes
    ----------
    configuration : Configuration
    gemm : Launch
    reduce : Launch or None
        None unless K is split.
    prepared : bool
        Whether rows must be prepared first.
    shares : int
        Work-groups per row tile: column tiles times runs of K.
    max_groups : int
        The largest number of work-groups in the grid.
    """

    configuration: Configuration
    gemm: Launch
    reduce: Launch | None
    prepared: bool
    shares: int
    max_groups: int


def multiply(
    ctx: OpenClContext,
    weights: Weights,
    rows: Rows,
    out: Rows,
    work: Work,
    *,
    activation: str | None = None,
    prepared: Prepared | None = None,
    waits: list[cl.Event] | None = None,
    label: str,
) -> cl.Event:
    """Enqueue a product. The caller has checked all arguments and holds the context.

    Parameters
    ----------
    ctx : OpenClContext
    weights : OpenClMarlinExpertStack or OpenClLinear
    rows, out : Rows
    work : RoutedBlocks or TileList
    activation : str, optional
        An activation of a MoE layer. Rows are then ``[gate, up]``, twice as wide as K, and the product is that of
        ``act(gate) * up``.
    prepared : Prepared, optional
        The prepared rows, if their preparation has been enqueued; only where :func:`needs_preparation` is true.
    waits : list of pyopencl.Event, optional
        Events that the first launch waits for.
    label : str
        The name of the events.

    Returns
    -------
    pyopencl.Event
        Of the last launch.
    """
    store, bias = weights.store, weights.bias_buffer
    plans = ctx.plans_of(store)
    key = rows.type_code, are_aligned(rows), out.type_code, activation, weights.bias_kind, work.kind()
    plan = plans.get(key)
    if plan is None:
        plan = plans[key] = make_plan(ctx, store, rows, out, work, weights.bias_kind, activation)
    configuration, queue, limit = plan.configuration, ctx.queue, plan.max_groups
    data, offset, row_factor, by_slot = rows.data, rows.offset, None, 0
    if plan.prepared:
        if prepared is None:
            prepared, waits = prepare(ctx, store, rows, work, activation, waits, label), None
        data, row_factor, by_slot, work = prepared
        offset = 0
    if isinstance(work, RoutedBlocks):
        row_tiles = work.limit // work.block_size * -(-work.block_size // configuration.rows)
        work_arguments = work.arguments(ctx, by_slot)
    else:
        work_arguments = work.arguments(ctx, configuration.rows)
        _, row_tiles = work_arguments
    splits, local, partial = configuration.splits, configuration.local_size, None
    if splits > 1:
        partial = ctx.reserve("partial sums", 4 * splits * row_tiles * configuration.rows * store.n)
    inputs = product_input_values(input=data, input_offset=offset, row_factor=row_factor)
    outputs_and_work = (
        product_output_values(
            output=out.data,
            output_offset=out.offset,
            output_stride=out.width,
            bias=bias,
            partial=partial,
            tiles_capacity=row_tiles,
        )
        + work_arguments
    )
    groups = min(row_tiles * plan.shares, limit)
    event = plan.gemm(queue, (groups * local,), (local,), inputs + outputs_and_work, waits)
    ctx.log(label, event)
    if plan.reduce is not None:
        event = plan.reduce(
            queue,
            (min(row_tiles * configuration.rows, limit) * REDUCE_LOCAL_SIZE,),
            (REDUCE_LOCAL_SIZE,),
            outputs_and_work,
        )
        ctx.log(f"{label}: reduce_splits", event)
    return event


def make_plan(
    ctx: OpenClContext,
    store: OpenClGptqStore,
    rows: Rows,
    out: Rows,
    work: Work,
    bias_kind: int,
    activation: str | None,
) -> Plan:
    """Choose a configuration, and build its kernels."""
    tier, device = ctx.backend.tier, ctx.backend.runtime.capabilities
    inputs = tier.inputs(device)
    prepared = needs_preparation(ctx, store, rows, activation)
    layout = store.layout
    problem, tuned = problem_of(store, work, device), ctx.backend.runtime.tuned
    candidates = tuned.configurations(tier, problem, store.symmetric, store.codes)
    configuration = right_configuration(ctx, candidates, store, rows, out, work, bias_kind, activation)
    shape = {
        "ROWS": configuration.rows,
        "WHOLE_BLOCKS": int(isinstance(work, RoutedBlocks) and work.block_size <= configuration.rows),
        "ROUTED": int(isinstance(work, RoutedBlocks)),
        "OUTPUT_TYPE": out.type_code,
        "BIAS": bias_kind,
    }
    gemm_macros = {
        **dict(configuration.macros),
        **shape,
        **store.weight_macros,
        "INPUT_TYPE": PREPARED_INPUT_TYPE[inputs.prepared_type] if prepared else rows.type_code,
        "ALIGNED": int(prepared or are_aligned(rows)),
        "ROW_FACTOR": int(prepared and inputs.prepared_type == FLOAT16_ROWS),
        "SPLIT": int(configuration.splits > 1),
        "PARTS": len(store.parts),
    }
    weight_factor, tiny_factor = store.weight_factors
    programs = ctx.backend.runtime.programs
    gemm = Launch(
        programs.kernel(configuration.file or tier.file, "gemm", gemm_macros, tier.options(device)),
        arguments_of("gemm", gemm_macros),
        {
            **{f"w{number}": part for number, part in enumerate(store.parts)},
            "num_experts": store.num_experts,
            "experts_per_part": store.experts_per_part,
            "expert_words": layout.expert_words,
            "k": layout.packed_k,
            "n": layout.n,
            "groups": layout.groups,
            "group_shift": layout.group_shift,
            "weight_factor": weight_factor,
            "tiny_factor": tiny_factor,
            "splits": configuration.splits,
        },
    )
    reduce = None
    if configuration.splits > 1:
        reduce = Launch(
            programs.kernel("reduce", "reduce_splits", shape),
            arguments_of("reduce_splits", shape),
            {"num_experts": store.num_experts, "n": store.n, "splits": configuration.splits},
        )
    return Plan(
        configuration=configuration,
        gemm=gemm,
        reduce=reduce,
        prepared=prepared,
        shares=-(-layout.n // configuration.columns) * configuration.splits,
        max_groups=min(device.compute_units * configuration.groups_per_unit, MAX_GROUPS),
    )


def problem_of(store: OpenClGptqStore, work: Work, device: Capabilities) -> Problem:
    """The :class:`~marlin_cy.opencl.tiers.configuration.Problem` of some work on a store."""
    if isinstance(work, RoutedBlocks):
        most = work.limit // work.block_size
        columns, runs, rows = store.n, min(most, work.valid), min(work.block_size, work.valid)
    else:
        columns, most = int(work.runs[:, 2].max()), len(work.runs)
        runs, rows = most, -(-work.total_rows() // most)
    return Problem(
        rows=rows,
        runs=runs,
        most_runs=most,
        k=store.layout.packed_k,
        n=columns,
        group_rows=1 << store.layout.group_shift,
        device=device,
        codes=store.codes,
        scales=store.scales,
    )

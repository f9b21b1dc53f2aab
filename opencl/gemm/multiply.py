"""Products of rows with packed experts: which kernels, with which arguments, on how many work-groups.

A product is at most three launches: rows are prepared (where the kernel does not read them as they are:
another element type, or another order of K), multiplied, and, where K was split, the sums of its runs
are added up. What is decided for a kind of call (its :class:`Plan`) is decided once per context and store.
"""

from typing import NamedTuple

import numpy as np

from marlin_cy.opencl.checks.products import right_configuration
from marlin_cy.opencl.gemm.prepare import are_aligned, needs_preparation, prepare
from marlin_cy.opencl.gemm.work import RoutedBlocks
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

__all__ = ["EXPERT_BIAS", "NO_BIAS", "OUTPUT_BIAS", "multiply", "problem_of"]

BUFFER, INT, UINT, ULONG, FLOAT = None, np.int32, np.uint32, np.uint64, np.float32  # for Kernel.set_arg_types
WEIGHT_ARGUMENTS = (UINT, UINT, ULONG, UINT, UINT, UINT, UINT, FLOAT, FLOAT)  # after the parts
PRODUCT_ARGUMENTS = (BUFFER, ULONG, BUFFER, BUFFER, ULONG, UINT, BUFFER, BUFFER, UINT, INT)
REDUCE_ARGUMENTS = (UINT, UINT, BUFFER, ULONG, UINT, BUFFER, BUFFER, UINT, INT)
REDUCE_LOCAL_SIZE = 64
MAX_GROUPS = (1 << 31) - 1  # that a GPU can count
NO_BIAS, OUTPUT_BIAS, EXPERT_BIAS = range(3)  # BIAS of common.cl
CODES = {"uint4": 0, "e2m1": 1}  # CODES of common.cl
# What a gemm that reads prepared rows takes its input for.
PREPARED_INPUT_TYPE = {FLOAT32_ROWS: FLOAT32, FLOAT16_ROWS: FLOAT16, PLANES: FLOAT32}


class Plan(NamedTuple):
    """What is decided for a kind of call.

    Attributes
    ----------
    configuration : Configuration
    gemm : Launch
    reduce : Launch or None
        Where K is split.
    prepared : bool
        Whether rows have to be made ready first.
    shares : int
        What each row tile can be shared out in, by columns and K.
    max_groups : int
        Work-groups in a grid.
    """

    configuration: Configuration
    gemm: Launch
    reduce: Launch | None
    prepared: bool
    shares: int
    max_groups: int


def multiply(ctx, weights, rows, out, work, *, activation=None, prepared=None, waits=None, label):
    """Enqueue a product; the caller has checked everything and holds the context.

    Parameters
    ----------
    ctx : OpenClContext
    weights : OpenClMarlinExpertStack or OpenClLinear
        Has a ``store``, and what is added: ``bias_kind`` (as ``BIAS`` of common.cl) and ``bias_buffer``.
    rows, out : Rows
    work : RoutedBlocks or TileList
    activation : str, optional
        One of a MoE layer's: rows are ``[gate, up]``, twice as wide as K; what is multiplied is ``act(gate) * up``.
    prepared : Prepared, optional
        The rows made ready, where that is enqueued already; with ``needs_preparation`` alone.
    waits : list of pyopencl.Event, optional
        What the first launch has to wait for.
    label : str
        What the events are called.

    Returns
    -------
    pyopencl.Event
        Of the last launch.
    """
    store, bias = weights.store, weights.bias_buffer
    routed = type(work) is RoutedBlocks
    aligned = are_aligned(rows)
    plans = ctx.plans_of(store)
    key = rows.type_code, aligned, out.type_code, activation, weights.bias_kind, work.kind()
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
    if routed:
        row_tiles = work.limit // work.block_size * -(-work.block_size // configuration.rows)
        work_arguments = work.arguments(ctx, by_slot)
    else:
        tiles = work.tiles(configuration.rows)
        row_tiles = len(tiles)
        work_arguments = ctx.upload("row tiles", tiles), row_tiles
    splits, local, partial = configuration.splits, configuration.local_size, None
    work_groups = min(row_tiles * plan.shares, limit)
    if splits > 1:
        partial = ctx.reserve("partial sums", 4 * splits * row_tiles * configuration.rows * store.n)
    event = plan.gemm(
        queue,
        (work_groups * local,),
        (local,),
        (
            data,
            offset,
            row_factor,
            out.data,
            out.offset,
            out.width,
            bias,
            partial,
            row_tiles,
            splits,
            *work_arguments,
        ),
        waits,
    )
    ctx.log(label, event)
    if splits > 1:
        event = plan.reduce(
            queue,
            (min(row_tiles * configuration.rows, limit) * REDUCE_LOCAL_SIZE,),
            (REDUCE_LOCAL_SIZE,),
            (out.data, out.offset, out.width, bias, partial, row_tiles, splits, *work_arguments),
        )
        ctx.log(f"{label}: reduce_splits", event)
    return event


def problem_of(store, work, device):
    """The :class:`~marlin_cy.opencl.tiers.configuration.Problem` that some work on a store is."""
    if type(work) is RoutedBlocks:
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
    )


def make_plan(ctx, store, rows, out, work, bias_kind, activation):
    """Choose a configuration, and build its kernels."""
    tier, device = ctx.backend.tier, ctx.backend.runtime.capabilities
    inputs, routed = tier.inputs(device), type(work) is RoutedBlocks
    prepared = needs_preparation(ctx, store, rows, activation)
    layout = store.layout
    problem, tuned = problem_of(store, work, device), ctx.backend.runtime.tuned
    configuration = right_configuration(
        ctx,
        tuned.configurations(tier, problem, store.symmetric, store.codes),
        store,
        rows,
        out,
        work,
        bias_kind,
        activation,
    )
    split = configuration.splits > 1
    shape = {
        "ROWS": configuration.rows,
        "WHOLE_BLOCKS": int(routed and work.block_size <= configuration.rows),
        "ROUTED": int(routed),
        "OUTPUT_TYPE": out.type_code,
        "BIAS": bias_kind,
    }
    gemm_macros = {
        **dict(configuration.macros),
        **shape,
        "INPUT_TYPE": PREPARED_INPUT_TYPE[inputs.prepared_type] if prepared else rows.type_code,
        "ALIGNED": int(prepared or are_aligned(rows)),
        "ROW_FACTOR": int(prepared and inputs.prepared_type == FLOAT16_ROWS),
        "SPLIT": int(split),
        "PARTS": len(store.parts),
        "CODES": CODES[store.codes],
        "SYMMETRIC": int(store.symmetric),
    }
    weights = (
        *store.parts,
        store.num_experts,
        store.experts_per_part,
        layout.expert_words,
        layout.packed_k,
        layout.n,
        layout.groups,
        layout.group_shift,
        *store.weight_factors,
    )
    programs = ctx.backend.runtime.programs
    gemm = Launch(
        programs.kernel(configuration.file or tier.file, "gemm", gemm_macros, tier.options(device)),
        (BUFFER,) * len(store.parts) + WEIGHT_ARGUMENTS + PRODUCT_ARGUMENTS + work.argument_types,
        weights,
    )
    reduce = None
    if split:
        reduce = Launch(
            programs.kernel("reduce", "reduce_splits", shape),
            REDUCE_ARGUMENTS + work.argument_types,
            (store.num_experts, store.n),
        )
    shares = -(-layout.n // configuration.columns) * configuration.splits
    return Plan(
        configuration=configuration,
        gemm=gemm,
        reduce=reduce,
        prepared=prepared,
        shares=shares,
        max_groups=min(device.compute_units * configuration.groups_per_unit, MAX_GROUPS),
    )

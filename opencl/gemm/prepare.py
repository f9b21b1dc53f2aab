"""Rows made ready for a product: another element type, another order of K, or what an activation makes of them."""

from typing import NamedTuple

import numpy as np
import pyopencl as cl

from marlin_cy.opencl.gemm.work import TileList
from marlin_cy.opencl.tiers.configuration import FLOAT16_ROWS, FLOAT32_ROWS, PLANES

__all__ = [
    "ACTIVATIONS",
    "Preparation",
    "Prepared",
    "are_aligned",
    "needs_preparation",
    "ordered_alike",
    "preparation",
    "prepare",
]

BUFFER, UINT, ULONG = None, np.uint32, np.uint64  # for Kernel.set_arg_types
ARGUMENTS = (BUFFER, ULONG, BUFFER, BUFFER, UINT, UINT, BUFFER)
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "swigluoai": 4}  # ACTIVATION of activation.cl
# GATHER of prepare.cl
NO_ORDER, ONE_ORDER, BY_SLOT, MAPPED = range(4)
MAX_ITEMS = 256  # work-items in a work-group; a power of two
CPU_ITEMS = 32
ROW_STEP = 8  # elements that a work-item takes at a time; rows are multiples of 32


class Prepared(NamedTuple):
    """Rows as a product reads them.

    Attributes
    ----------
    data : pyopencl.Buffer
    row_factor : pyopencl.Buffer or None
        float32: what the products of each row are multiplied by.
    by_slot : int
        1: row s is that of slot s of the routing arrays.
    work : RoutedBlocks or TileList
        What the product does with them.
    """

    data: cl.Buffer
    row_factor: cl.Buffer | None
    by_slot: int
    work: object


class Preparation(NamedTuple):
    """What a launch that prepares rows is made of.

    Attributes
    ----------
    macros : dict of str to int
        What ``prepare.cl`` is built with.
    argument_types, arguments : tuple
        Those of ``prepare_rows``.
    count : int
        Rows, and so work-groups.
    prepared : Prepared
        What comes of it.
    """

    macros: dict
    argument_types: tuple
    arguments: tuple
    count: int
    prepared: Prepared


def row_bytes(prepared_type, layout):
    """Bytes of a prepared row."""
    if prepared_type == PLANES:
        return 2 * layout.packed_k + 16 * -(-layout.groups // 2)
    return layout.packed_k * (4 if prepared_type == FLOAT32_ROWS else 2)


def are_aligned(rows):
    """Whether work-items may load what they take at a time at once (``ALIGNED`` of common.cl)."""
    return rows.offset % ROW_STEP == 0


def needs_preparation(ctx, store, rows, activation=None):
    """Whether a product cannot read the rows as they are."""
    inputs = ctx.backend.tier.inputs(ctx.backend.runtime.capabilities)
    direct = rows.type_code in inputs.direct_types and (are_aligned(rows) or not inputs.aligned)
    return activation is not None or store.act_order or not direct


def ordered_alike(store):
    """Whether all experts order K alike, so that rows are prepared without knowing whose they are."""
    return store.order is None or len(store.group_orders) == 1


def preparation(ctx, store, rows, work, activation=None):
    """The :class:`Preparation` of the rows that a product reads.

    Parameters
    ----------
    ctx, rows, work, activation
        As in :func:`marlin_cy.opencl.gemm.multiply.multiply`.
    store : OpenClGptqStore
    """
    layout, listed = store.layout, type(work) is TileList
    prepared_type = ctx.backend.tier.inputs(ctx.backend.runtime.capabilities).prepared_type
    begin, gather_arguments, gather_types = 0, (), ()
    if ordered_alike(store):
        gather = NO_ORDER if store.order is None else ONE_ORDER
        if listed:
            begin, count, work = work.span()
        else:
            count = work.input_rows()
    elif listed:
        gather = MAPPED
        row_map, work = work.mapped()
        count = len(row_map)
        gather_arguments, gather_types = (ctx.upload("row map", row_map),), (BUFFER,)
    else:
        gather, count = BY_SLOT, work.limit
        gather_arguments = (store.num_experts, *work.arguments(ctx, 0))
        gather_types = (UINT, *work.argument_types)
    data = ctx.reserve("prepared rows", count * row_bytes(prepared_type, layout))
    row_factor = ctx.reserve("row factors", 4 * count) if prepared_type == FLOAT16_ROWS else None
    return Preparation(
        macros={
            "INPUT_TYPE": rows.type_code,
            "ALIGNED": int(are_aligned(rows)),
            "PREPARED_TYPE": prepared_type,
            "ACTIVATION": ACTIVATIONS[activation],
            "GATHER": gather,
            "ROUTED": int(gather == BY_SLOT),
            **({"GROUP_SHIFT": layout.group_shift} if prepared_type == PLANES else {}),
        },
        argument_types=ARGUMENTS + gather_types,
        arguments=(
            rows.data,
            rows.offset + begin * rows.width,
            data,
            row_factor,
            store.k,
            layout.packed_k,
            store.order,
            *gather_arguments,
        ),
        count=count,
        prepared=Prepared(data, row_factor, int(gather == BY_SLOT), work),
    )


def prepare(ctx, store, rows, work, activation, waits, label):
    """Enqueue the preparation of the rows that a product reads; parameters as in :func:`preparation` and `multiply`."""
    device, how = ctx.backend.runtime.capabilities, preparation(ctx, store, rows, work, activation)
    # A work-item for every 8 elements of a row.
    octets = store.layout.packed_k // ROW_STEP
    items = CPU_ITEMS if device.is_cpu else min(max(32, 1 << (octets - 1).bit_length()), MAX_ITEMS)
    items = min(items, device.max_work_group_size)
    kernel = ctx.kernel("prepare", "prepare_rows", how.macros, how.argument_types)
    event = kernel(ctx.queue, (how.count * items,), (items,), *how.arguments, wait_for=waits)
    ctx.log(f"{label}: prepare_rows", event)
    return how.prepared

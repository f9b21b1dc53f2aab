"""Rows made ready for a product: another element type, another order of K, or what an activation makes of them."""

from typing import NamedTuple

import numpy as np
import pyopencl as cl

from marlin_cy.opencl.configuration import FLOAT16_ROWS, FLOAT32_ROWS, PLANES

__all__ = ["ACTIVATIONS", "Prepared", "prepare"]

BUFFER, INT, UINT, ULONG = None, np.int32, np.uint32, np.uint64  # for Kernel.set_arg_types
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
    work : Routed or Listed
        What the product does with them.
    """

    data: cl.Buffer
    row_factor: cl.Buffer | None
    by_slot: int
    work: object


def row_bytes(prepared_type, layout):
    """Bytes of a prepared row."""
    if prepared_type == PLANES:
        return 2 * layout.packed_k + 16 * -(-layout.groups // 2)
    return layout.packed_k * (4 if prepared_type == FLOAT32_ROWS else 2)


def prepare(ctx, store, rows, work, routed_types, activation, waits, label):
    """Enqueue the preparation of the rows that a product reads.

    Parameters
    ----------
    routed_types : tuple or None
        The argument types of routing arrays; None where ``work`` is a list.
    others
        As in :func:`marlin_cy.opencl.gemm.multiply`.
    """
    backend, layout = ctx.backend, store.layout
    device = backend.runtime.capabilities
    prepared_type = backend.tier.inputs(device).prepared_type
    begin, gather_arguments, gather_types = 0, (), ()
    if store.order is None or len(store.group_orders) == 1:
        gather = NO_ORDER if store.order is None else ONE_ORDER
        if routed_types is None:
            begin, count, work = work.span()
        else:
            count = -(-work.valid // work.top_k)
    elif routed_types is None:
        gather = MAPPED
        row_map, work = work.mapped()
        count = len(row_map)
        gather_arguments, gather_types = (ctx.upload("row map", row_map),), (BUFFER,)
    else:
        gather, count = BY_SLOT, work.limit
        gather_arguments = (store.num_experts, *work.arguments(ctx, 0))
        gather_types = (UINT, *routed_types)
    data = ctx.reserve("prepared rows", count * row_bytes(prepared_type, layout))
    row_factor = ctx.reserve("row factors", 4 * count) if prepared_type == FLOAT16_ROWS else None
    kernel = ctx.kernel(
        "prepare",
        "prepare_rows",
        {
            "INPUT_TYPE": rows.type_code,
            "ALIGNED": int(rows.offset % ROW_STEP == 0),
            "PREPARED_TYPE": prepared_type,
            "ACTIVATION": ACTIVATIONS[activation],
            "GATHER": gather,
            "ROUTED": int(gather == BY_SLOT),
            **({"GROUP_SHIFT": layout.group_shift} if prepared_type == PLANES else {}),
        },
        ARGUMENTS + gather_types,
    )
    # A work-item for every 8 elements of a row.
    items = CPU_ITEMS if device.is_cpu else min(max(32, 1 << (layout.packed_k // ROW_STEP - 1).bit_length()), MAX_ITEMS)
    items = min(items, device.max_work_group_size)
    event = kernel(
        ctx.queue,
        (count * items,),
        (items,),
        rows.data,
        rows.offset + begin * rows.width,
        data,
        row_factor,
        store.k,
        layout.packed_k,
        store.order,
        *gather_arguments,
        wait_for=waits,
    )
    ctx.log(f"{label}: prepare_rows", event)
    return Prepared(data, row_factor, int(gather == BY_SLOT), work)

"""Preparing rows for a product: another element type, another order of K, or the result of an activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pyopencl as cl

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.opencl.arguments import mapped_values, prepare_row_values
from marlin_cy.opencl.buffers import Rows
from marlin_cy.opencl.gemm.work import TileList, Work
from marlin_cy.opencl.layout import ExpertLayout
from marlin_cy.opencl.tiers.configuration import FLOAT16_ROWS, FLOAT32_ROWS, PLANES

if TYPE_CHECKING:
    from marlin_cy.opencl.context import OpenClContext
    from marlin_cy.opencl.store import OpenClGptqStore

__all__ = [
    "NO_ACTIVATION",
    "Preparation",
    "Prepared",
    "activation_number",
    "are_aligned",
    "has_one_order",
    "needs_preparation",
    "preparation",
    "prepare",
]

NO_ACTIVATION = 0  # ACTIVATION of activation.cl
NO_ORDER, ONE_ORDER, BY_SLOT, MAPPED = range(4)  # GATHER of prepare.cl
MAX_ITEMS = 256  # MAX_LOCAL of prepare.cl: work-items in a work-group, a power of two
CPU_ITEMS = 32
ROW_STEP = 8  # elements that a work-item takes at a time; rows are multiples of 32


class Prepared(NamedTuple):
    """Rows as a product reads them.

    Attributes
    ----------
    data : pyopencl.Buffer
    row_factor : pyopencl.Buffer or None
        float32: the factor of the products of each row.
    by_slot : int
        1: row s is the row of slot s of the routing arrays.
    work : RoutedBlocks or TileList
        The work on the prepared rows.
    """

    data: cl.Buffer
    row_factor: cl.Buffer | None
    by_slot: int
    work: Work


@dataclass(frozen=True)
class Preparation:
    """A launch that prepares rows.

    Attributes
    ----------
    macros : dict of str to int
        Of ``prepare.cl``.
    arguments : tuple
        Of ``prepare_rows``, in the order of its table.
    count : int
        Rows, which is the number of work-groups.
    prepared : Prepared
        The result.
    """

    macros: dict[str, int]
    arguments: tuple[Any, ...]
    count: int
    prepared: Prepared


def prepare(
    ctx: OpenClContext,
    store: OpenClGptqStore,
    rows: Rows,
    work: Work,
    activation: str | None,
    waits: list[cl.Event] | None,
    label: str,
) -> Prepared:
    """Enqueue the preparation of the rows that a product reads.

    Parameters are as for :func:`preparation` and :func:`marlin_cy.opencl.gemm.multiply.multiply`.
    """
    device, how = ctx.backend.runtime.capabilities, preparation(ctx, store, rows, work, activation)
    # A work-item for every 8 elements of a row.
    octets = store.layout.packed_k // ROW_STEP
    items = CPU_ITEMS if device.is_cpu else min(max(32, 1 << (octets - 1).bit_length()), MAX_ITEMS)
    items = min(items, device.max_work_group_size)
    launch = ctx.launch("prepare", "prepare_rows", how.macros)
    event = launch(ctx.queue, (how.count * items,), (items,), how.arguments, waits)
    ctx.log(f"{label}: prepare_rows", event)
    return how.prepared


def preparation(
    ctx: OpenClContext, store: OpenClGptqStore, rows: Rows, work: Work, activation: str | None = None
) -> Preparation:
    """The :class:`Preparation` of the rows that a product reads.

    Parameters
    ----------
    ctx, rows, work, activation
        As in :func:`marlin_cy.opencl.gemm.multiply.multiply`.
    store : OpenClGptqStore
    """
    layout = store.layout
    prepared_type = ctx.backend.tier.inputs(ctx.backend.runtime.capabilities).prepared_type
    begin = 0
    gather_arguments: tuple[Any, ...] = ()
    if has_one_order(store):
        gather = NO_ORDER if store.order is None else ONE_ORDER
        if isinstance(work, TileList):
            begin, count, work = work.span()
        else:
            count = work.input_rows()
    elif isinstance(work, TileList):
        gather = MAPPED
        row_map, work = work.mapped()
        count = len(row_map)
        gather_arguments = mapped_values(map=ctx.upload("row map", row_map))
    else:
        gather, count = BY_SLOT, work.limit
        gather_arguments = (store.num_experts, *work.arguments(ctx, 0))
    data = ctx.reserve("prepared rows", count * row_bytes(prepared_type, layout))
    row_factor = ctx.reserve("row factors", 4 * count) if prepared_type == FLOAT16_ROWS else None
    return Preparation(
        macros={
            "INPUT_TYPE": rows.type_code,
            "ALIGNED": int(are_aligned(rows)),
            "PREPARED_TYPE": prepared_type,
            "ACTIVATION": activation_number(activation),
            "GATHER": gather,
            "ROUTED": int(gather == BY_SLOT),
            **({"GROUP_SHIFT": layout.group_shift} if prepared_type == PLANES else {}),
        },
        arguments=prepare_row_values(
            input=rows.data,
            input_offset=rows.offset + begin * rows.width,
            output=data,
            row_factor=row_factor,
            k_in=store.k,
            k_out=layout.packed_k,
            order=store.order,
        )
        + gather_arguments,
        count=count,
        prepared=Prepared(data, row_factor, int(gather == BY_SLOT), work),
    )


def needs_preparation(ctx: OpenClContext, store: OpenClGptqStore, rows: Rows, activation: str | None = None) -> bool:
    """Whether a product needs prepared rows."""
    inputs = ctx.backend.tier.inputs(ctx.backend.runtime.capabilities)
    direct = rows.type_code in inputs.direct_types and (are_aligned(rows) or not inputs.aligned)
    return activation is not None or store.act_order or not direct


def has_one_order(store: OpenClGptqStore) -> bool:
    """Whether all experts have the same order of K, so that a row can be prepared before its experts are known."""
    return store.order is None or len(store.group_orders) == 1


def are_aligned(rows: Rows) -> bool:
    """Whether a work-item may load its 8 elements with one instruction (``ALIGNED`` of common.cl)."""
    return rows.offset % ROW_STEP == 0


def activation_number(activation: str | None) -> int:
    """``ACTIVATION`` of activation.cl."""
    return NO_ACTIVATION if activation is None else ACTIVATIONS[activation].number + 1


def row_bytes(prepared_type: int, layout: ExpertLayout) -> int:
    """Bytes of a prepared row."""
    if prepared_type == PLANES:
        return 2 * layout.packed_k + 16 * -(-layout.groups // 2)
    return layout.packed_k * (4 if prepared_type == FLOAT32_ROWS else 2)

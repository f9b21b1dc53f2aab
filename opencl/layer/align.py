"""Align (token, choice) pairs by expert, fused with routing and row preparation to save launches.

A launch costs several microseconds, however little it does. So the rows of the first product are prepared in the launch
that aligns pairs (``align_prepare.cl``); and where there are few tokens, the last work-group that routes a token aligns
the pairs of all tokens (``route_align.cl``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from marlin_cy.opencl.arguments import align_values, route_align_values
from marlin_cy.opencl.buffers import Rows, Vector
from marlin_cy.opencl.checks.routing import check_align, is_fused_preparation_correct
from marlin_cy.opencl.gemm.prepare import Preparation, Prepared, has_one_order, needs_preparation, preparation
from marlin_cy.opencl.gemm.work import RoutedBlocks
from marlin_cy.opencl.layer.routing import (
    ROUTE_ITEMS,
    Chosen,
    check_local_memory,
    route_call,
    route_local_bytes,
)

if TYPE_CHECKING:
    from marlin_cy.moe.routing import Routing
    from marlin_cy.opencl.context import OpenClContext
    from marlin_cy.opencl.device import Capabilities
    from marlin_cy.opencl.store import OpenClGptqStore

__all__ = [
    "ALIGN_ITEMS",
    "Aligned",
    "aligns_as_it_routes",
    "arrival_program",
    "check_experts",
    "enqueue_align",
    "enqueue_route_align",
    "few_arguments",
    "few_local_bytes",
    "routing_arrays",
]

ALIGN_ITEMS = 256  # work-items in a work-group of `align`
ALIGN_LOCAL_BYTES = 20 * ALIGN_ITEMS + 4  # `marks`, `sums` and `first_block`; the rest grows with the experts
# Local memory of align_few's marks: enough for 64 tokens with 8 of 256 experts each. One work-group goes through all
# marks; with many more it would take longer than a launch that has one work-group for each expert.
MAX_MARK_BYTES = 20 << 10
PAST = "num_tokens_past_padded"  # the workspace buffer of the number of slots in use


class Experts(Protocol):
    """The stack of a layer's first product."""

    @property
    def num_experts(self) -> int: ...
    @property
    def store(self) -> OpenClGptqStore: ...


class Aligned(NamedTuple):
    """The result of aligning, which a layer's first product reads.

    Attributes
    ----------
    work : RoutedBlocks
        The routing arrays.
    prepared : Prepared or None
        The rows, if the launch prepared them.
    """

    work: RoutedBlocks
    prepared: Prepared | None


def enqueue_route_align(
    ctx: OpenClContext,
    logits: Rows,
    routing: Routing,
    chosen: Chosen,
    gate_up: Experts,
    rows: Rows | None,
) -> Aligned:
    """Route the rows of ``logits`` into ``chosen``, and align as :func:`enqueue_align` does, in one launch.

    ``rows`` is None if the rows depend on the choices: they cannot be prepared yet.
    """
    work = routing_arrays(ctx, chosen, logits.rows * chosen.top_k, logits.width)
    how = None if rows is None else fused_preparation(ctx, gate_up.store, rows, work)
    macros, arguments = route_call(ctx, logits, routing, chosen)
    program, options = arrival_program(ctx.backend.runtime.capabilities)
    arrived, launch_base = ctx.arrival_counter()
    macros |= program
    arguments += route_align_values(
        **few_arguments(ctx, work, logits.width), arrived=arrived, launch_base=np.uint32(launch_base)
    )
    label, prepared = "route, align", None
    if how is not None:
        macros |= {**how.macros, "PREPARES": 1}
        arguments += how.arguments
        label, prepared = "route, align, gate_up: prepare_rows", how.prepared
    launch = ctx.launch("route_align", "route_align", macros, options, changing=("launch_base",))
    event = launch(ctx.queue, (ROUTE_ITEMS * logits.rows,), (ROUTE_ITEMS,), arguments)
    ctx.log(label, event)
    return Aligned(work, prepared)


def aligns_as_it_routes(ctx: OpenClContext, tokens: int, routing: Routing) -> bool:
    """Whether :func:`enqueue_route_align` works on the device, and is faster than two launches."""
    device = ctx.backend.runtime.capabilities
    marks = mark_bytes(tokens * routing.top_k, routing.num_experts)
    fits = marks <= MAX_MARK_BYTES and few_local_bytes(tokens, routing) <= device.local_memory
    return fits and device.device_atomics is not None


def few_local_bytes(tokens: int, routing: Routing) -> int:
    """Local memory of a work-group that routes a token, and aligns the pairs of ``tokens`` tokens."""
    return route_local_bytes(routing) + mark_bytes(tokens * routing.top_k, routing.num_experts) + 8  # two flags


def mark_bytes(pairs: int, num_experts: int) -> int:
    """Local memory of align_few's marks."""
    return 4 * num_experts * (-(-pairs // 32) | 1)


def few_arguments(ctx: OpenClContext, work: RoutedBlocks, num_experts: int) -> dict[str, Any]:
    """The arguments of align_few in ``align_few.cl``, by name."""
    return {
        "block_size": work.block_size,
        "sorted_ids": work.sorted_ids.data,
        "expert_ids": work.expert_ids.data,
        "past": ctx.reserve(PAST, 4),
        "marks": mark_bytes(work.valid, num_experts),
    }


def arrival_program(device: Capabilities) -> tuple[dict[str, int], tuple[str, ...]]:
    """``(macros, options)`` with which a program that includes ``arrive.cl`` is built for a device."""
    return ({"PTX": 1}, ()) if device.device_atomics == "PTX" else ({"PTX": 0}, ("-cl-std=CL3.0",))


def enqueue_align(ctx: OpenClContext, chosen: Chosen, gate_up: Experts, rows: Rows) -> Aligned:
    """Align the pairs of ``rows`` by expert, and prepare the rows if they need it and have one order of K."""
    num_experts = gate_up.num_experts
    work = routing_arrays(ctx, chosen, rows.rows * chosen.top_k, num_experts)
    how = checked_fused_preparation(ctx, gate_up, rows, work)
    macros, groups = {"ALIGN_ITEMS": ALIGN_ITEMS}, num_experts
    arguments = align_values(
        ids=chosen.ids,
        ids_offset=chosen.ids_offset,
        pairs=work.valid,
        num_experts=num_experts,
        block_size=work.block_size,
        sorted_ids=work.sorted_ids.data,
        sorted_offset=work.sorted_ids.offset,
        expert_ids=work.expert_ids.data,
        expert_offset=work.expert_ids.offset,
        past=ctx.reserve(PAST, 4),
        past_offset=0,
        counts=4 * num_experts,
    )
    name, label, prepared = "align", "align", None
    if how is not None:
        macros |= how.macros
        arguments += how.arguments
        groups += how.count
        name, label, prepared = "align_prepare", "align, gate_up: prepare_rows", how.prepared
    launch = ctx.launch(name, name, macros)
    event = launch(ctx.queue, (ALIGN_ITEMS * groups,), (ALIGN_ITEMS,), arguments)
    ctx.log(label, event)
    return Aligned(work, prepared)


def checked_fused_preparation(
    ctx: OpenClContext, gate_up: Experts, rows: Rows, work: RoutedBlocks
) -> Preparation | None:
    """:func:`fused_preparation`, or None if the device computes it wrongly: checked at the first use in these sizes."""
    if ctx.backend.runtime.verdicts is None:
        # A check of the aligning kernel alone has no store.
        return None if gate_up.store is None else fused_preparation(ctx, gate_up.store, rows, work)
    how = fused_preparation(ctx, gate_up.store, rows, work)
    plans = ctx.plans_of(gate_up.store)
    key = "align", rows.type_code, rows.offset % 8, work.block_size, work.top_k, gate_up.num_experts, how is None
    fused = plans.get(key)
    if fused is None:
        fused = how is not None and is_fused_preparation_correct(ctx, gate_up.num_experts, work, gate_up.store, rows)
        if not fused:
            check_align(ctx, gate_up.num_experts, work)
        plans[key] = fused
    return how if fused else None


def fused_preparation(ctx: OpenClContext, store: OpenClGptqStore, rows: Rows, work: RoutedBlocks) -> Preparation | None:
    """The :class:`Preparation` that the aligning launch can include.

    None if rows need no preparation, or if it depends on their experts.
    """
    if needs_preparation(ctx, store, rows) and has_one_order(store):
        return preparation(ctx, store, rows, work)
    return None


def routing_arrays(ctx: OpenClContext, chosen: Chosen, pairs: int, num_experts: int) -> RoutedBlocks:
    """Empty routing arrays for (token, choice) pairs."""
    block_size = ctx.backend.tier.block_size(pairs / num_experts)
    blocks = most_blocks(pairs, num_experts, block_size)
    return RoutedBlocks(
        sorted_ids=Vector(ctx.reserve("sorted_token_ids", 4 * blocks * block_size), 0, blocks * block_size),
        expert_ids=Vector(ctx.reserve("expert_ids", 4 * blocks), 0, blocks),
        past=Vector(ctx.reserve(PAST, 4), 0, 1),
        limit=blocks * block_size,
        valid=pairs,
        block_size=block_size,
        top_k=chosen.top_k,
    )


def most_blocks(pairs: int, num_experts: int, block_size: int) -> int:
    """The largest number of blocks that any routing needs."""
    return min(pairs, num_experts + max(0, pairs - num_experts) // block_size)


def check_experts(ctx: OpenClContext, num_experts: int) -> None:
    """Refuse more experts than a work-group's local memory holds."""
    check_local_memory(ctx, ALIGN_LOCAL_BYTES + 4 * num_experts, num_experts)

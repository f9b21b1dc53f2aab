"""Which experts tokens go to, on the device: by router logits (``routing.cl``), or as a caller chose."""

from typing import NamedTuple

import numpy as np
import pyopencl as cl

from marlin_cy.errors import UnsupportedError
from marlin_cy.opencl.buffers import array_info, check_contiguous, float_rows, wait_list
from marlin_cy.opencl.checks.routing import check_route

__all__ = [
    "ROUTE_ARGUMENTS",
    "ROUTE_ITEMS",
    "Chosen",
    "check_local_memory",
    "check_routing",
    "device_topk",
    "enqueue_route",
    "route",
    "route_call",
    "route_local_bytes",
]

BUFFER, INT, UINT, ULONG, FLOAT = None, np.int32, np.uint32, np.uint64, np.float32  # for Kernel.set_arg_types
ROUTE_ARGUMENTS = (
    *(BUFFER, ULONG, UINT, UINT, INT, FLOAT),
    *(BUFFER, UINT, UINT, BUFFER, ULONG, BUFFER, ULONG, BUFFER, BUFFER, BUFFER),
)
ROUTE_ITEMS = 128  # as in routing.cl
ROUTE_LOCAL_BYTES = 8 * ROUTE_ITEMS  # but for what grows with the experts
SCORING = {"softmax": 0, "softmax_topk": 1, "sigmoid": 2}  # as in routing.cl
GROUPING = {"max": 1, "top2_sum": 2}


class Chosen(NamedTuple):
    """Experts and weights of each token, on the device; ``offset`` counts elements of both."""

    ids: cl.Buffer
    ids_offset: int
    weights: cl.Buffer
    weights_offset: int
    top_k: int


def route(ctx, router_logits, routing):
    """``(ids, weights)``, int32 and float32 arrays ``[tokens, top_k]``, by a :class:`~marlin_cy.Routing`."""
    logits = float_rows(router_logits, "router_logits", routing.num_experts, ctx.cl_context)
    check_routing(ctx, routing)
    backend, shape = ctx.backend, (logits.rows, routing.top_k)
    ids, weights = backend.empty(shape, np.int32), backend.empty(shape, np.float32)
    if logits.rows:
        with ctx:
            chosen = Chosen(ids.base_data, 0, weights.base_data, 0, routing.top_k)
            event = enqueue_route(ctx, logits, routing, chosen, wait_list(ctx.queue, [router_logits]))
            for array in (ids, weights):
                ctx.written(array, event)
    return ids, weights


def kept_words(num_experts, num_groups, top_k):
    """Words of local memory that `route` takes for ranks of experts and of groups, and for weights."""
    return -(-num_experts // 4) * 4, num_groups, top_k


def is_grouped(routing):
    """Whether groups keep any expert from being picked."""
    return routing.topk_groups < routing.num_groups


def route_local_bytes(routing):
    """Local memory of a work-group that routes a token."""
    return ROUTE_LOCAL_BYTES + 4 * sum(kept_words(routing.num_experts, routing.num_groups, routing.top_k))


def check_routing(ctx, routing):
    """Refuse more experts than the device can route by."""
    check_local_memory(ctx, route_local_bytes(routing), routing.num_experts)


def check_local_memory(ctx, needed, num_experts):
    """Refuse more experts than there is local memory for."""
    has = ctx.backend.runtime.capabilities
    if needed > has.local_memory:
        raise UnsupportedError(
            f"num_experts: got {num_experts}, which take {needed} bytes of local memory; {has.name} has "
            f"{has.local_memory}"
        )


def route_call(ctx, logits, routing, chosen):
    """``(macros, arguments)`` of `route`, which fills ``chosen`` by the rows of ``logits``."""
    bias = None
    if routing.correction_bias is not None:
        bias = ctx.kept(routing, routing.correction_bias, "correction bias")
    macros = {
        "LOGITS_TYPE": logits.type_code,
        "SCORING": SCORING[routing.scoring],
        "CORRECTED": int(bias is not None),
        "GROUPING": GROUPING[routing.group_score] if is_grouped(routing) else 0,
    }
    return macros, (
        logits.data,
        logits.offset,
        logits.width,
        chosen.top_k,
        int(routing.norm_topk_prob or routing.scoring == "softmax_topk"),
        routing.routed_scaling_factor,
        bias,
        routing.num_groups,
        routing.topk_groups,
        chosen.ids,
        chosen.ids_offset,
        chosen.weights,
        chosen.weights_offset,
        *(cl.LocalMemory(4 * words) for words in kept_words(logits.width, routing.num_groups, chosen.top_k)),
    )


def enqueue_route(ctx, logits, routing, chosen, waits):
    """Fill ``chosen`` by the rows of ``logits``; the caller has checked everything and holds the context."""
    check_route(ctx, routing, logits.type_code)
    macros, arguments = route_call(ctx, logits, routing, chosen)
    kernel = ctx.kernel("routing", "route", macros, ROUTE_ARGUMENTS)
    event = kernel(ctx.queue, (ROUTE_ITEMS * logits.rows,), (ROUTE_ITEMS,), *arguments, wait_for=waits)
    return ctx.log("route", event)


def device_topk(topk_ids, topk_weights, cl_context):
    """Chosen experts on the device, checked but for what they are."""
    for name, array, dtype in (("topk_ids", topk_ids, np.int32), ("topk_weights", topk_weights, np.float32)):
        array_info(array, name, cl_context)
        if array.dtype != dtype:
            raise TypeError(f"{name}: got dtype {array.dtype}, expected {np.dtype(dtype)}")
        if len(array.shape) != 2:
            raise ValueError(f"{name}: got shape {array.shape}, expected [tokens, top_k]")
        check_contiguous(array, name)
    if topk_weights.shape != topk_ids.shape:
        raise ValueError(f"topk_weights: got shape {topk_weights.shape}, expected {topk_ids.shape}, as topk_ids")
    if topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids: got shape {topk_ids.shape}, expected at least one expert a token")
    return topk_ids, topk_weights

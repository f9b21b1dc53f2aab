"""The experts of each token, on the device: selected by router logits (``routing.cl``), or given by the caller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyopencl as cl
from pyopencl.array import Array

from marlin_cy.errors import UnsupportedError
from marlin_cy.opencl.arguments import route_values
from marlin_cy.opencl.buffers import Rows, array_info, check_contiguous, float_rows, memory_of, wait_list
from marlin_cy.opencl.checks.routing import check_route

if TYPE_CHECKING:
    from marlin_cy.moe.routing import Routing
    from marlin_cy.opencl.context import OpenClContext

__all__ = [
    "GROUPING",
    "ROUTE_ITEMS",
    "SCORING",
    "Chosen",
    "check_local_memory",
    "check_routing",
    "device_topk",
    "enqueue_route",
    "kept_words",
    "normalises",
    "route",
    "route_arguments",
    "route_call",
    "route_local_bytes",
    "routing_macros",
]

ROUTE_ITEMS = 128  # work-items in a work-group
ROUTE_LOCAL_BYTES = 8 * ROUTE_ITEMS  # `pairs`; the rest grows with the experts
SCORING = {"softmax": 0, "softmax_topk": 1, "sigmoid": 2, "sqrt_softplus": 3, "sparsemixer": 4}
"""``SCORING`` of routing.cl."""

GROUPING = {"max": 1, "top2_sum": 2}  # GROUPING of routing.cl, where 0 is no grouping


class Chosen(NamedTuple):
    """Experts and weights of each token, on the device.

    Attributes
    ----------
    ids : pyopencl.Buffer
        int32 ``[tokens, top_k]``, from element ``ids_offset`` on.
    weights : pyopencl.Buffer
        float32 ``[tokens, top_k]``, from element ``weights_offset`` on.
    """

    ids: cl.Buffer | None
    ids_offset: int
    weights: cl.Buffer | None
    weights_offset: int
    top_k: int


def route(ctx: OpenClContext, router_logits: Array, routing: Routing) -> tuple[Array, Array]:
    """``(ids, weights)``, int32 and float32 arrays ``[tokens, top_k]``, by a :class:`~marlin_cy.Routing`."""
    logits = float_rows(router_logits, "router_logits", routing.num_experts, ctx.cl_context)
    check_routing(ctx, routing)
    backend, shape = ctx.backend, (logits.rows, routing.top_k)
    ids, weights = backend.empty(shape, np.int32), backend.empty(shape, np.float32)
    if logits.rows:
        with ctx:
            chosen = Chosen(memory_of(ids), 0, memory_of(weights), 0, routing.top_k)
            event = enqueue_route(ctx, logits, routing, chosen, wait_list(ctx.queue, [router_logits]))
            for array in (ids, weights):
                ctx.written(array, event)
    return ids, weights


def enqueue_route(
    ctx: OpenClContext, logits: Rows, routing: Routing, chosen: Chosen, waits: list[cl.Event] | None
) -> cl.Event:
    """Fill ``chosen`` from the rows of ``logits``. The caller has checked all arguments and holds the context."""
    check_route(ctx, routing, logits.type_code)
    macros, arguments = route_call(ctx, logits, routing, chosen)
    launch = ctx.launch("routing", "route", macros)
    event = launch(ctx.queue, (ROUTE_ITEMS * logits.rows,), (ROUTE_ITEMS,), arguments, waits)
    return ctx.log("route", event)


def route_call(
    ctx: OpenClContext, logits: Rows, routing: Routing, chosen: Chosen
) -> tuple[dict[str, int], tuple[Any, ...]]:
    """``(macros, arguments)`` of `route`, which fills ``chosen`` from the rows of ``logits``."""
    macros = {"ROUTE_ITEMS": ROUTE_ITEMS, "LOGITS_TYPE": logits.type_code, **routing_macros(routing)}
    return macros, route_values(
        logits=logits.data,
        logits_offset=logits.offset,
        num_experts=logits.width,
        ids_offset=chosen.ids_offset,
        weights_offset=chosen.weights_offset,
        **route_arguments(ctx, routing, chosen),
    )


def route_arguments(ctx: OpenClContext, routing: Routing, chosen: Chosen) -> dict[str, Any]:
    """The arguments of `route` that do not depend on the logits, by name, without offsets."""
    bias = scale = None
    if routing.correction_bias is not None:
        bias = ctx.kept(routing, routing.correction_bias, "correction bias")
    if routing.expert_scale is not None:
        scale = ctx.kept(routing, routing.expert_scale, "expert scale")
    fours, groups, picked = kept_words(routing.num_experts, routing.num_groups, chosen.top_k)
    return {
        "top_k": chosen.top_k,
        "normalise": normalises(routing),
        "factor": routing.routed_scaling_factor,
        "scale": scale,
        "jitter": routing.mixer_jitter,
        "bias": bias,
        "num_groups": routing.num_groups,
        "topk_groups": routing.topk_groups,
        "ids": chosen.ids,
        "weights": chosen.weights,
        "fours": 4 * fours,
        "groups": 4 * groups,
        "picked": 4 * picked,
    }


def routing_macros(routing: Routing) -> dict[str, int]:
    """The macros of ``routing.cl`` that a routing decides."""
    return {
        "SCORING": SCORING[routing.scoring],
        "CORRECTED": int(routing.correction_bias is not None),
        "SCALED": int(routing.expert_scale is not None),
        "GROUPING": GROUPING[routing.group_score] if is_grouped(routing) else 0,
    }


def normalises(routing: Routing) -> int:
    """Whether a token's weights are divided by their sum."""
    return int(routing.scoring == "softmax_topk" or (routing.norm_topk_prob and routing.scoring != "sparsemixer"))


def check_routing(ctx: OpenClContext, routing: Routing) -> None:
    """Refuse more experts than a work-group's local memory holds."""
    check_local_memory(ctx, route_local_bytes(routing), routing.num_experts)


def check_local_memory(ctx: OpenClContext, needed: int, num_experts: int) -> None:
    """Refuse ``num_experts`` if they need more bytes of local memory than the device has."""
    has = ctx.backend.runtime.capabilities
    if needed > has.local_memory:
        raise UnsupportedError(
            f"num_experts: got {num_experts}, which take {needed} bytes of local memory; {has.name} has "
            f"{has.local_memory}"
        )


def route_local_bytes(routing: Routing) -> int:
    """Local memory of a work-group that routes a token."""
    return ROUTE_LOCAL_BYTES + 4 * sum(kept_words(routing.num_experts, routing.num_groups, routing.top_k))


def kept_words(num_experts: int, num_groups: int, top_k: int) -> tuple[int, int, int]:
    """32-bit words of local memory for the ranks of experts, the ranks of groups, and the weights."""
    return -(-num_experts // 4) * 4, num_groups, top_k


def is_grouped(routing: Routing) -> bool:
    """Whether group-limited routing excludes some experts."""
    return routing.topk_groups < routing.num_groups


def device_topk(topk_ids: Array, topk_weights: Array, cl_context: cl.Context) -> tuple[Array, Array]:
    """Experts that the caller chose, on the device. Types and shapes are checked, values are not."""
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

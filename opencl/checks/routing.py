"""The first use of routing, and of the grouping of pairs by expert: checked on a few tokens, in the sizes of the layer.

If a launch that combines several steps is incorrect, each step gets a launch of its own. If a single step is incorrect,
there is no other kernel, and the call fails.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy import reference
from marlin_cy.errors import DeviceError
from marlin_cy.moe.align import moe_align_block_size
from marlin_cy.opencl.buffers import TYPES, Rows, memory_of
from marlin_cy.opencl.checks.verdicts import unchecked_backend

if TYPE_CHECKING:
    from marlin_cy.moe.routing import Routing
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.context import OpenClContext
    from marlin_cy.opencl.gemm.work import RoutedBlocks
    from marlin_cy.opencl.layer.routing import Chosen
    from marlin_cy.opencl.store import OpenClGptqStore

__all__ = ["check_align", "check_route", "is_fused_preparation_correct", "is_fused_routing_correct"]

TOKENS = 4  # tokens to route: a work-group for each
CANDIDATES = 64  # random tokens; the check uses the tokens whose best groups do not depend on rounding
LEAST_PAIRS = 300  # pairs to align: more than a work-group takes at a time
WEIGHT_TOLERANCE = 1e-4  # relative; the kernels' float32 sums of some thousand terms are off by less than 1e-5
CLEAR = 1e-4  # relative; scores of groups that differ by less may be ordered otherwise in float32


def check_route(ctx: OpenClContext, routing: Routing, type_code: int) -> None:
    """Check the kernel that routes, at the first use of a :class:`~marlin_cy.Routing` with logits of a type.

    Raises
    ------
    DeviceError
        The device computes incorrect routing.
    """
    verdicts = ctx.backend.runtime.verdicts
    if verdicts is None:
        return
    checked = ctx.plans_of(routing)
    if type_code in checked:
        return
    backend = ctx.backend
    kind = f"route: {routing_kind(routing)}, logits {TYPES[type_code]}"
    if reason := verdicts.reason_wrong(kind, lambda: reason_wrong_route(backend, routing, type_code)):
        raise wrong(backend, "routing", reason)
    checked[type_code] = True


def is_fused_routing_correct(
    ctx: OpenClContext, routing: Routing, logits: Rows, gate_up: Any, rows: Rows | None
) -> bool:
    """Whether the launch that routes, aligns and prepares rows is correct. The parameters are those of the launch."""
    verdicts = ctx.backend.runtime.verdicts
    if verdicts is None:
        return True
    plans, backend = ctx.plans_of(routing), ctx.backend
    store = gate_up.store
    prepared = None if rows is None else (rows.type_code, rows.offset % 8 == 0)
    key = logits.type_code, prepared, store.k, store.order is None, store.layout.group_shift
    right: bool | None = plans.get(key)
    if right is None:
        kind = f"route, align: {routing_kind(routing)}, {preparation_kind(ctx, store, rows)}, {TYPES[key[0]]}"
        reason = verdicts.reason_wrong(kind, lambda: reason_wrong_fused(backend, routing, logits, gate_up, rows))
        if reason is not None:
            verdicts.warn(f"{backend.runtime.capabilities.name}: the launch 'route, align'", reason, stacklevel=6)
        right = plans[key] = reason is None
    return right


def check_align(ctx: OpenClContext, num_experts: int, work: RoutedBlocks) -> None:
    """Check the kernel that groups pairs by expert, at its first use with a number of experts and a block size.

    Raises
    ------
    DeviceError
        The device groups pairs incorrectly.
    """
    verdicts = ctx.backend.runtime.verdicts
    if verdicts is None:
        return
    backend = ctx.backend
    kind = f"align: {num_experts} experts, blocks of {work.block_size}, top_k {work.top_k}"
    if reason := verdicts.reason_wrong(kind, lambda: reason_wrong_align(backend, num_experts, work, None, None)):
        raise wrong(backend, "grouping of tokens by expert", reason)


def is_fused_preparation_correct(
    ctx: OpenClContext, num_experts: int, work: RoutedBlocks, store: OpenClGptqStore, rows: Rows
) -> bool:
    """Whether the launch that aligns and prepares rows is correct. The parameters are those of the launch."""
    verdicts = ctx.backend.runtime.verdicts
    if verdicts is None:
        return True
    backend = ctx.backend
    sizes = f"{num_experts} experts, blocks of {work.block_size}, top_k {work.top_k}"
    kind = f"align, prepare: {sizes}, {preparation_kind(ctx, store, rows)}"
    reason = verdicts.reason_wrong(kind, lambda: reason_wrong_align(backend, num_experts, work, store, rows))
    if reason is not None:
        verdicts.warn(f"{backend.runtime.capabilities.name}: the launch 'align, prepare_rows'", reason, stacklevel=7)
    return reason is None


def wrong(backend: OpenClBackend, what: str, reason: str) -> DeviceError:
    """The error for a step that a device computes incorrectly."""
    has = backend.runtime.capabilities
    return DeviceError(
        f"{has.name} ({has.platform}, driver {has.driver_version}): {what} is wrong ({reason}), and there is no other "
        "kernel for it; use another driver or device"
    )


def routing_kind(routing: Routing) -> str:
    """A description of the routing program's build options and sizes."""
    shape = f"{routing.num_experts} experts, top_k {routing.top_k}, {routing.scoring}"
    grouped = f"{routing.topk_groups} of {routing.num_groups} groups by {routing.group_score}"
    normalised = bool(routing.norm_topk_prob)
    corrected, scaled = routing.correction_bias is not None, routing.expert_scale is not None
    kind = f"{shape}, {grouped}, normalised {normalised}, corrected {corrected}"
    return kind + (", scaled" if scaled else "") + (f", jitter {routing.mixer_jitter}" if routing.mixer_jitter else "")


def preparation_kind(ctx: OpenClContext, store: OpenClGptqStore, rows: Rows | None) -> str:
    """A description of how a fused launch prepares rows."""
    if rows is None:
        return "no rows"
    order = "own" if store.order is None else "common" if len(store.group_orders) == 1 else "each"
    layout = f"k {store.k}, group_shift {store.layout.group_shift}, order {order}"
    return f"tier {ctx.backend.tier.name}, rows {TYPES[rows.type_code]}, aligned {rows.offset % 8 == 0}, {layout}"


def clear_logits(routing: Routing, dtype: npt.DTypeLike, rng: Any) -> npt.NDArray[Any]:
    """Logits ``[TOKENS, num_experts]`` for which float32 and float64 choose the same experts.

    They are multiples of a half, so scores are equal or far apart. Sums of scores, by which groups are chosen, may be
    close; tokens are left out for which the last chosen group and the first other are.
    """
    found = []
    for row in rng.integers(0, 17, (CANDIDATES, routing.num_experts)) / 2:
        if routing.topk_groups < routing.num_groups:
            _, choice = reference.routing_scores(row, routing)
            scores = -np.sort(-reference.group_scores(choice, routing))
            last, following = scores[routing.topk_groups - 1 : routing.topk_groups + 1]
            if 0 < last - following < CLEAR * np.abs(scores).max():
                continue
        found.append(row)
        if len(found) == TOKENS:
            break
    return np.array(found).reshape(-1, routing.num_experts).astype(dtype)


def topk_error(
    logits: npt.NDArray[Any], routing: Routing, ids: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]
) -> str | None:
    """None if experts and weights are correct, else a description of the error.

    An expert may stand for another whose score differs by less than float32 resolves.
    """
    expected_ids, expected_weights = reference.route(logits, routing)
    if not ((ids >= 0) & (ids < routing.num_experts)).all():
        return "expert ids are left unwritten, or out of range"
    for token, row in enumerate(logits.astype(np.float64)):
        if len(set(ids[token].tolist())) < routing.top_k:
            return "an expert is chosen twice"
        _, choice = reference.routing_scores(row, routing)
        if not np.allclose(choice[ids[token]], choice[expected_ids[token]], rtol=WEIGHT_TOLERANCE, atol=1e-6):
            return "it did not choose the experts with the largest scores"
    if not np.allclose(weights, expected_weights, rtol=WEIGHT_TOLERANCE, atol=1e-7):  # not of NaN
        return "its weights are wrong"
    return None


def new_chosen(backend: OpenClBackend, tokens: int, top_k: int) -> tuple[Chosen, Any, Any]:
    """``(chosen, ids, weights)``, filled with values that no kernel writes."""
    from marlin_cy.opencl.layer.routing import Chosen

    ids = backend.from_host(np.full((tokens, top_k), -7, np.int32))
    weights = backend.from_host(np.full((tokens, top_k), np.nan, np.float32))
    return Chosen(memory_of(ids), 0, memory_of(weights), 0, top_k), ids, weights


def reason_wrong_route(backend: OpenClBackend, routing: Routing, type_code: int) -> str | None:
    """None if a few tokens are routed correctly, else a description of the error."""
    from marlin_cy.opencl.layer.routing import enqueue_route  # it imports this module

    backend = unchecked_backend(backend)
    logits = clear_logits(routing, TYPES[type_code], np.random.default_rng(0))
    if not len(logits):
        return None
    ctx = backend.new_context()
    chosen, ids, weights = new_chosen(backend, len(logits), routing.top_k)
    enqueue_route(ctx, device_rows(backend, logits), routing, chosen, None)
    ctx.finish()
    return topk_error(logits, routing, backend.to_host(ids), backend.to_host(weights))


def reason_wrong_fused(
    backend: OpenClBackend, routing: Routing, logits: Rows, gate_up: Any, rows: Rows | None
) -> str | None:
    """None if one launch routes, aligns and prepares a few tokens correctly, else a description of the error."""
    from marlin_cy.opencl.layer.align import enqueue_route_align

    backend = unchecked_backend(backend)
    rng = np.random.default_rng(0)
    small = clear_logits(routing, TYPES[logits.type_code], rng)
    if not len(small):
        return None
    ctx = backend.new_context()
    chosen, ids, weights = new_chosen(backend, len(small), routing.top_k)
    x = None if rows is None else random_rows(backend, len(small), rows, rng)
    for _ in range(2):  # the second launch starts with the counter of work-groups that the first one left
        aligned = enqueue_route_align(ctx, device_rows(backend, small), routing, chosen, gate_up, x)
        ctx.finish()
        topk = backend.to_host(ids)
        reason = topk_error(small, routing, topk, backend.to_host(weights))
        reason = reason or alignment_error(ctx, aligned.work, topk, routing.num_experts)
        if reason is None and x is not None and aligned.prepared is not None:
            reason = preparation_error(backend, ctx, gate_up.store, x, aligned)
        if reason is not None:
            return reason
    return None


def reason_wrong_align(
    backend: OpenClBackend, num_experts: int, work: RoutedBlocks, store: OpenClGptqStore | None, rows: Rows | None
) -> str | None:
    """None if pairs are grouped correctly (and, with ``rows``, prepared), else a description of the error."""
    from marlin_cy.opencl.layer.align import enqueue_align

    backend = unchecked_backend(backend)
    backend._tier = dataclasses.replace(backend.tier, block_size=lambda average_rows: work.block_size)
    rng = np.random.default_rng(0)
    top_k = min(work.top_k, num_experts)
    tokens = -(-LEAST_PAIRS // top_k)
    topk = np.argpartition(rng.random((tokens, num_experts), np.float32), top_k - 1)[:, :top_k].astype(np.int32)
    ctx = backend.new_context()
    chosen, ids, _ = new_chosen(backend, tokens, top_k)
    cl.enqueue_copy(ctx.queue, ids.base_data, topk)
    x = Rows(None, 0, 0, tokens, 0) if rows is None else random_rows(backend, tokens, rows, rng)
    aligned = enqueue_align(ctx, chosen, SimpleNamespace(num_experts=num_experts, store=store), x)
    ctx.finish()
    reason = alignment_error(ctx, aligned.work, topk, num_experts)
    if reason is None and store is not None and aligned.prepared is not None:
        reason = preparation_error(backend, ctx, store, x, aligned)
    return reason


def device_rows(backend: OpenClBackend, array: npt.NDArray[Any]) -> Rows:
    """An array on the device, as rows."""
    from marlin_cy.opencl.buffers import TYPE_CODES

    buffer = backend.from_host(array)
    return Rows(memory_of(buffer), 0, TYPE_CODES[array.dtype], *array.shape)


def random_rows(backend: OpenClBackend, tokens: int, like: Rows, rng: Any) -> Rows:
    """Random rows of the type, width and alignment of others."""
    before = 0 if like.offset % 8 == 0 else 1
    values = rng.standard_normal(before + tokens * like.width, np.float32).astype(TYPES[like.type_code])
    return Rows(memory_of(backend.from_host(values)), before, like.type_code, tokens, like.width)


def read(ctx: OpenClContext, buffer: cl.Buffer | None, dtype: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
    """The first elements of a buffer."""
    assert buffer is not None  # None is for arrays without elements
    host = np.empty(count, dtype)
    cl.enqueue_copy(ctx.queue, host, buffer)
    return host


def alignment_error(ctx: OpenClContext, work: RoutedBlocks, ids: npt.NDArray[np.int32], num_experts: int) -> str | None:
    """None if the routing arrays are those that the host computes, else a description of the error."""
    expected_ids, expected_experts, expected_past = moe_align_block_size(ids, work.block_size, num_experts)
    assert work.past is not None
    past = int(read(ctx, work.past.data, np.int32, 1)[0])
    if past != int(expected_past[0]):
        return f"num_tokens_past_padded is {past}, expected {int(expected_past[0])}"
    sorted_ids = read(ctx, work.sorted_ids.data, np.int32, past)
    experts = read(ctx, work.expert_ids.data, np.int32, past // work.block_size)
    if (experts != expected_experts[: len(experts)]).any():
        return "expert_ids are wrong"
    # Slots of padding hold any id that is too large.
    if (np.minimum(sorted_ids.view(np.uint32), ids.size) != expected_ids[:past].view(np.uint32)).any():
        return "sorted_token_ids are wrong"
    return None


def preparation_error(
    backend: OpenClBackend, ctx: OpenClContext, store: OpenClGptqStore, rows: Rows, aligned: Any
) -> str | None:
    """None if a fused launch prepares the same rows as a separate launch, else a description of the error."""
    from marlin_cy.opencl.gemm.prepare import prepare

    alone = backend.new_context()
    expected = prepare(alone, store, rows, aligned.work, None, None, "check")
    alone.finish()
    for one, other in zip(aligned.prepared[:2], expected[:2], strict=True):
        if one is not None:
            count = rows.rows * (4 if one is aligned.prepared.row_factor else prepared_bytes(backend, store))
            if (read(ctx, one, np.uint8, count) != read(alone, other, np.uint8, count)).any():
                return "rows are prepared incorrectly"
    return None


def prepared_bytes(backend: OpenClBackend, store: OpenClGptqStore) -> int:
    """Bytes of a prepared row."""
    from marlin_cy.opencl.gemm.prepare import row_bytes

    return row_bytes(backend.tier.inputs(backend.runtime.capabilities).prepared_type, store.layout)

"""The result of each operation in slow and plain NumPy: the specification for the tests.

Integers are exact, here and in the kernels. :func:`quantize` and :func:`gemm` do their float operations in the order
in which the CPU's kernels do them, one IEEE operation at a time, so they give the CPU's results to the last bit.
``exp`` has no such specification: :func:`moe_layer` and :func:`route` compute in float64, and a comparison needs a
bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableSequence, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.weights.canonical import CanonicalWeight, unpack_words
from marlin_cy.weights.code_types import code_type
from marlin_cy.weights.order import group_order, packed_group_size
from marlin_cy.weights.scale_records import BLOCK_ROWS

if TYPE_CHECKING:
    from marlin_cy.moe.routing import Routing

__all__ = [
    "QMAX",
    "dequantize",
    "dequantize_weight",
    "float_scales",
    "fma_f32",
    "gemm",
    "gemm_phase_batched",
    "gemm_phase_vllm",
    "gemm_weight",
    "moe_align_block_size",
    "moe_layer",
    "quantize",
    "route",
    "shared_expert",
]

Floats: TypeAlias = npt.NDArray[np.float64]

QMAX = {"int16": 32639, "int8": 127}
"""The largest magnitude of a quantised activation, for each compute dtype.

The kernels hold an int16 as two planes of signed bytes, ``256 * high + low``: the largest is ``256 * 127 + 127``.
"""

MIN_AMAX = np.float32(2.0**-100)
"""A group of activations whose largest magnitude is below this becomes zeros, so that ``QMAX / amax`` is finite."""

SUM_FACTOR = 8
"""Kernels have the sum of a group's activations times the negative of this: see ``act_meta`` in ``ukernel.h``."""

CHUNK_K = 1024
"""Rows of K in a chunk. Each chunk is summed separately, then the sums are added in the order of K."""


def dequantize(
    q: npt.NDArray[np.uint8],
    scale: npt.NDArray[Any],
    zero: npt.NDArray[np.uint8] | None,
    group_size: int,
    g_idx: npt.NDArray[np.int32] | None = None,
    codes: str = "uint4",
    minimum: npt.NDArray[Any] | None = None,
) -> Floats:
    """``w``, ``[K, N]``: ``scale[g] * (value(q) - zero[g]) - minimum[g]`` with ``g = g_idx[k]`` or ``k // group_size``.

    :mod:`marlin_cy.weights.code_types` documents ``value``. A ``zero`` of None is the code type's symmetric zero point,
    or 0 with minima.
    """
    row = code_type(codes)
    groups = np.arange(q.shape[0]) // group_size if g_idx is None else np.asarray(g_idx)
    values = row.decode_table.astype(np.float64)[q]
    if zero is not None:
        values = values - zero.astype(np.float64)[groups]
    elif minimum is None and row.has_zero_points:
        values = values - row.symmetric_zero
    w: Floats = scale.astype(np.float64)[groups] * values
    return w if minimum is None else w - minimum.astype(np.float64)[groups]


def dequantize_weight(weight: CanonicalWeight) -> Floats:
    """``w``, ``[K, N]``, of a :class:`~marlin_cy.weights.canonical.CanonicalWeight`."""
    q, (scale, minimum) = weight_codes(weight), float_scales(weight)
    return dequantize(q, scale, weight.zero, weight.group_size, weight.g_idx, weight.codes, minimum)


def weight_codes(weight: CanonicalWeight) -> npt.NDArray[np.uint8]:
    """The codes ``q``, uint8 ``[K, N]``, of a weight."""
    return unpack_words(weight.words, code_type(weight.codes).bits)


def float_scales(weight: CanonicalWeight) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """``(scale, minimum)``, ``[G, N]``, of a weight; the minimum is None if its scale record has no minima.

    As stored, or float32 with two levels: :mod:`marlin_cy.weights.scale_records` has the formula.
    """
    if weight.block_scale is None:
        return weight.scale, weight.minimum
    block_of = np.arange(len(weight.scale)) * weight.group_size // BLOCK_ROWS
    scale = weight.block_scale.astype(np.float32)[block_of] * weight.scale.astype(np.float32)
    if weight.block_minimum is None or weight.minimum is None:
        return scale, None
    return scale, weight.block_minimum.astype(np.float32)[block_of] * weight.minimum.astype(np.float32)


def fma_f32(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """``a * b + c`` in float32 with a single rounding.

    The product of two float32 is exact in float64. The sum with ``c`` is rounded to odd in float64: of the two
    float64 around the exact sum, it is the one whose last bit is set. Rounding that to float32 gives the correctly
    rounded result. Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c, np.float64)
    total = np.asarray(product + addend)
    carried = total - product
    error = (product - (total - carried)) + (addend - carried)
    inexact = np.isfinite(total) & (error != 0) & (total.view(np.int64) & 1 == 0)
    toward = np.where(error > 0, np.inf, -np.inf)
    rounded: Floats = np.where(inexact, np.nextafter(total, toward), total)
    return rounded.astype(np.float32)


def quantize(
    x: npt.ArrayLike, group_size: int, compute_dtype: str
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Quantise rows of activations.

    Parameters
    ----------
    x : float32 ``[M, K]``
    group_size : int
        Number of values that share a scale; the last group may be shorter.
    compute_dtype : {"int16", "int8"}

    Returns
    -------
    values : int32 ``[M, K]``
    scale : float32 ``[M, groups]``
        NaN where the group holds a NaN or an infinity, and 0 where all its values are tiny; the quantised values
        are 0 in both cases.
    """
    x = np.asarray(x, np.float32)
    qmax = np.float32(QMAX[compute_dtype])
    values = np.zeros(x.shape, np.int32)
    scales = []
    for begin in range(0, x.shape[1], group_size):
        group = x[:, begin : begin + group_size]
        amax = np.abs(group).max(axis=1)
        finite = np.isfinite(amax)
        live = finite & (amax >= MIN_AMAX)
        scale = np.where(live, np.where(live, amax, 1) / qmax, np.where(finite, 0, np.nan)).astype(np.float32)
        inverse = np.where(live, qmax / np.where(live, amax, 1), 0).astype(np.float32)
        scaled = np.where(live[:, None], group, 0) * inverse[:, None]
        values[:, begin : begin + group_size] = np.rint(scaled).astype(np.int32)
        scales.append(scale)
    return values, np.stack(scales, axis=1)


def gemm(
    x: npt.ArrayLike,
    q: npt.NDArray[np.uint8],
    scale: npt.NDArray[Any],
    zero: npt.NDArray[np.uint8] | None,
    group_size: int,
    g_idx: npt.NDArray[np.int32] | None = None,
    compute_dtype: str = "int16",
    codes: str = "uint4",
    minimum: npt.NDArray[Any] | None = None,
) -> npt.NDArray[np.float32]:
    """``x @ w`` as the CPU computes it: float32 ``[M, N]``, to the last bit.

    Codes are multiplied as integers, the *multiplicands* of :mod:`marlin_cy.weights.code_types`. Scales are divided
    by ``units_per_one``, a power of two. A minimum is multiplied by the sum of a group's activations. The kernels have
    that sum times ``-SUM_FACTOR``, a power of two.

    Parameters
    ----------
    x : float32 ``[M, K]``
    q : uint8 ``[K, N]``
    scale : float16, bfloat16 or float32 ``[G, N]``
    zero : uint8 or uint16 ``[G, N]``, or None: as in :func:`dequantize`
    group_size : int
    g_idx : int32 ``[K]``, optional
    compute_dtype : {"int16", "int8"}
    codes : str
        A row of :data:`~marlin_cy.weights.code_types.CODE_TYPES`.
    minimum : float16 or float32 ``[G, N]``, optional
    """
    row = code_type(codes)
    if zero is None:
        zero = np.full(scale.shape, row.symmetric_zero if minimum is None else 0, np.uint8)
    factor = np.float32(1 / row.units_per_one)
    k = q.shape[0]
    step = packed_group_size(group_size)
    order = group_order(g_idx, k, group_size)
    rows = np.arange(order.packed_k) if order.rows is None else order.rows
    padding = (rows < 0)[:, None]
    x = np.where(padding.T, np.float32(0), np.asarray(x, np.float32)[:, rows])
    multiplicands = np.where(padding, 0, row.multiplicands[q[rows]].astype(np.int64))
    quantised, row_scale = quantize(x, step, compute_dtype)
    values = quantised.astype(np.int64)
    out: npt.NDArray[np.float32] = np.zeros((x.shape[0], q.shape[1]), np.float32)
    sums: npt.NDArray[np.float32]
    with np.errstate(invalid="ignore"):
        for chunk in range(0, order.packed_k, CHUNK_K):
            sums = np.zeros_like(out)
            for begin in range(chunk, min(chunk + CHUNK_K, order.packed_k), step):
                group, piece = begin // step, slice(begin, begin + step)
                scale_row = order.scale_rows[group]
                total = values[:, piece].sum(axis=1, keepdims=True)
                exact = values[:, piece] @ multiplicands[piece] - total * zero[scale_row].astype(np.int64)
                s = row_scale[:, group, None] * (scale[scale_row].astype(np.float32) * factor)
                sums = fma_f32(exact.astype(np.float32), s, sums)
                if minimum is not None:
                    scaled = row_scale[:, group, None] * (-SUM_FACTOR * total).astype(np.float32)
                    sums = fma_f32(scaled, minimum[scale_row].astype(np.float32) / np.float32(SUM_FACTOR), sums)
            out = sums if chunk == 0 else out + sums
    return out


def gemm_weight(x: npt.ArrayLike, weight: CanonicalWeight, compute_dtype: str = "int16") -> npt.NDArray[np.float32]:
    """:func:`gemm` of a :class:`~marlin_cy.weights.canonical.CanonicalWeight`."""
    q, (scale, minimum) = weight_codes(weight), float_scales(weight)
    return gemm(x, q, scale, weight.zero, weight.group_size, weight.g_idx, compute_dtype, weight.codes, minimum)


def gemm_phase_batched(
    input: npt.NDArray[Any],
    weights: Sequence[npt.NDArray[Any]],
    dispatches: Iterable[Sequence[int]],
    output: npt.NDArray[Any],
) -> npt.NDArray[Any]:
    """Write each dispatch's rows of ``output``, and return ``output``; ``weights[e]`` is a dense ``[K, N]``."""
    for expert, in_row, out_row, m in dispatches:
        output[out_row : out_row + m] = input[in_row : in_row + m] @ weights[expert]
    return output


def gemm_phase_vllm(
    input: npt.NDArray[Any],
    weights: Sequence[npt.NDArray[Any]],
    sorted_ids: npt.NDArray[np.int32],
    expert_ids: npt.NDArray[np.int32],
    past: int,
    output: npt.NDArray[Any],
    prob_m: int,
    block_size: int,
    top_k: int,
) -> npt.NDArray[Any]:
    """Write the rows of ``output`` that slots name, and return ``output``; ``weights[e]`` is a dense ``[K, N]``."""
    for slot in range(past):
        pair, expert = sorted_ids[slot], expert_ids[slot // block_size]
        if expert >= 0 and pair < prob_m * top_k:
            output[pair] = input[pair // top_k] @ weights[expert]
    return output


def moe_align_block_size(
    topk_ids: npt.ArrayLike, block_size: int, num_experts: int, expert_map: Sequence[int] | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """As :func:`marlin_cy.moe_align_block_size`."""
    flat = np.asarray(topk_ids).reshape(-1)
    capacity = flat.size + num_experts * (block_size - 1)
    sorted_ids: MutableSequence[int] = []
    expert_ids: MutableSequence[int] = []
    for expert in range(num_experts):
        slots = [int(slot) for slot in np.flatnonzero(flat == expert)]
        slots += [flat.size] * (-len(slots) % block_size)
        sorted_ids += slots
        expert_ids += [expert if expert_map is None else expert_map[expert]] * (len(slots) // block_size)
    past = len(sorted_ids)
    sorted_ids += [flat.size] * (capacity - past)
    expert_ids += [-1] * (-(-capacity // block_size) - len(expert_ids))
    return np.array(sorted_ids, np.int32), np.array(expert_ids, np.int32), np.array([past], np.int32)


def route(router_logits: npt.ArrayLike, routing: Routing) -> tuple[npt.NDArray[np.int32], Floats]:
    """``(ids, weights)``, int32 and float64 ``[tokens, top_k]``, by a :class:`~marlin_cy.moe.routing.Routing`."""
    logits = np.asarray(router_logits, np.float64)
    ids = np.empty((len(logits), routing.top_k), np.int32)
    weights = np.empty(ids.shape)
    for token, row in enumerate(logits):
        ids[token], weights[token] = route_token(row, routing)
    return ids, weights


def route_token(logits: Floats, routing: Routing) -> tuple[npt.NDArray[np.intp], Floats]:
    """``(ids, weights)`` of one token."""
    if np.isnan(logits).any() or np.isinf(logits.max()):
        return np.arange(routing.top_k), np.full(routing.top_k, np.nan)
    scores, choice = routing_scores(logits, routing)
    experts: npt.NDArray[Any] = np.arange(routing.num_experts)
    if routing.num_groups > 1:
        group_of = experts // (routing.num_experts // routing.num_groups)
        experts = experts[np.isin(group_of, largest(group_scores(choice, routing), routing.topk_groups))]
    ids = experts[largest(choice[experts], routing.top_k)]
    if routing.scoring == "softmax_topk":
        weights = softmax(logits[ids])
    elif routing.scoring == "sparsemixer":
        weights = sparsemixer(logits, ids, routing.mixer_jitter)
    else:
        weights = scores[ids]
        if routing.norm_topk_prob:
            weights = weights / (weights.sum() + 1e-20)
    weights = weights * routing.routed_scaling_factor
    return ids, weights if routing.expert_scale is None else weights * routing.expert_scale[ids]


def sparsemixer(logits: Floats, ids: npt.NDArray[np.intp], jitter: float) -> Floats:
    """The weights of the experts ``ids``, largest logit first: each is a softmax over the rest, without far logits."""
    weights, rest = np.empty(len(ids)), np.ones(len(logits), bool)
    for place, expert in enumerate(ids):
        most = logits[expert]
        near = rest & (most - logits <= 2 * jitter * np.maximum(np.abs(logits), most))
        weights[place] = 1 / np.exp(logits[near] - most).sum()
        rest[expert] = False
    return weights


def routing_scores(logits: Floats, routing: Routing) -> tuple[Floats, Floats]:
    """Two score arrays of one token, ``[num_experts]`` each.

    The first gives the routing weights. The second, which includes the correction bias, selects the experts.
    """
    functions: dict[str, Callable[[Floats], Floats]]
    functions = {
        "softmax": softmax,
        "softmax_topk": np.copy,
        "sigmoid": sigmoid,
        "sqrt_softplus": lambda x: np.sqrt(np.logaddexp(0, x)),
        "sparsemixer": np.copy,
    }
    scores = functions[routing.scoring](logits)
    return scores, scores if routing.correction_bias is None else scores + routing.correction_bias


def group_scores(choice: Floats, routing: Routing) -> Floats:
    """The scores by which one token's groups are selected, ``[num_groups]``."""
    ascending = np.sort(choice.reshape(routing.num_groups, -1))
    scores: Floats = ascending[:, -1] if routing.group_score == "max" else ascending[:, -2:].sum(axis=1)
    return scores


def largest(values: Floats, count: int) -> npt.NDArray[np.intp]:
    """Indices of the ``count`` largest values, largest first; among equal values, the smaller index first."""
    return np.argsort(-values, kind="stable")[:count]


def softmax(x: Floats) -> Floats:
    """``exp(x) / sum(exp(x))``; NaN if no ``x`` is finite."""
    with np.errstate(invalid="ignore"):
        exp: Floats = np.exp(x - x.max())
    result: Floats = exp / exp.sum()
    return result


def sigmoid(x: Floats) -> Floats:
    """``1 / (1 + exp(-x))``."""
    with np.errstate(over="ignore"):
        result: Floats = 1 / (1 + np.exp(-x))
    return result


def moe_layer(
    hidden_states: npt.ArrayLike,
    gate_up: Sequence[npt.NDArray[Any]],
    down: Sequence[npt.NDArray[Any]],
    topk_ids: npt.NDArray[Any],
    topk_weights: npt.NDArray[Any],
    *,
    activation: str = "silu",
    gate_up_bias: npt.NDArray[Any] | None = None,
    down_bias: npt.NDArray[Any] | None = None,
    apply_router_weight_on_input: bool = False,
    shared: Floats | None = None,
) -> Floats:
    """The output of :class:`~marlin_cy.moe.MoeLayer`, float64.

    Parameters
    ----------
    hidden_states : ``[tokens, H]``
    gate_up, down : sequences of dense ``[H, 2I]`` and ``[I, H]``, one for each expert
    topk_ids, topk_weights : ``[tokens, top_k]``
    activation : str
    gate_up_bias, down_bias : ``[experts, 2I]`` and ``[experts, H]``, optional
    apply_router_weight_on_input : bool
    shared : ``[tokens, H]``, optional
        The result of :func:`shared_expert`.
    """
    rows = np.asarray(hidden_states, np.float64)
    out = np.zeros((len(rows), down[0].shape[1])) if shared is None else shared.copy()
    for token, x in enumerate(rows):
        for e, weight in zip(topk_ids[token], topk_weights[token], strict=True):
            if e < 0:
                continue
            biases = (None if bias is None else bias[e] for bias in (gate_up_bias, down_bias))
            if apply_router_weight_on_input:
                out[token] += expert(weight * x, gate_up[e], down[e], activation, *biases)
            else:
                out[token] += weight * expert(x, gate_up[e], down[e], activation, *biases)
    return out


def shared_expert(
    hidden_states: npt.ArrayLike,
    gate_up: npt.NDArray[Any],
    down: npt.NDArray[Any],
    *,
    activation: str = "silu",
    gate_up_bias: npt.NDArray[Any] | None = None,
    down_bias: npt.NDArray[Any] | None = None,
    gate_weight: npt.NDArray[Any] | None = None,
) -> Floats:
    """The output of :class:`~marlin_cy.moe.SharedExpert`; weights are dense, of one expert."""
    rows = np.asarray(hidden_states, np.float64)
    out = expert(rows, gate_up, down, activation, gate_up_bias, down_bias)
    return out if gate_weight is None else sigmoid(rows @ gate_weight)[:, None] * out


def expert(
    x: Floats,
    gate_up: npt.NDArray[Any],
    down: npt.NDArray[Any],
    activation: str,
    gate_up_bias: npt.NDArray[Any] | None = None,
    down_bias: npt.NDArray[Any] | None = None,
) -> Floats:
    """One expert's output for ``x``, ``[H]`` or ``[rows, H]``."""
    sums = x @ gate_up if gate_up_bias is None else x @ gate_up + gate_up_bias
    row = ACTIVATIONS[activation]
    inner = row.reference(*(np.split(sums, 2, axis=-1) if row.gated else (sums, sums)))
    out: Floats = inner @ down if down_bias is None else inner @ down + down_bias
    return out

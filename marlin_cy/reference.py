"""What every operation computes, in slow and obvious NumPy: the specification that the tests believe.

Integers are exact here as there. Floats follow the order in which the kernels work, one IEEE operation
at a time, so :func:`quantize` and :func:`gemm` are the CPU's results to the last bit; only ``exp`` is
not specified that tightly, so :func:`moe_layer` and :func:`route` are float64 and to be compared within
a bound.
"""

import numpy as np

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.weights.int4 import E2M1_VALUES, unpack_words
from marlin_cy.weights.order import group_order, packed_group_size

__all__ = [
    "QMAX",
    "dequantize",
    "dequantize_weight",
    "fma_f32",
    "gemm",
    "gemm_phase_batched",
    "gemm_phase_vllm",
    "moe_align_block_size",
    "moe_layer",
    "quantize",
    "route",
    "shared_expert",
]

QMAX = {"int16": 32639, "int8": 127}  # int16: 256 * 127 + 127, the largest two signed bytes can say
MIN_AMAX = np.float32(2.0**-100)
CHUNK_K = 1024


def dequantize(q, scale, zero, group_size, g_idx=None, codes="uint4"):
    """``w``, float64 ``[K, N]``: ``scale[g] * (value(q) - zero[g])`` with ``g = g_idx[k]`` or ``k // group_size``.

    ``value`` is documented in :mod:`marlin_cy.weights.int4`; with ``codes="e2m1"``, ``zero`` is None.
    """
    groups = np.arange(q.shape[0]) // group_size if g_idx is None else np.asarray(g_idx)
    scale = scale.astype(np.float64)[groups]
    if codes == "e2m1":
        return scale * E2M1_VALUES.astype(np.float64)[q]
    return scale * (q.astype(np.float64) - zero.astype(np.float64)[groups])


def dequantize_weight(weight):
    """``w``, float64 ``[K, N]``, of an :class:`~marlin_cy.weights.int4.Int4Weight`."""
    codes = unpack_words(weight.words)
    return dequantize(codes, weight.scale, weight.zero, weight.group_size, weight.g_idx, weight.codes)


def fma_f32(a, b, c):
    """``a * b + c`` in float32 with a single rounding.

    The product of two float32 is exact in float64. Their sum with ``c`` is rounded to odd there (the
    exact sum lies between two float64; the one whose last bit is set is taken), after which rounding to
    float32 is right. Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008.
    """
    product = np.multiply(a, b, dtype=np.float64)
    c = np.asarray(c, np.float64)
    total = np.asarray(product + c)
    carried = total - product
    error = (product - (total - carried)) + (c - carried)
    inexact = np.isfinite(total) & (error != 0) & (total.view(np.int64) & 1 == 0)
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(total, toward), total).astype(np.float32)


def quantize(x, group_size, compute_dtype):
    """Quantise rows of activations.

    Parameters
    ----------
    x : float32 ``[M, K]``
    group_size : int
        Values that share a scale; the last group may be shorter.
    compute_dtype : {"int16", "int8"}

    Returns
    -------
    values : int32 ``[M, K]``
    scale : float32 ``[M, groups]``
        NaN where a group holds a NaN or an infinity (its values are 0); 0 where all are tiny.
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


def gemm(x, q, scale, zero, group_size, g_idx=None, compute_dtype="int16", codes="uint4"):
    """``x @ w`` as the CPU computes it: float32 ``[M, N]``, to the last bit.

    4-bit floats are multiplied as integers, twice their values, by half of their scales, which in float32
    are exact.

    Parameters
    ----------
    x : float32 ``[M, K]``
    q : uint8 ``[K, N]``
    scale : float16 or bfloat16 ``[G, N]``
    zero : uint8 ``[G, N]``, or None with ``codes="e2m1"``
    group_size : int
    g_idx : int32 ``[K]``, optional
    compute_dtype : {"int16", "int8"}
    codes : {"uint4", "e2m1"}
    """
    factor = np.float32(1)
    if codes == "e2m1":
        q, zero, factor = (2 * E2M1_VALUES[q]).astype(np.int64), np.zeros(scale.shape, np.uint8), np.float32(0.5)
    k = q.shape[0]
    step = packed_group_size(group_size)
    order = group_order(g_idx, k, group_size)
    rows = np.arange(order.packed_k) if order.rows is None else order.rows
    padding = (rows < 0)[:, None]
    x = np.where(padding.T, np.float32(0), np.asarray(x, np.float32)[:, rows])
    q = np.where(padding, 0, q[rows].astype(np.int64))
    values, row_scale = quantize(x, step, compute_dtype)
    values = values.astype(np.int64)
    out = np.zeros((x.shape[0], q.shape[1]), np.float32)
    with np.errstate(invalid="ignore"):
        for chunk in range(0, order.packed_k, CHUNK_K):
            sums = np.zeros_like(out)
            for begin in range(chunk, min(chunk + CHUNK_K, order.packed_k), step):
                group, piece = begin // step, slice(begin, begin + step)
                scale_row = order.scale_rows[group]
                total = values[:, piece].sum(axis=1, keepdims=True)
                exact = values[:, piece] @ q[piece] - total * zero[scale_row].astype(np.int64)
                s = row_scale[:, group, None] * (scale[scale_row].astype(np.float32) * factor)
                sums = fma_f32(exact.astype(np.float32), s, sums)
            out = sums if chunk == 0 else out + sums
    return out


def gemm_phase_batched(input, weights, dispatches, output):
    """Write each dispatch's rows of ``output``; ``weights[e]`` is a dense ``[K, N]``."""
    for expert, in_row, out_row, m in dispatches:
        output[out_row : out_row + m] = input[in_row : in_row + m] @ weights[expert]
    return output


def gemm_phase_vllm(input, weights, sorted_ids, expert_ids, past, output, prob_m, block_size, top_k):
    """Write the rows of ``output`` that slots name; ``weights[e]`` is a dense ``[K, N]``."""
    for slot in range(past):
        pair, expert = sorted_ids[slot], expert_ids[slot // block_size]
        if expert >= 0 and pair < prob_m * top_k:
            output[pair] = input[pair // top_k] @ weights[expert]
    return output


def moe_align_block_size(topk_ids, block_size, num_experts, expert_map=None):
    """As :func:`marlin_cy.moe_align_block_size`."""
    flat = np.asarray(topk_ids).reshape(-1)
    capacity = flat.size + num_experts * (block_size - 1)
    sorted_ids, expert_ids = [], []
    for expert in range(num_experts):
        slots = list(np.flatnonzero(flat == expert))
        slots += [flat.size] * (-len(slots) % block_size)
        sorted_ids += slots
        expert_ids += [expert if expert_map is None else expert_map[expert]] * (len(slots) // block_size)
    past = len(sorted_ids)
    sorted_ids += [flat.size] * (capacity - past)
    expert_ids += [-1] * (-(-capacity // block_size) - len(expert_ids))
    return np.array(sorted_ids, np.int32), np.array(expert_ids, np.int32), np.array([past], np.int32)


def route(router_logits, routing):
    """``(ids, weights)``, int32 and float64 ``[tokens, top_k]``, by a :class:`~marlin_cy.moe.routing.Routing`."""
    logits = np.asarray(router_logits, np.float64)
    ids = np.empty((len(logits), routing.top_k), np.int32)
    weights = np.empty(ids.shape)
    for token, row in enumerate(logits):
        ids[token], weights[token] = route_token(row, routing)
    return ids, weights


def route_token(logits, routing):
    """``(ids, weights)`` of one token."""
    if np.isnan(logits).any() or np.isinf(logits.max()):
        return np.arange(routing.top_k), np.full(routing.top_k, np.nan)
    scores, choice = routing_scores(logits, routing)
    experts = np.arange(routing.num_experts)
    if routing.num_groups > 1:
        group_of = experts // (routing.num_experts // routing.num_groups)
        experts = experts[np.isin(group_of, largest(group_scores(choice, routing), routing.topk_groups))]
    ids = experts[largest(choice[experts], routing.top_k)]
    weights = softmax(logits[ids]) if routing.scoring == "softmax_topk" else scores[ids]
    if routing.norm_topk_prob and routing.scoring != "softmax_topk":
        weights = weights / (weights.sum() + 1e-20)
    return ids, weights * routing.routed_scaling_factor


def routing_scores(logits, routing):
    """What one token's weights are made of, and what its experts are chosen by, ``[num_experts]`` each."""
    scores = {"softmax": softmax, "softmax_topk": np.copy, "sigmoid": sigmoid}[routing.scoring](logits)
    return scores, scores if routing.correction_bias is None else scores + routing.correction_bias


def group_scores(choice, routing):
    """What one token's groups are chosen by, ``[num_groups]``."""
    ascending = np.sort(choice.reshape(routing.num_groups, -1))
    return ascending[:, -1] if routing.group_score == "max" else ascending[:, -2:].sum(axis=1)


def largest(values, count):
    """Indices of the largest values, largest first; of equal ones the smaller index first."""
    return np.argsort(-values, kind="stable")[:count]


def softmax(x):
    """``exp(x)`` over the sum of these; NaN where no ``x`` is finite."""
    with np.errstate(invalid="ignore"):
        exp = np.exp(x - x.max())
    return exp / exp.sum()


def sigmoid(x):
    """``1 / (1 + exp(-x))``."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def moe_layer(
    hidden_states,
    gate_up,
    down,
    topk_ids,
    topk_weights,
    *,
    activation="silu",
    gate_up_bias=None,
    down_bias=None,
    apply_router_weight_on_input=False,
    shared=None,
):
    """The output of :class:`~marlin_cy.moe.MoeLayer`, float64.

    Parameters
    ----------
    hidden_states : ``[tokens, H]``
    gate_up, down : sequences of dense ``[H, 2I]`` and ``[I, H]``, one an expert
    topk_ids, topk_weights : ``[tokens, top_k]``
    activation : str
    gate_up_bias, down_bias : ``[experts, 2I]`` and ``[experts, H]``, optional
    apply_router_weight_on_input : bool
    shared : ``[tokens, H]``, optional
        What :func:`shared_expert` gives.
    """
    hidden_states = np.asarray(hidden_states, np.float64)
    out = np.zeros((len(hidden_states), down[0].shape[1])) if shared is None else shared.copy()
    for token, x in enumerate(hidden_states):
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
    hidden_states, gate_up, down, *, activation="silu", gate_up_bias=None, down_bias=None, gate_weight=None
):
    """What :class:`~marlin_cy.moe.SharedExpert` adds, float64; weights are dense, of one expert."""
    hidden_states = np.asarray(hidden_states, np.float64)
    out = expert(hidden_states, gate_up, down, activation, gate_up_bias, down_bias)
    return out if gate_weight is None else sigmoid(hidden_states @ gate_weight)[:, None] * out


def expert(x, gate_up, down, activation, gate_up_bias=None, down_bias=None):
    """One expert's output for ``x``, ``[H]`` or ``[rows, H]``."""
    sums = x @ gate_up if gate_up_bias is None else x @ gate_up + gate_up_bias
    inner = ACTIVATIONS[activation].reference(*np.split(sums, 2, axis=-1))
    return inner @ down if down_bias is None else inner @ down + down_bias

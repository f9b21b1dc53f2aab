"""What every operation computes, in slow and obvious NumPy: the specification that the tests believe.

Integers are exact here as there. Floats follow the order in which the kernels work, one IEEE operation
at a time, so :func:`quantize` and :func:`gemm` are the CPU's results to the last bit; only ``exp`` is
not specified that tightly, so :func:`moe_layer` and :func:`route` are float64 and to be compared within
a bound.
"""

import math

import numpy as np

from marlin_cy.formats.canonical import E2M1_VALUES
from marlin_cy.formats.order import group_order, packed_group_size

__all__ = [
    "ACTIVATIONS",
    "QMAX",
    "dequantize",
    "fma_f32",
    "gemm",
    "gemm_phase_batched",
    "gemm_phase_vllm",
    "moe_align_block_size",
    "moe_layer",
    "quantize",
    "route",
    "silu",
]

QMAX = {"int16": 32639, "int8": 127}  # int16: 256 * 127 + 127, the largest two signed bytes can say
MIN_AMAX = np.float32(2.0**-100)
CHUNK_K = 1024


def dequantize(q, scale, zero, group_size, g_idx=None, codes="uint4"):
    """``w``, float64 ``[K, N]``: ``scale[g] * (value(q) - zero[g])`` with ``g = g_idx[k]`` or ``k // group_size``.

    ``value`` is documented in :mod:`marlin_cy.formats.canonical`; with ``codes="e2m1"``, ``zero`` is None.
    """
    groups = np.arange(q.shape[0]) // group_size if g_idx is None else np.asarray(g_idx)
    scale = scale.astype(np.float64)[groups]
    if codes == "e2m1":
        return scale * E2M1_VALUES.astype(np.float64)[q]
    return scale * (q.astype(np.float64) - zero.astype(np.float64)[groups])


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


def route(router_logits, top_k, norm_topk_prob=True):
    """``(ids, weights)`` of the ``top_k`` largest softmax probabilities; of equal ones the smaller index first."""
    logits = np.asarray(router_logits, np.float64)
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exp / exp.sum(axis=1, keepdims=True)
    ids = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(probabilities, ids, axis=1)
    if norm_topk_prob:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return ids.astype(np.int32), weights


def silu(x):
    """``x / (1 + exp(-x))``."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def gelu(x):
    """``x * 0.5 * (1 + erf(x / sqrt(2)))``."""
    return x * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(np.asarray(x) / math.sqrt(2)))


def gelu_tanh(x):
    """``x * 0.5 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))``."""
    with np.errstate(over="ignore"):
        return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def swigluoai(gate, up):
    """``gate / (1 + exp(-1.702 * gate)) * (up + 1)`` of ``gate`` at most 7 and ``up`` between -7 and 7."""
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


ACTIVATIONS = {
    "silu": lambda gate, up: silu(gate) * up,
    "gelu": lambda gate, up: gelu(gate) * up,
    "gelu_tanh": lambda gate, up: gelu_tanh(gate) * up,
    "swigluoai": swigluoai,
}
"""``f(gate, up)`` of each activation of :class:`~marlin_cy.moe.MoeLayer`, for float64 arrays."""


def moe_layer(hidden_states, gate_up, down, topk_ids, topk_weights):
    """The layer's output, float64; ``gate_up[e]`` is dense ``[H, 2I]``, ``down[e]`` dense ``[I, H]``."""
    hidden_states = np.asarray(hidden_states, np.float64)
    out = np.zeros((hidden_states.shape[0], down[0].shape[1]))
    for token, x in enumerate(hidden_states):
        for expert, weight in zip(topk_ids[token], topk_weights[token], strict=True):
            if expert >= 0:
                gate, up = np.split(x @ gate_up[expert], 2)
                out[token] += weight * ((silu(gate) * up) @ down[expert])
    return out

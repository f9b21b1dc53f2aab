"""The operations of a decoder, and a whole model, in slow and plain NumPy: the specification for the tests.

All is float64. A backend's kernels round and order their sums as they document, so a comparison needs a bound.
Attention takes the keys and values of one sequence as arrays, from position 0; a backend may keep them in pages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from marlin_cy import reference as layers
from marlin_cy.activations import ACTIVATIONS
from marlin_cy.cpu.layout import unpack_tiles
from marlin_cy.decoder.plan import (
    AttentionPlan,
    DecoderPlan,
    DeltaNetPlan,
    DenseLinear,
    FfnPlan,
    LatentAttentionPlan,
    MixerPlan,
    MlpPlan,
    MoeFfnPlan,
    Projection,
    RopeTable,
)
from marlin_cy.interface import MarlinExpertStack, MoePlan
from marlin_cy.moe.layer import MoeLayer
from marlin_cy.moe.routing import Routing
from marlin_cy.reference import sigmoid
from marlin_cy.stacks.base import PackedLinear

__all__ = [
    "attention",
    "delta_gates",
    "delta_rule",
    "dense",
    "dense_weight",
    "dequantized_stack",
    "gated_rms_norm",
    "l2_normalize",
    "mlp",
    "moe",
    "projection",
    "reference_logits",
    "rms_norm",
    "rope",
    "short_conv",
    "silu",
    "softplus",
]

Floats: TypeAlias = npt.NDArray[np.float64]

L2_EPS = 1e-6
"""Epsilon of :func:`l2_normalize`. Source: transformers, ``modeling_qwen3_next.py``."""


# ---------------------------------------------------------------------------------------------
# Rows


def rms_norm(x: npt.ArrayLike, weight: npt.ArrayLike | None, eps: float) -> Floats:
    """``x / sqrt(mean(x * x) + eps) * weight`` over the last axis."""
    rows = np.asarray(x, np.float64)
    normed = rows / np.sqrt((rows * rows).mean(axis=-1, keepdims=True) + eps)
    result: Floats = normed if weight is None else normed * np.asarray(weight, np.float64)
    return result


def gated_rms_norm(x: npt.ArrayLike, weight: npt.ArrayLike | None, gate: npt.ArrayLike, eps: float) -> Floats:
    """:func:`rms_norm` of ``x``, times ``silu(gate)``."""
    return rms_norm(x, weight, eps) * silu(gate)


def l2_normalize(x: npt.ArrayLike, factor: float = 1.0) -> Floats:
    """``x * factor / sqrt(sum(x * x) + L2_EPS)`` over the last axis."""
    rows = np.asarray(x, np.float64)
    result: Floats = rows * (factor / np.sqrt((rows * rows).sum(axis=-1, keepdims=True) + L2_EPS))
    return result


def silu(x: npt.ArrayLike) -> Floats:
    """``x * sigmoid(x)``."""
    values = np.asarray(x, np.float64)
    return values * sigmoid(values)


def softplus(x: npt.ArrayLike) -> Floats:
    """``log(1 + exp(x))``."""
    result: Floats = np.logaddexp(0, np.asarray(x, np.float64))
    return result


def rope(x: npt.ArrayLike, table: RopeTable, positions: npt.ArrayLike) -> Floats:
    """Rotate the first ``2 * table.pairs`` values of each head.

    Parameters
    ----------
    x : ``[tokens, heads, head_dim]``
    table : RopeTable
    positions : int ``[tokens]``
    """
    out = np.array(x, np.float64)
    cos, sin = (array[np.asarray(positions)].astype(np.float64)[:, None] for array in (table.cos, table.sin))
    pairs = np.arange(table.pairs)
    first, second = (2 * pairs, 2 * pairs + 1) if table.interleaved else (pairs, pairs + table.pairs)
    a, b = out[..., first], out[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


# ---------------------------------------------------------------------------------------------
# Attention


def attention(
    q: npt.ArrayLike,
    keys: npt.ArrayLike,
    values: npt.ArrayLike,
    positions: npt.ArrayLike,
    *,
    scale: float,
    window: int | None = None,
    sinks: npt.ArrayLike | None = None,
    soft_cap: float | None = None,
) -> Floats:
    """Attention of queries over the keys and values of one sequence; :class:`AttentionPlan` has the formula.

    A query at position ``p`` sees the positions ``max(0, p - window + 1)`` to ``p``. Keys and values of other
    positions are not used, and may be NaN.

    Parameters
    ----------
    q : ``[tokens, num_heads, head_dim]``
    keys, values : ``[length, num_kv_heads, head_dim]`` and ``[length, num_kv_heads, value_dim]``
        Of the positions from 0.
    positions : int ``[tokens]``
    scale : float
    window : int, optional
    sinks : ``[num_heads]``, optional
    soft_cap : float, optional

    Returns
    -------
    float64 ``[tokens, num_heads, value_dim]``
    """
    q, keys, values = (np.asarray(array, np.float64) for array in (q, keys, values))
    tokens, num_heads, _ = q.shape
    heads_per_key = num_heads // keys.shape[1]
    out = np.zeros((tokens, num_heads, values.shape[2]))
    for token, position in enumerate(np.asarray(positions)):
        begin = 0 if window is None else max(0, position - window + 1)
        for head in range(num_heads):
            kv = head // heads_per_key
            scores = scale * (keys[begin : position + 1, kv] @ q[token, head])
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            if sinks is not None:
                scores = np.append(scores, np.asarray(sinks, np.float64)[head])
            weights = layers.softmax(scores)[: position + 1 - begin]
            out[token, head] = weights @ values[begin : position + 1, kv]
    return out


# ---------------------------------------------------------------------------------------------
# Gated DeltaNet


def short_conv(x: npt.ArrayLike, weight: npt.ArrayLike, state: npt.ArrayLike | None = None) -> tuple[Floats, Floats]:
    """``silu`` of a causal, depthwise convolution over tokens.

    ::

        out[t, c] = silu(sum over j of weight[c, j] * x[t - (width - 1) + j, c])

    Parameters
    ----------
    x : ``[tokens, channels]``
    weight : ``[channels, width]``
    state : ``[width - 1, channels]``, optional
        The rows before the first token, oldest first; zeros if omitted.

    Returns
    -------
    out : float64 ``[tokens, channels]``
    state : float64 ``[width - 1, channels]``
        The last ``width - 1`` rows.
    """
    rows, taps = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    width = taps.shape[1]
    before = np.zeros((width - 1, rows.shape[1])) if state is None else np.asarray(state, np.float64)
    padded = np.concatenate([before, rows])
    sums = np.stack([(padded[token : token + width] * taps.T).sum(axis=0) for token in range(len(rows))])
    return silu(sums), padded[len(rows) :]


def delta_gates(
    a: npt.ArrayLike, b: npt.ArrayLike, a_log: npt.ArrayLike, dt_bias: npt.ArrayLike
) -> tuple[Floats, Floats]:
    """``(decay, beta)``, ``[tokens, num_v_heads]`` each, from the outputs of the projections ``a`` and ``b``.

    ::

        decay = exp(-exp(a_log) * softplus(a + dt_bias));  beta = sigmoid(b)
    """
    rate = np.exp(np.asarray(a_log, np.float64))
    decay: Floats = np.exp(-rate * softplus(np.asarray(a, np.float64) + np.asarray(dt_bias, np.float64)))
    return decay, sigmoid(np.asarray(b, np.float64))


def delta_rule(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    decay: npt.ArrayLike,
    beta: npt.ArrayLike,
    state: npt.ArrayLike | None = None,
) -> tuple[Floats, Floats]:
    """The gated delta rule, token by token; :class:`DeltaNetPlan` has the formula.

    Parameters
    ----------
    q, k : ``[tokens, num_k_heads, key_dim]``
        Normalised, and ``q`` also divided by ``sqrt(key_dim)``.
    v : ``[tokens, num_v_heads, value_dim]``
    decay, beta : ``[tokens, num_v_heads]``
    state : ``[num_v_heads, key_dim, value_dim]``, optional
        Zeros if omitted.

    Returns
    -------
    out : float64 ``[tokens, num_v_heads, value_dim]``
    state : float64 ``[num_v_heads, key_dim, value_dim]``
    """
    q, k, v, decay, beta = (np.asarray(array, np.float64) for array in (q, k, v, decay, beta))
    num_v_heads = v.shape[1]
    heads_per_key = num_v_heads // k.shape[1]
    shape = num_v_heads, k.shape[2], v.shape[2]
    states = np.zeros(shape) if state is None else np.array(state, np.float64)
    out = np.zeros_like(v)
    for token in range(len(v)):
        for head in range(num_v_heads):
            query, key = q[token, head // heads_per_key], k[token, head // heads_per_key]
            memory = states[head] * decay[token, head]
            memory += np.outer(key, (v[token, head] - key @ memory) * beta[token, head])
            states[head], out[token, head] = memory, query @ memory
    return out, states


# ---------------------------------------------------------------------------------------------
# Products


def dense(x: npt.ArrayLike, weight: npt.NDArray[Any], bias: npt.ArrayLike | None = None) -> Floats:
    """``x @ weight.T + bias``."""
    product: Floats = np.asarray(x, np.float64) @ weight.astype(np.float64).T
    return product if bias is None else product + np.asarray(bias, np.float64)


def dequantized_stack(stack: MarlinExpertStack) -> list[Floats]:
    """The weights ``[k, n]`` of the experts of a stack of the CPU backend."""
    store = cast(Any, stack).store
    experts = store.data.reshape(store.num_experts, store.layout.expert_stride)
    return [
        unpack_tiles(packed, store.group_orders[order], store.layout, store.k)[0]
        for packed, order in zip(experts, store.order_of, strict=True)
    ]


def dense_weight(linear: Projection) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """``(weight [out_features, in_features], bias or None)`` of a projection: dense, or of the CPU backend."""
    if isinstance(linear, DenseLinear):
        return linear.matrix(), linear.bias
    view = cast(PackedLinear, linear)
    columns = np.concatenate(dequantized_stack(view.stack), axis=1)
    return columns[:, view.offset : view.offset + view.out_features].T, view.bias


def projection(x: npt.ArrayLike, linear: Projection) -> Floats:
    """The output of a projection."""
    return dense(x, *dense_weight(linear))


def mlp(x: npt.ArrayLike, plan: MlpPlan) -> Floats:
    """``down(activation(gate(x), up(x)))``."""
    inner = ACTIVATIONS[plan.activation].reference(projection(x, plan.gate), projection(x, plan.up))
    return projection(inner, plan.down)


def moe(x: npt.ArrayLike, router_logits: npt.ArrayLike, layer: MoeLayer | MoePlan) -> Floats:
    """The output of a MoE layer of the CPU backend, its own shared expert included."""
    plan = layer.plan if isinstance(layer, MoeLayer) else layer
    shared = None
    if plan.shared_expert is not None:
        expert = plan.shared_expert
        shared = layers.shared_expert(
            x,
            dequantized_stack(expert.gate_up)[0],
            dequantized_stack(expert.down)[0],
            activation=plan.activation,
            gate_up_bias=None if expert.gate_up.bias is None else expert.gate_up.bias[0],
            down_bias=None if expert.down.bias is None else expert.down.bias[0],
            gate_weight=expert.gate_weight,
        )
    return layers.moe_layer(
        x,
        dequantized_stack(plan.gate_up),
        dequantized_stack(plan.down),
        *layers.route(router_logits, plan.routing),
        activation=plan.activation,
        gate_up_bias=plan.gate_up.bias,
        down_bias=plan.down.bias,
        apply_router_weight_on_input=plan.apply_router_weight_on_input,
        shared=shared,
    )


# ---------------------------------------------------------------------------------------------
# A whole model: the tokens of one sequence, from position 0


RouterObserver: TypeAlias = Callable[[Routing, Floats], object]
"""Takes the routing of a layer, and its router's logits, ``[tokens, num_experts]``."""


def reference_logits(plan: DecoderPlan, tokens: npt.ArrayLike, observe: RouterObserver | None = None) -> Floats:
    """The logits after each token of a sequence, float64 ``[tokens, vocab_size]``.

    ``observe`` is called for each Mixture-of-Experts layer, in order.
    """
    x = plan.embedding[np.asarray(tokens)].astype(np.float64)
    for layer in plan.layers:
        x = x + mixer(rms_norm(x, layer.mixer_norm, plan.norm_eps), layer.mixer, plan.norm_eps)
        x = x + ffn(rms_norm(x, layer.ffn_norm, plan.norm_eps), layer.ffn, observe)
    return projection(rms_norm(x, plan.final_norm, plan.norm_eps), plan.head)


def mixer(x: Floats, plan: MixerPlan, norm_eps: float) -> Floats:
    """The output of a token mixer for a sequence; ``norm_eps`` is the model's."""
    if isinstance(plan, AttentionPlan):
        return grouped_query_attention(x, plan, norm_eps)
    return latent_attention(x, plan) if isinstance(plan, LatentAttentionPlan) else delta_net(x, plan)


def ffn(x: Floats, plan: FfnPlan, observe: RouterObserver | None = None) -> Floats:
    """The output of a feed-forward network."""
    if isinstance(plan, MlpPlan):
        return mlp(x, plan)
    router_logits = projection(x, plan.router)
    if observe is not None:
        observe(plan.layer.plan.routing, router_logits)
    out = moe(x, router_logits, plan.layer)
    return out if plan.shared is None else out + dense_shared_expert(x, plan, plan.shared)


def dense_shared_expert(x: Floats, plan: MoeFfnPlan, shared: MlpPlan) -> Floats:
    """The output of a shared expert that is not part of a MoE layer."""
    out = mlp(x, shared)
    return out if plan.shared_gate is None else sigmoid(x @ plan.shared_gate.astype(np.float64))[:, None] * out


def grouped_query_attention(x: Floats, plan: AttentionPlan, norm_eps: float) -> Floats:
    """The output of :class:`AttentionPlan`; ``norm_eps`` is that of the norms of heads."""
    tokens, positions = len(x), np.arange(len(x))
    q = projection(x, plan.q).reshape(tokens, plan.num_heads, -1)
    q, gate = q[..., : plan.head_dim], q[..., plan.head_dim :]
    k = projection(x, plan.k).reshape(tokens, plan.num_kv_heads, plan.head_dim)
    v = projection(x, plan.v).reshape(tokens, plan.num_kv_heads, -1)
    q = q if plan.q_norm is None else rms_norm(q, plan.q_norm, norm_eps)
    k = k if plan.k_norm is None else rms_norm(k, plan.k_norm, norm_eps)
    if plan.rope is not None:
        q, k = rope(q, plan.rope, positions), rope(k, plan.rope, positions)
    out = attention(q, k, v, positions, scale=plan.scale, window=plan.window, sinks=plan.sinks, soft_cap=plan.soft_cap)
    if plan.gated:
        out = out * sigmoid(gate)
    return projection(out.reshape(tokens, -1), plan.o)


def latent_attention(x: Floats, plan: LatentAttentionPlan) -> Floats:
    """The output of :class:`LatentAttentionPlan`."""
    tokens, positions = len(x), np.arange(len(x))
    compressed = x
    if plan.q_a is not None:
        compressed = rms_norm(projection(x, plan.q_a), plan.q_a_norm, plan.norm_eps)
    q = projection(compressed, plan.q_b).reshape(tokens, plan.num_heads, plan.nope_dim + plan.rope_dim)
    q_rope = rope(q[..., plan.nope_dim :], plan.rope, positions)
    q_latent = np.einsum("hln,thn->thl", plan.k_up.astype(np.float64), q[..., : plan.nope_dim])
    kv = projection(x, plan.kv_a)
    latent = rms_norm(kv[:, : plan.latent_dim], plan.kv_a_norm, plan.norm_eps)[:, None]
    k_rope = rope(kv[:, None, plan.latent_dim :], plan.rope, positions)
    out = attention(
        np.concatenate([q_latent, q_rope], axis=-1),
        np.concatenate([latent, k_rope], axis=-1),
        latent,
        positions,
        scale=plan.scale,
    )
    out = np.einsum("hvl,thl->thv", plan.v_up.astype(np.float64), out)
    return projection(out.reshape(tokens, -1), plan.o)


def delta_net(x: Floats, plan: DeltaNetPlan) -> Floats:
    """The output of :class:`DeltaNetPlan`."""
    tokens, keys = len(x), plan.num_k_heads * plan.key_dim
    mixed, _ = short_conv(projection(x, plan.qkv), plan.conv)
    q, k, v = np.split(mixed, [keys, 2 * keys], axis=1)
    q = l2_normalize(q.reshape(tokens, plan.num_k_heads, plan.key_dim), plan.key_dim**-0.5)
    k = l2_normalize(k.reshape(tokens, plan.num_k_heads, plan.key_dim))
    v = v.reshape(tokens, plan.num_v_heads, plan.value_dim)
    decay, beta = delta_gates(projection(x, plan.a), projection(x, plan.b), plan.a_log, plan.dt_bias)
    y, _ = delta_rule(q, k, v, decay, beta)
    gate = projection(x, plan.z).reshape(v.shape)
    return projection(gated_rms_norm(y, plan.norm, gate, plan.norm_eps).reshape(tokens, -1), plan.o)

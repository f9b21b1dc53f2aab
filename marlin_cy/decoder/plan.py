"""A whole model as a backend takes it: the operations of each layer, and their weights.

``architecture.py`` builds a plan from a checkpoint. :meth:`marlin_cy.Backend.new_decoder` makes a program from a plan,
and :mod:`marlin_cy.decoder.reference` computes a plan in float64. A plan knows nothing of families or of files::

    tokens ── embedding ── x
    for each layer:        x = x + mixer(rms_norm(x, mixer_norm))
                           x = x + ffn(rms_norm(x, ffn_norm))
    logits = head(rms_norm(x, final_norm))

    rms_norm(x, w) = x / sqrt(mean(x * x) + eps) * w

Norm weights are float32. Where a family defines a norm's factor as ``1 + w``, the plan has ``1 + w``. Vectors and
matrices of a plan are on the host.

A plan may be one host's share of a model (:mod:`marlin_cy.distributed`). It then has this host's heads, and projections
have this host's columns. A *cut* says which columns each host has; it is None where all are on one host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from marlin_cy.distributed.group import Group
from marlin_cy.distributed.shard import Cut
from marlin_cy.interface import Linear
from marlin_cy.moe.layer import MoeLayer

__all__ = [
    "SCALE_STEP",
    "AttentionPlan",
    "DecoderPlan",
    "DeltaNetPlan",
    "DenseLinear",
    "FfnPlan",
    "LatentAttentionPlan",
    "LayerPlan",
    "MixerPlan",
    "MlpPlan",
    "MoeFfnPlan",
    "Projection",
    "RopeTable",
]

Vector: TypeAlias = npt.NDArray[np.float32]

SCALE_STEP = 16
"""The kernels read as many weights of one row at once, by one scale."""


@dataclass(frozen=True, eq=False)
class DenseLinear:
    """A linear layer with weights of 8, 16 or 32 bits: ``out = x @ matrix.T + bias``.

    The matrix is ``weight``. With weights of 8 bits it is ``weight[n, k] * scales[n, k // scale_k]`` in float32.

    Attributes
    ----------
    weight : float32, float16, bfloat16, int8 or float8_e4m3fn ``[out_features, in_features]``
        C-contiguous. It may be a read-only view of a mapped file. None is NaN.
    bias : float32 ``[out_features]`` or None
    scales : float32 ``[out_features, ceil(in_features / scale_k)]`` or None
        Of weights of 8 bits; None for the others. C-contiguous.
    scale_k : int
        The inputs that a scale belongs to: a multiple of SCALE_STEP, or at least ``in_features``.
    """

    weight: npt.NDArray[Any]
    bias: Vector | None = None
    scales: npt.NDArray[np.float32] | None = None
    scale_k: int = 0

    @property
    def in_features(self) -> int:
        """Width of an input row."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Width of an output row."""
        return int(self.weight.shape[0])

    def matrix(self, rows: slice = slice(None)) -> npt.NDArray[Any]:
        """Rows of the matrix: those of ``weight``, or float32 if it has 8 bits."""
        weight = self.weight[rows]
        if self.scales is None:
            return weight
        scales = np.repeat(self.scales[rows], self.scale_k, axis=1)[:, : self.in_features]
        scales *= weight.astype(np.float32)
        return scales


Projection: TypeAlias = Linear | DenseLinear
"""A linear layer: quantised, on the backend, or dense."""


@dataclass(frozen=True, eq=False)
class RopeTable:
    """Rotary position embedding: the first ``2 * pairs`` values of a head are rotated in pairs.

    ::

        a, b = x[i], x[i + pairs]           or x[2 i], x[2 i + 1] if interleaved
        a, b = a * cos - b * sin, b * cos + a * sin

    Attributes
    ----------
    cos, sin : float32 ``[context_length, pairs]``
        Of each position. A factor on attention's logits, such as YaRN's, is part of both.
    interleaved : bool
    """

    cos: npt.NDArray[np.float32]
    sin: npt.NDArray[np.float32]
    interleaved: bool = False

    @property
    def pairs(self) -> int:
        """Number of pairs that are rotated."""
        return int(self.cos.shape[1])


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Grouped-query attention. Query head ``h`` reads key and value head ``h // (num_heads // num_kv_heads)``.

    ::

        q, k, v = q(x), k(x), v(x)          by heads; q and k are normalised per head, then rotated
        score = scale * (q . k)             for each position that the token sees
        score = soft_cap * tanh(score / soft_cap)
        weights = exp(score) / (sum of exp(score) + exp(sink of the head))
        out = o(weighted sum of v, times sigmoid(gate) if gated)

    Attributes
    ----------
    q, k, v, o : Projection
        If ``gated``, ``q`` gives ``[num_heads, 2 * head_dim]``: of each head first the query, then the gate.
    num_heads, num_kv_heads, head_dim : int
    scale : float
    rope : RopeTable or None
    q_norm, k_norm : float32 ``[head_dim]`` or None
        Weights of the RMS norm of each head, before rotation.
    window : int or None
        A token sees the last ``window`` positions, its own included; None: all positions up to its own.
    sinks : float32 ``[num_heads]`` or None
        A logit of each head that takes a share of the weights, but has no value. Source: gpt-oss.
    soft_cap : float or None
    gated : bool
        Source: Qwen3-Next.
    values : Cut or None
        Of the inputs of ``o``.
    """

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeTable | None = None
    q_norm: Vector | None = None
    k_norm: Vector | None = None
    window: int | None = None
    sinks: Vector | None = None
    soft_cap: float | None = None
    gated: bool = False
    values: Cut | None = None


@dataclass(frozen=True, eq=False)
class LatentAttentionPlan:
    """Multi-head latent attention, absorbed: all heads read one latent row of each position. Source: DeepSeek-V2.

    ::

        q = q_b(rms_norm(q_a(x), q_a_norm)), or q_b(x)      [num_heads, nope_dim + rope_dim]
        c, k_rope = split(kv_a(x))                          [latent_dim], [rope_dim]
        c = rms_norm(c, kv_a_norm);  rotate k_rope and the last rope_dim values of each head of q
        key = [c, k_rope], value = c                        these are what the cache holds: one head
        query of head h = [k_up[h].T @ q_nope[h], q_rope[h]]
        score = scale * (query . key)
        out = o([v_up[h] @ (weighted sum of values of head h)])

    Attributes
    ----------
    q_a : Projection or None
    q_a_norm : float32 ``[q_a.out_features]`` or None
    q_b : Projection
    kv_a : Projection
        ``latent_dim + rope_dim`` outputs.
    kv_a_norm : float32 ``[latent_dim]``
    k_up : float32 or float16 ``[num_heads, latent_dim, nope_dim]``
        The part of ``kv_b_proj`` that makes keys, transposed, so that it multiplies queries.
    v_up : float32 or float16 ``[num_heads, v_head_dim, latent_dim]``
        The part of ``kv_b_proj`` that makes values.
    o : Projection
    num_heads, nope_dim, rope_dim, latent_dim, v_head_dim : int
    scale : float
    rope : RopeTable
        ``rope_dim / 2`` pairs.
    norm_eps : float
        Epsilon of the two inner norms.
    values, low_rank, latent : Cut or None
        Of the inputs of ``o``, and of the outputs of ``q_a`` and ``kv_a``.
    """

    q_a: Projection | None
    q_a_norm: Vector | None
    q_b: Projection
    kv_a: Projection
    kv_a_norm: Vector
    k_up: npt.NDArray[Any]
    v_up: npt.NDArray[Any]
    o: Projection
    num_heads: int
    nope_dim: int
    rope_dim: int
    latent_dim: int
    v_head_dim: int
    scale: float
    rope: RopeTable
    norm_eps: float
    values: Cut | None = None
    low_rank: Cut | None = None
    latent: Cut | None = None


@dataclass(frozen=True, eq=False)
class DeltaNetPlan:
    """Gated DeltaNet: a linear attention with a recurrent state. Source: Qwen3-Next, ``modeling_qwen3_next.py``.

    Key heads have ``key_dim`` values, value heads ``value_dim``; value head ``h`` uses key head
    ``h // (num_v_heads // num_k_heads)``. Of each token, in order::

        mixed = silu(conv(qkv(x)))          causal, depthwise: conv_width taps per channel, the last on this token
        q, k, v = split(mixed)              [num_k_heads, key_dim] twice, [num_v_heads, value_dim]
        q, k = q / sqrt(q.q + 1e-6) / sqrt(key_dim), k / sqrt(k.k + 1e-6)              of each head
        beta = sigmoid(b(x)),  decay = exp(-exp(a_log) * softplus(a(x) + dt_bias))     of each value head
        state = state * decay;  state += outer(k, (v - k @ state) * beta);  y = q @ state
        out = o(rms_norm(y, norm) * silu(z(x)))                                        the norm is of each head

    Attributes
    ----------
    qkv, z, b, a, o : Projection
        ``2 * num_k_heads * key_dim + num_v_heads * value_dim``, ``num_v_heads * value_dim``, ``num_v_heads``,
        ``num_v_heads`` and ``hidden_size`` outputs.
    conv : float32 ``[channels, conv_width]``
    a_log, dt_bias : float32 ``[num_v_heads]``
    norm : float32 ``[value_dim]``
    num_k_heads, num_v_heads, key_dim, value_dim, conv_width : int
    norm_eps : float
    values : Cut or None
        Of the inputs of ``o``.
    """

    qkv: Projection
    z: Projection
    b: Projection
    a: Projection
    o: Projection
    conv: npt.NDArray[np.float32]
    a_log: Vector
    dt_bias: Vector
    norm: Vector
    num_k_heads: int
    num_v_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    norm_eps: float
    values: Cut | None = None


MixerPlan: TypeAlias = AttentionPlan | LatentAttentionPlan | DeltaNetPlan


@dataclass(frozen=True, eq=False)
class MlpPlan:
    """A dense feed-forward network: ``down(activation(gate(x), up(x)))``.

    Attributes
    ----------
    gate, up, down : Projection
    activation : str
        A name in :data:`marlin_cy.activations.ACTIVATIONS`.
    inner : Cut or None
        Of the outputs of ``gate`` and ``up``.
    """

    gate: Projection
    up: Projection
    down: Projection
    activation: str
    inner: Cut | None = None


@dataclass(frozen=True, eq=False)
class MoeFfnPlan:
    """A Mixture-of-Experts block.

    Attributes
    ----------
    router : DenseLinear
        Gives the routers' logits.
    layer : MoeLayer
        With its shared expert, if that is quantised.
    shared : MlpPlan or None
        A shared expert that is not quantised: its output is added.
    shared_gate : float32 ``[hidden_size]`` or None
        With ``shared``: its output is multiplied by ``sigmoid(x . shared_gate)``.
    """

    router: DenseLinear
    layer: MoeLayer
    shared: MlpPlan | None = None
    shared_gate: Vector | None = None


FfnPlan: TypeAlias = MoeFfnPlan | MlpPlan


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """A layer: a token mixer and a feed-forward network, each behind an RMS norm and with the residual added.

    Attributes
    ----------
    mixer_norm : float32 ``[hidden_size]``
    mixer : AttentionPlan, LatentAttentionPlan or DeltaNetPlan
    ffn_norm : float32 ``[hidden_size]``
    ffn : MoeFfnPlan or MlpPlan
    """

    mixer_norm: Vector
    mixer: MixerPlan
    ffn_norm: Vector
    ffn: FfnPlan


@dataclass(frozen=True, eq=False)
class DecoderPlan:
    """A whole model.

    Attributes
    ----------
    hidden_size, vocab_size : int
    context_length : int
        Positions that the RoPE tables have.
    norm_eps : float
    embedding : float32, float16 or bfloat16 ``[vocab_size, hidden_size]``
    layers : sequence of LayerPlan
    final_norm : float32 ``[hidden_size]``
    head : Projection
        ``[hidden_size]`` to ``[vocab_size]``; the embedding itself for models that tie them.
    group : Group or None
        The hosts that have shares of the model.
    hidden, vocabulary : Cut or None
        Of the outputs of mixers and networks, and of the head.
    """

    hidden_size: int
    vocab_size: int
    context_length: int
    norm_eps: float
    embedding: npt.NDArray[Any]
    layers: Sequence[LayerPlan]
    final_norm: Vector
    head: Projection
    group: Group | None = None
    hidden: Cut | None = None
    vocabulary: Cut | None = None

"""The plan of a checkpoint's model: each layer's operations by its architecture, with the weights they use."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import integer
from marlin_cy.checkpoints.checkpoint import Checkpoint
from marlin_cy.decoder.config import (
    MAX_CONTEXT,
    AttentionConfig,
    DecoderConfig,
    DeltaNetConfig,
    LatentAttentionConfig,
    read_decoder_config,
)
from marlin_cy.decoder.loading import Loader, rows_of
from marlin_cy.decoder.plan import (
    AttentionPlan,
    DecoderPlan,
    DeltaNetPlan,
    DenseLinear,
    FfnPlan,
    LatentAttentionPlan,
    LayerPlan,
    MixerPlan,
    MoeFfnPlan,
    Projection,
    RopeTable,
    Vector,
)
from marlin_cy.decoder.rope import rope_table
from marlin_cy.decoder.share import Heads, Share, columns_of
from marlin_cy.distributed.shard import Columns, Cut
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.moe.layer import MoeLayer

__all__ = ["build_plan", "read_config"]

LATENT_NORM_EPS = 1e-6
"""Epsilon of latent attention's inner norms. Source: transformers, ``modeling_deepseek_v2.py`` and ``_v3.py``."""

FLOAT16_ERROR = 2.0**-15
"""The largest relative error with which an unpacked matrix is kept as float16: that of an int16 activation."""

DENSE_MLP = ("gate_proj", "up_proj", "down_proj")
"""The names of a feed-forward network without experts, in every family."""


def read_config(checkpoint: Checkpoint) -> DecoderConfig:
    """The checkpoint's ``config.json``, checked. No weight is loaded.

    Raises
    ------
    CheckpointError, UnsupportedError
        As :func:`~marlin_cy.decoder.config.read_decoder_config`; also if the experts of a layer are not quantised.
    """
    config = read_decoder_config(checkpoint.config, checkpoint.path / "config.json")
    if checkpoint.dense_moe_layers:
        raise UnsupportedError(
            f"{checkpoint.path}: the experts of layers {checkpoint.dense_moe_layers} are not quantised, the decoder "
            "supports quantised experts"
        )
    dense = config.dense_size is None and len(checkpoint.moe_layers) < len(config.layer_types)
    if dense:
        raise CheckpointError(
            "intermediate_size: missing, although some layers have no experts", file=checkpoint.path / "config.json"
        )
    return config


def build_plan(
    checkpoint: Checkpoint, config: DecoderConfig | None = None, context_length: int | None = None
) -> DecoderPlan:
    """Load a checkpoint's weights to its backend, and describe how the model uses them.

    Dense matrices of the plan are views of the mapped files, which must not change while the plan is in use.

    Parameters
    ----------
    checkpoint : Checkpoint
    config : DecoderConfig, optional
        The result of :func:`read_config`.
    context_length : int, optional
        Number of positions of the RoPE tables; by default the model's own.

    Raises
    ------
    CheckpointError
        A value of ``config.json`` or a tensor is missing, invalid, or contradicts another.
    UnsupportedError
        The decoder does not support the model.
    TypeError, ValueError
        An invalid ``context_length``.
    """
    config = read_config(checkpoint) if config is None else config
    if context_length is None:
        context_length = config.context_length
    context_length = integer("context_length", context_length)
    if not 1 <= context_length <= MAX_CONTEXT:
        raise ValueError(f"context_length: got {context_length}, expected 1 to {MAX_CONTEXT}")
    return PlanBuilder(checkpoint, config, context_length).build()


class PlanBuilder:
    """Builds the plan of one checkpoint."""

    def __init__(
        self, checkpoint: Checkpoint, config: DecoderConfig, context_length: int, loader: Loader | None = None
    ) -> None:
        self._checkpoint, self._config, self._context_length = checkpoint, config, context_length
        self._loader = Loader(checkpoint) if loader is None else loader
        self._share = Share(checkpoint.shard)
        self._hidden = self._share.cut("hidden_size", config.hidden_size, whole_tiles=True)
        tables = {
            rope: rope_table(rope, context_length, config.rope_interleaved)
            for rope in set(config.ropes.values())
            if rope is not None
        }
        self._ropes: dict[str, RopeTable | None] = {
            layer_type: None if rope is None else tables[rope] for layer_type, rope in config.ropes.items()
        }

    def build(self) -> DecoderPlan:
        """Load all weights."""
        config, loader = self._config, self._loader
        # "model", "model.language_model" or "language_model.model".
        base = self._checkpoint.layer_prefix.removesuffix(".layers")
        embedding = loader.dense(f"{base}.embed_tokens", config.hidden_size, config.vocab_size).weight
        plan = DecoderPlan(
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            context_length=self._context_length,
            norm_eps=config.norm_eps,
            embedding=embedding,
            layers=[self._layer(layer) for layer in range(len(config.layer_types))],
            final_norm=self._norm(f"{base}.norm", config.hidden_size),
            head=self._head(base, embedding),
            group=self._share.group,
            hidden=self._hidden,
            vocabulary=self._vocabulary,
        )
        loader.check_all_used()
        return plan

    def _head(self, base: str, embedding: npt.NDArray[Any]) -> Projection:
        """The head; the embedding if they are tied, and the files do not have another head."""
        name = "language_model.lm_head" if base.startswith("language_model.") else "lm_head"
        loader, columns = self._loader, self._share.columns(self._vocabulary)
        if self._config.tied and not loader.is_quantised(name) and not self._own_head(name, embedding):
            return DenseLinear(rows_of(embedding, columns))
        return loader.projection(name, self._config.hidden_size, self._config.vocab_size, columns=columns)

    @property
    def _vocabulary(self) -> Cut | None:
        return self._share.cut("vocab_size", self._config.vocab_size)

    def _own_head(self, name: str, embedding: npt.NDArray[Any]) -> bool:
        """Whether the files have a head that differs from the embedding. As transformers does, it is used then."""
        if not self._loader.has(f"{name}.weight"):
            return False
        own = self._loader.matrix(f"{name}.weight", *embedding.shape)
        return own.dtype != embedding.dtype or not np.array_equal(own, embedding)

    def _norm(self, module: str, size: int) -> Vector:
        weight = self._loader.vector(f"{module}.weight", size)
        return weight + np.float32(1) if self._config.architecture.one_centred else weight

    def _layer(self, layer: int) -> LayerPlan:
        module, hidden = f"{self._checkpoint.layer_prefix}.{layer}", self._config.hidden_size
        plan = LayerPlan(
            mixer_norm=self._norm(f"{module}.input_layernorm", hidden),
            mixer=self._mixer(module, self._config.layer_types[layer]),
            ffn_norm=self._norm(f"{module}.post_attention_layernorm", hidden),
            ffn=self._ffn(module, layer),
        )
        if self._share.group is not None:  # hosts that load slowly are not taken for lost
            self._share.group.agree(f"loading layer {layer}", {})
        return plan

    # Token mixers ------------------------------------------------------------------------------

    def _mixer(self, module: str, layer_type: str) -> MixerPlan:
        config = self._config
        if layer_type == "linear_attention":
            assert config.delta_net is not None  # read_decoder_config read it
            return self._delta_net(f"{module}.linear_attn", config.delta_net)
        if isinstance(config.attention, LatentAttentionConfig):
            return self._latent_attention(f"{module}.self_attn", config.attention, layer_type)
        return self._attention(f"{module}.self_attn", config.attention, layer_type)

    def _attention(self, module: str, config: AttentionConfig, layer_type: str) -> AttentionPlan:
        load, hidden = self._loader.projection, self._config.hidden_size
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        heads = self._share.heads("num_attention_heads", config.num_heads, config.num_kv_heads)
        per_head = 2 * config.head_dim if config.gated else config.head_dim
        key_columns = heads.key_columns(config.head_dim)
        return AttentionPlan(
            q=load(f"{module}.q_proj", hidden, config.num_heads * per_head, config.bias, heads.query_columns(per_head)),
            k=load(f"{module}.k_proj", hidden, keys, config.bias, key_columns),
            v=load(f"{module}.v_proj", hidden, keys, config.bias, key_columns),
            o=load(f"{module}.o_proj", queries, hidden, config.output_bias, self._share.columns(self._hidden)),
            num_heads=heads.num_queries,
            num_kv_heads=heads.num_keys,
            head_dim=config.head_dim,
            scale=config.head_dim**-0.5,
            rope=self._ropes[layer_type],
            q_norm=self._norm(f"{module}.q_norm", config.head_dim) if config.head_norm else None,
            k_norm=self._norm(f"{module}.k_norm", config.head_dim) if config.head_norm else None,
            window=config.window if layer_type == "sliding_attention" else None,
            sinks=self._loader.vector(f"{module}.sinks", config.num_heads)[heads.queries] if config.sinks else None,
            gated=config.gated,
            values=heads.values(config.head_dim),
        )

    def _latent_attention(self, module: str, config: LatentAttentionConfig, layer_type: str) -> LatentAttentionPlan:
        load, hidden, share = self._loader.projection, self._config.hidden_size, self._share
        queries = config.num_heads * (config.nope_dim + config.rope_dim)
        heads = share.heads("num_attention_heads", config.num_heads, 1)
        per_head, inputs = config.nope_dim + config.rope_dim, config.num_heads * config.v_head_dim
        latent = share.cut("kv_lora_rank", config.latent_dim + config.rope_dim)
        rope, table = self._config.ropes[layer_type], self._ropes[layer_type]
        if rope is None or table is None:
            raise UnsupportedError(f"{self._checkpoint.path}: latent attention without RoPE is not supported")
        q_a, q_a_norm, q_b, low_rank = None, None, f"{module}.q_proj", None
        if config.q_rank is not None:
            low_rank = share.cut("q_lora_rank", config.q_rank)
            q_a = load(f"{module}.q_a_proj", hidden, config.q_rank, config.bias, share.columns(low_rank))
            q_a_norm, q_b = self._norm(f"{module}.q_a_layernorm", config.q_rank), f"{module}.q_b_proj"
        k_up, v_up = (rows_of(up, heads.query_columns(1)) for up in self._up_projections(f"{module}.kv_b_proj", config))
        return LatentAttentionPlan(
            q_a=q_a,
            q_a_norm=q_a_norm,
            q_b=load(
                q_b, hidden if config.q_rank is None else config.q_rank, queries, columns=heads.query_columns(per_head)
            ),
            kv_a=load(
                f"{module}.kv_a_proj_with_mqa",
                hidden,
                config.latent_dim + config.rope_dim,
                config.bias,
                share.columns(latent),
            ),
            kv_a_norm=self._norm(f"{module}.kv_a_layernorm", config.latent_dim),
            k_up=k_up,
            v_up=v_up,
            o=load(f"{module}.o_proj", inputs, hidden, config.bias, share.columns(self._hidden)),
            num_heads=heads.num_queries,
            nope_dim=config.nope_dim,
            rope_dim=config.rope_dim,
            latent_dim=config.latent_dim,
            v_head_dim=config.v_head_dim,
            scale=(config.nope_dim + config.rope_dim) ** -0.5 * rope.score_factor,
            rope=table,
            norm_eps=LATENT_NORM_EPS,
            values=heads.values(config.v_head_dim),
            low_rank=low_rank,
            latent=latent,
        )

    def _up_projections(self, module: str, config: LatentAttentionConfig) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """``(k_up, v_up)`` of :class:`LatentAttentionPlan`."""
        per_head = config.nope_dim + config.v_head_dim
        weight = self._loader.unpacked(module, config.latent_dim, config.num_heads * per_head)
        heads = weight.reshape(config.num_heads, per_head, config.latent_dim)
        keys, values = heads[:, : config.nope_dim], heads[:, config.nope_dim :]
        return narrowed(np.swapaxes(keys, 1, 2)), narrowed(values)

    def _delta_net(self, module: str, config: DeltaNetConfig) -> DeltaNetPlan:
        loader, hidden = self._loader, self._config.hidden_size
        values = config.num_v_heads * config.value_dim
        heads = self._share.heads("linear_num_value_heads", config.num_v_heads, config.num_k_heads)
        channels, kept, gates = (
            delta_columns(config, heads),
            heads.query_columns(config.value_dim),
            heads.query_columns(1),
        )
        conv = loader.vector(
            f"{module}.conv1d.weight",
            config.channels * config.conv_width,
            (config.channels, 1, config.conv_width),
        )
        if self._config.architecture.fused_delta:
            qkv_z, b_a = delta_outputs(config)
            width = config.channels + values
            qkv, z = loader.reordered(f"{module}.in_proj_qkvz", hidden, width, qkv_z, [channels, kept])
            b, a = loader.reordered(f"{module}.in_proj_ba", hidden, 2 * config.num_v_heads, b_a, [gates, gates])
        else:
            qkv = loader.projection(f"{module}.in_proj_qkv", hidden, config.channels, columns=channels)
            z = loader.projection(f"{module}.in_proj_z", hidden, values, columns=kept)
            b = loader.projection(f"{module}.in_proj_b", hidden, config.num_v_heads, columns=gates)
            a = loader.projection(f"{module}.in_proj_a", hidden, config.num_v_heads, columns=gates)
        return DeltaNetPlan(
            qkv=qkv,
            z=z,
            b=b,
            a=a,
            o=loader.projection(f"{module}.out_proj", values, hidden, columns=self._share.columns(self._hidden)),
            conv=rows_of(conv.reshape(config.channels, config.conv_width), channels),
            a_log=loader.vector(f"{module}.A_log", config.num_v_heads)[heads.queries],
            dt_bias=loader.vector(f"{module}.dt_bias", config.num_v_heads)[heads.queries],
            # This norm has the factor itself, also where the others are centred at 1.
            norm=loader.vector(f"{module}.norm.weight", config.value_dim),
            num_k_heads=heads.num_keys,
            num_v_heads=heads.num_queries,
            key_dim=config.key_dim,
            value_dim=config.value_dim,
            conv_width=config.conv_width,
            norm_eps=self._config.norm_eps,
            values=heads.values(config.value_dim),
        )

    # Feed-forward networks ---------------------------------------------------------------------

    def _ffn(self, module: str, layer: int) -> FfnPlan:
        checkpoint, loader, hidden = self._checkpoint, self._loader, self._config.hidden_size
        spec, family = checkpoint.moe_spec, checkpoint.family
        network = spec.activation, self._share, self._hidden
        if layer not in checkpoint.moe_layers:
            assert self._config.dense_size is not None  # read_config checks
            return loader.mlp(f"{module}.mlp", DENSE_MLP, hidden, self._config.dense_size, *network)
        block, names = checkpoint.moe_block(layer), family.shared_names
        bias = self._config.architecture.expert_bias
        router = loader.dense(f"{block}.{family.router}", hidden, spec.num_experts, bias)
        shared = f"{block}.{family.shared_expert}"
        if spec.shared_intermediate_size is None or all(loader.is_quantised(f"{shared}.{name}") for name in names):
            return MoeFfnPlan(router, self._experts(layer, shared_expert=True))
        gate = None
        if family.shared_gate is not None:
            gate = loader.vector(f"{block}.{family.shared_gate}.weight", hidden, (1, hidden))
        return MoeFfnPlan(
            router=router,
            layer=self._experts(layer, shared_expert=False),
            shared=loader.mlp(shared, names, hidden, spec.shared_intermediate_size, *network),
            shared_gate=gate,
        )

    def _experts(self, layer: int, shared_expert: bool) -> MoeLayer:
        """A layer's experts. Biases are optional to a checkpoint, but not to a model."""
        checkpoint = self._checkpoint
        experts = checkpoint.moe_layer(layer, shared_expert=shared_expert)
        expected = self._config.architecture.expert_bias
        if expected and (experts.gate_up.bias is None or experts.down.bias is None):
            raise CheckpointError(
                f"{checkpoint.moe_block(layer)}.experts: the biases are missing", file=checkpoint.path
            )
        if not expected and experts.has_bias:
            raise CheckpointError(
                f"{checkpoint.moe_block(layer)}.experts: the model has no biases", file=checkpoint.path
            )
        return experts


def narrowed(weight: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """A matrix as float16 if this changes it by at most :data:`FLOAT16_ERROR` of its norm, else as it is."""
    with np.errstate(over="ignore", invalid="ignore"):  # a damaged file has infinities
        half = weight.astype(np.float16, order="C")
        error = np.linalg.norm((half.astype(np.float32) - weight).astype(np.float64))
        close = bool(error <= FLOAT16_ERROR * np.linalg.norm(weight.astype(np.float64)))
    return half if close else np.ascontiguousarray(weight)


def delta_columns(config: DeltaNetConfig, heads: Heads) -> Columns | None:
    """The channels of this host's heads: queries, keys and values; None for all channels."""
    if heads.cut is None:
        return None
    keys = config.num_k_heads * config.key_dim
    parts = [columns_of(heads.keys, config.key_dim, offset) for offset in (0, keys)]
    return np.concatenate([*parts, columns_of(heads.queries, config.value_dim, 2 * keys)])


def delta_outputs(config: DeltaNetConfig) -> tuple[list[npt.NDArray[np.int64]], list[npt.NDArray[np.int64]]]:
    """``((qkv, z), (b, a))``: the outputs of ``in_proj_qkvz`` and of ``in_proj_ba`` that each projection has.

    Of each key head, ``in_proj_qkvz`` has its query, its key, and the values and gates of its value heads.
    ``in_proj_ba`` has the ``b`` of its value heads, then their ``a``. Source: transformers,
    ``modeling_qwen3_next.py``, ``fix_query_key_value_ordering``.
    """
    per_key = config.num_v_heads // config.num_k_heads
    key, value = config.key_dim, per_key * config.value_dim
    rows = np.arange(config.num_k_heads * 2 * (key + value)).reshape(config.num_k_heads, 2 * (key + value))
    q, k, v, z = np.split(rows, [key, 2 * key, 2 * key + value], axis=1)
    b, a = np.split(np.arange(2 * config.num_v_heads).reshape(config.num_k_heads, 2 * per_key), 2, axis=1)
    return [np.concatenate([q.ravel(), k.ravel(), v.ravel()]), z.ravel()], [b.ravel(), a.ravel()]

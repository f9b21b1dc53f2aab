"""The configuration that a header describes, under the names of ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from marlin_cy.checkpoints.gguf.metadata import Metadata
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import JsonObject

__all__ = ["deepseek2", "glm4moe", "gpt_oss", "mixtral", "qwen2moe", "qwen3moe", "qwen3next"]

Config = JsonObject

SOFTMAX, SIGMOID = 1, 2
"""Values of ``expert_gating_func``."""

MLA_LOG_FACTOR = 0.1
"""``rope.scaling.yarn_log_multiplier`` of deepseek2 is DeepSeek's ``mscale_all_dim`` times this."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "attention.temperature_scale": (0.0,),
    "attention.value_scale": (0.0, 1.0),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "router_logit_softcapping": (0.0,),
    "swiglu_clamp_exp": (0.0,),
    "swiglu_clamp_shexp": (0.0,),
    "use_parallel_residual": (False,),
}
"""Fields that would change the result, and the values with which they do not. Source: llama.cpp, ``llama-arch.cpp``."""


def qwen2moe(fields: Metadata) -> Config:
    """Qwen2-MoE."""
    config = _common(fields) | _experts(fields)
    return config | {
        "qkv_bias": _has(fields, "attn_q.bias", config),
        "norm_topk_prob": fields.flag("expert_weights_norm") or False,
        "shared_expert_intermediate_size": fields.integer("expert_shared_feed_forward_length")
        or fields.size("feed_forward_length"),
        "mlp_only_layers": _without_experts(fields, config),
    }


def qwen3moe(fields: Metadata) -> Config:
    """Qwen3-MoE."""
    config = _common(fields) | _experts(fields)
    return config | {
        "attention_bias": _has(fields, "attn_q.bias", config),
        "norm_topk_prob": True,
        "mlp_only_layers": _without_experts(fields, config),
    }


def qwen3next(fields: Metadata) -> Config:
    """Qwen3-Next and Qwen3.5-MoE, whose linear attention has the projections of Qwen3.5 in these files."""
    config = _common(fields) | _experts(fields)
    layers = config["num_hidden_layers"]
    recurrent = fields.flags("attention.recurrent_layers")
    if recurrent is None:
        interval = fields.integer("full_attention_interval") or 4
        recurrent = [(layer + 1) % interval != 0 for layer in range(layers)]
    if len(recurrent) < layers:
        raise fields.error("attention.recurrent_layers", recurrent, f"{layers} values")
    value_heads, inner = fields.size("ssm.time_step_rank"), fields.size("ssm.inner_size")
    if inner % value_heads:
        raise fields.error("ssm.inner_size", inner, f"a multiple of ssm.time_step_rank, {value_heads}")
    return config | {
        "attention_bias": _has(fields, "attn_q.bias", config),
        "shared_expert_intermediate_size": fields.integer("expert_shared_feed_forward_length")
        or fields.size("feed_forward_length"),
        "partial_rotary_factor": _rotated(fields, config),
        "layer_types": ["linear_attention" if kind else "full_attention" for kind in recurrent[:layers]],
        "linear_num_key_heads": fields.size("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": fields.size("ssm.state_size"),
        "linear_value_head_dim": inner // value_heads,
        "linear_conv_kernel_dim": fields.size("ssm.conv_kernel"),
    }


def mixtral(fields: Metadata) -> Config:
    """Mixtral."""
    if not fields.integer("expert_count"):
        raise UnsupportedError(f"{fields.header.files[0]}: a model without experts (architecture llama)")
    config = _common(fields) | _experts(fields)
    inner = config.pop("moe_intermediate_size")
    return config | {"intermediate_size": inner, "num_local_experts": config["num_experts"], "sliding_window": None}


def deepseek2(fields: Metadata) -> Config:
    """DeepSeek-V2 and V3, and what else has their layers."""
    config = _common(fields) | _experts(fields)
    # Only models with sigmoid scores have a bias that selects experts.
    biased = _has(fields, "exp_probs_b.bias", config)
    gating = fields.integer("expert_gating_func") or (SIGMOID if biased else SOFTMAX)
    if gating not in (SOFTMAX, SIGMOID):
        raise UnsupportedError(f"{fields.header.files[0]}: expert_gating_func {gating}, supported: 1 and 2")
    groups = fields.integer("expert_group_count") or 1
    third = gating == SIGMOID
    split = fields.layers_with("attn_k_b.weight", range(config["num_hidden_layers"]))
    suffix = "_mla" if split or fields.get("attention.key_length_mla") is not None else ""
    rope_dim = fields.size("rope.dimension_count")
    key_length, value_length = (
        fields.size(f"attention.key_length{suffix}"),
        fields.size(f"attention.value_length{suffix}"),
    )
    if key_length <= rope_dim:
        raise fields.error(f"attention.key_length{suffix}", key_length, f"more than rope.dimension_count, {rope_dim}")
    compressed = _has(fields, "attn_q_a.weight", config)
    for name in ("head_dim", "partial_rotary_factor"):
        config.pop(name, None)
    return config | {
        "model_type": "deepseek_v3" if third else "deepseek_v2",
        "num_key_value_heads": config["num_attention_heads"],
        "n_routed_experts": config.pop("num_experts"),
        "n_shared_experts": fields.integer("expert_shared_count") or 0,
        "first_k_dense_replace": fields.integer("leading_dense_block_count") or 0,
        "norm_topk_prob": fields.flag("expert_weights_norm") or False,
        "routed_scaling_factor": _weights_scale(fields),
        "n_group": groups,
        "topk_group": fields.integer("expert_group_used_count") or 1,
        "topk_method": "noaux_tc" if third else "group_limited_greedy" if groups > 1 else "greedy",
        "scoring_func": "sigmoid" if third else "softmax",
        "q_lora_rank": fields.size("attention.q_lora_rank") if compressed else None,
        "kv_lora_rank": fields.size("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_length - rope_dim,
        "v_head_dim": value_length,
        "rope_interleave": True,
    }


def glm4moe(fields: Metadata) -> Config:
    """GLM-4.5."""
    gating = fields.integer("expert_gating_func") or SIGMOID
    if gating != SIGMOID:
        raise UnsupportedError(
            f"{fields.header.files[0]}: expert_gating_func {gating}, GLM-4.5 has {SIGMOID} (sigmoid)"
        )
    config = _common(fields) | _experts(fields)
    return config | {
        "attention_bias": _has(fields, "attn_q.bias", config),
        "use_qk_norm": _has(fields, "attn_q_norm.weight", config),
        "partial_rotary_factor": _rotated(fields, config),
        "n_routed_experts": config.pop("num_experts"),
        "n_shared_experts": fields.integer("expert_shared_count") or 0,
        "first_k_dense_replace": fields.integer("leading_dense_block_count") or 0,
        "norm_topk_prob": fields.flag("expert_weights_norm") or False,
        "routed_scaling_factor": _weights_scale(fields),
        "n_group": fields.integer("expert_group_count") or 1,
        "topk_group": fields.integer("expert_group_used_count") or 1,
    }


def gpt_oss(fields: Metadata) -> Config:
    """gpt-oss."""
    config = _common(fields) | _experts(fields)
    inner, experts = config.pop("moe_intermediate_size"), config.pop("num_experts")
    if "rope_parameters" in config and config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"]["truncate"] = False  # of gpt-oss alone, and not in the file
    return config | {
        "intermediate_size": inner,
        "num_local_experts": experts,
        "sliding_window": fields.size("attention.sliding_window"),
        "attention_bias": True,
    }


# ---------------------------------------------------------------------------------------------
# Parts that architectures share


def _common(fields: Metadata) -> Config:
    """Sizes, attention and RoPE."""
    _refuse_what_is_not_computed(fields)
    blocks, extra = fields.size("block_count"), fields.integer("nextn_predict_layers") or 0
    if blocks > len(fields.header.tensors):
        raise fields.error("block_count", blocks, f"at most the number of tensors, {len(fields.header.tensors)}")
    if not 0 <= extra < blocks:
        raise fields.error("nextn_predict_layers", extra, f"less than block_count, {blocks}")
    heads, hidden = fields.size("attention.head_count"), fields.size("embedding_length")
    head_dim = fields.integer("attention.key_length") or hidden // heads
    value_dim = fields.integer("attention.value_length") or head_dim
    latent = fields.get("attention.kv_lora_rank") is not None
    if value_dim != head_dim and not latent:
        raise UnsupportedError(
            f"{fields.header.files[0]}: attention.value_length {value_dim} beside a key_length of {head_dim}, only "
            "equal lengths are supported"
        )
    embedding = fields.tensor("token_embd.weight")
    if len(embedding.shape) != 2:
        raise CheckpointError(f"got {embedding.shape}, expected two sizes", file=embedding.file, tensor=embedding.name)
    config: Config = {
        "hidden_size": hidden,
        "num_hidden_layers": blocks - extra,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": fields.size("context_length"),
        "rms_norm_eps": fields.required(
            fields.number("attention.layer_norm_rms_epsilon"), "attention.layer_norm_rms_epsilon"
        ),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in fields.header.tensors,
        "rope_parameters": _rope(fields),
    }
    if (inner := fields.integer("feed_forward_length")) is not None:
        config["intermediate_size"] = inner
    if not latent and (factor := _rotated(fields, config)) != 1:
        config["partial_rotary_factor"] = factor
    return config


def _experts(fields: Metadata) -> Config:
    inner = fields.integer("expert_feed_forward_length")
    top_k = fields.size("expert_used_count")
    if inner is None:
        inner = fields.size("feed_forward_length")
        # Older files of Qwen2-MoE have the width of all experts of a token.
        if fields.architecture.startswith("qwen"):
            inner //= top_k
    return {
        "num_experts": fields.size("expert_count"),
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": inner,
    }


def _rope(fields: Metadata) -> Config:
    """``rope_parameters``."""
    base = fields.number("rope.freq_base") or 10000.0
    other = fields.number("rope.freq_base_swa")
    if other is not None and other != base:
        raise UnsupportedError(f"{fields.header.files[0]}: rope.freq_base_swa {other}, expected rope.freq_base, {base}")
    kind = fields.text("rope.scaling.type") or "none"
    factor = fields.number("rope.scaling.factor")
    if kind == "none" or factor is None or factor == 0:
        legacy = fields.number("rope.scale_linear") or 1.0
        if kind != "none" and factor is None:
            fields.required(factor, "rope.scaling.factor")
        return {"rope_type": "default" if legacy == 1 else "linear", "rope_theta": base} | (
            {} if legacy == 1 else {"factor": legacy}
        )
    rope: Config = {"rope_type": kind, "rope_theta": base, "factor": factor}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = fields.size("rope.scaling.original_context_length")
        for name, key in (
            ("attention_factor", "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if (value := fields.number(f"rope.scaling.{key}")) is not None:
                rope[name] = value
        if multiplier := fields.number("rope.scaling.yarn_log_multiplier"):
            if fields.architecture != "deepseek2":
                raise UnsupportedError(
                    f"{fields.header.files[0]}: rope.scaling.yarn_log_multiplier {multiplier}, only of deepseek2"
                )
            # DeepSeek's models have mscale == mscale_all_dim, as llama.cpp assumes.
            rope["mscale"] = rope["mscale_all_dim"] = float(str(np.float32(multiplier / MLA_LOG_FACTOR)))
    return rope


def _rotated(fields: Metadata, config: Config) -> float:
    """The part of a head that is rotated."""
    rotated = fields.integer("rope.dimension_count") or config["head_dim"]
    return float(rotated / config["head_dim"])


def _weights_scale(fields: Metadata) -> float:
    """``routed_scaling_factor``; llama.cpp does not scale where the field is 0."""
    return fields.number("expert_weights_scale") or 1.0


def _has(fields: Metadata, tensor: str, config: Config) -> bool:
    """Whether any layer has a tensor. A layer that lacks it is then refused when its weights are loaded."""
    return bool(fields.layers_with(tensor, range(config["num_hidden_layers"])))


def _without_experts(fields: Metadata, config: Config) -> list[int]:
    """``mlp_only_layers``: the layers that have a dense feed-forward network."""
    layers = range(config["num_hidden_layers"])
    dense = fields.layers_with("ffn_down.weight", layers)
    return [layer for layer in dense if not fields.layers_with("ffn_down_exps.weight", [layer])]


def _refuse_what_is_not_computed(fields: Metadata) -> None:
    for name, neutral in NEUTRAL.items():
        value = fields.get(name)
        if value is None:
            continue
        values = value.tolist() if isinstance(value, np.ndarray) else [value]
        if any(entry not in neutral for entry in values):
            raise UnsupportedError(f"{fields.header.files[0]}: {fields.key(name)} {value} is not supported")


Settings = Callable[[Metadata], Config]

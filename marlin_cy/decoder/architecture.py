"""Architectures: how the layers of each model family are built, and under which names their weights are stored.

An architecture is a row of :data:`ARCHITECTURES`. Names and routing of Mixture-of-Experts blocks are those of
:mod:`marlin_cy.checkpoints.families`. ``docs/adding-a-family.md`` says how to add a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.json_fields import JsonObject, StrPath

__all__ = ["ARCHITECTURES", "MISSING", "Architecture", "find_architecture"]


@dataclass(frozen=True)
class Architecture:
    """The layers of a model family.

    Attributes
    ----------
    latent : bool
        Whether attention is multi-head latent attention; otherwise it is grouped-query attention.
    pattern : str
        Which layers have which token mixer, where ``layer_types`` of ``config.json`` does not say it; a key of
        ``PATTERNS`` in ``config.py``.
    mixers : tuple of str
        The layer types that the family has: "full_attention", "sliding_attention", "linear_attention".
    bias : str or None
        The key of ``config.json`` that decides whether attention's input projections have a bias; None if they never
        have one.
    output_bias : bool
        Whether the same key decides about the output projection's bias. Otherwise it has none.
    head_norm : bool or str
        Whether queries and keys are normalised per head, or the key of ``config.json`` that decides.
    sinks : bool
        Whether attention has a sink for each head.
    expert_bias : bool
        Whether routers and experts have biases.
    gated : bool
        Whether attention's output is gated.
    rope_theta : float
        The default of ``rope_theta``.
    rope : mapping
        The settings of RoPE where ``config.json`` has neither ``rope_parameters`` nor ``rope_scaling``.
    partial_rotary : float or None
        The default of ``partial_rotary_factor``; None if the family rotates whole heads.
    rope_interleaved : bool or str
        Whether neighbouring values are rotated as a pair, or the key of ``config.json`` that decides, true by default.
    one_centred : bool
        Whether the factor of an RMS norm is ``1 + weight``.
    fused_delta : bool
        Whether the projections of linear attention are stored as ``in_proj_qkvz`` and ``in_proj_ba``, ordered by key
        heads; otherwise as ``in_proj_qkv``, ``in_proj_z``, ``in_proj_b`` and ``in_proj_a``.
    defaults : mapping
        Values of ``config.json`` where a key is missing or null. Keys of sizes have no default.
    """

    latent: bool = False
    pattern: str = "full"
    mixers: tuple[str, ...] = ("full_attention",)
    bias: str | None = "attention_bias"
    output_bias: bool = True
    head_norm: bool | str = False
    sinks: bool = False
    expert_bias: bool = False
    gated: bool = False
    rope_theta: float = 10000.0
    rope: Mapping[str, Any] = field(default_factory=dict)
    partial_rotary: float | None = None
    rope_interleaved: bool | str = False
    one_centred: bool = False
    fused_delta: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


YARN_OF_GPT_OSS = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

QWEN3_5 = Architecture(
    pattern="interval",
    mixers=("full_attention", "linear_attention"),
    head_norm=True,
    gated=True,
    partial_rotary=0.25,
    one_centred=True,
    defaults={"head_dim": 256, "linear_conv_kernel_dim": 4},
)

DEEPSEEK_V3 = Architecture(latent=True, rope_interleaved="rope_interleave")
QWEN3_VL = Architecture(head_norm=True, rope_theta=500000.0)
GLM4V = Architecture(output_bias=False, partial_rotary=0.5, defaults={"rms_norm_eps": 1e-5, "attention_bias": True})

ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen2_moe": Architecture(
        pattern="qwen2",
        mixers=("full_attention", "sliding_attention"),
        bias="qkv_bias",
        output_bias=False,
        defaults={"qkv_bias": True, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3_moe": Architecture(
        pattern="qwen3",
        mixers=("full_attention", "sliding_attention"),
        head_norm=True,
        defaults={"sliding_window": 4096},
    ),
    "qwen3_next": Architecture(
        pattern="interval",
        mixers=("full_attention", "linear_attention"),
        head_norm=True,
        gated=True,
        partial_rotary=0.25,
        one_centred=True,
        fused_delta=True,
        defaults={"head_dim": 256, "linear_conv_kernel_dim": 4},
    ),
    "qwen3_5_moe": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5,
    "mixtral": Architecture(
        pattern="window",
        mixers=("full_attention", "sliding_attention"),
        bias=None,
        rope_theta=1e6,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "deepseek_v2": Architecture(latent=True, rope_interleaved=True),
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": DEEPSEEK_V3,
    "kimi_k25": DEEPSEEK_V3,
    "glm4_moe_lite": replace(DEEPSEEK_V3, defaults={"rms_norm_eps": 1e-5}),
    "glm4_moe": Architecture(
        output_bias=False,
        head_norm="use_qk_norm",
        partial_rotary=0.5,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "glm4v_moe": GLM4V,
    "glm4v_moe_text": GLM4V,
    "qwen3_vl_moe": QWEN3_VL,
    "qwen3_vl_moe_text": QWEN3_VL,
    "dots1": Architecture(pattern="late_window", mixers=("full_attention", "sliding_attention"), head_norm=True),
    "solar_open": Architecture(
        output_bias=False, partial_rotary=1.0, rope_theta=1e6, defaults={"rms_norm_eps": 1e-5, "head_dim": 128}
    ),
    "hy_v3": Architecture(head_norm=True, rope_theta=11158840.0, defaults={"rms_norm_eps": 1e-5, "head_dim": 128}),
    "ernie4_5_moe": Architecture(
        bias="use_bias", rope_theta=500000.0, rope_interleaved=True, defaults={"rms_norm_eps": 1e-5}
    ),
    "gpt_oss": Architecture(
        pattern="alternating",
        mixers=("full_attention", "sliding_attention"),
        sinks=True,
        expert_bias=True,
        rope_theta=150000.0,
        rope=YARN_OF_GPT_OSS,
        defaults={"rms_norm_eps": 1e-5, "head_dim": 64, "attention_bias": True, "sliding_window": 128},
    ),
}
"""The architectures, by ``model_type`` of ``config.json``.

Source: transformers 5.24, ``models/*/modeling_*.py`` and ``configuration_*.py``.
"""


NORMS_OF_ALL_HEADS = "norms of queries and keys over all heads together"
INDEXER = "attention to keys that an indexer selects"
KIMI_DELTA = "Kimi's delta attention"

MISSING: Mapping[str, str] = {
    "afmoe": "attention with a gate of its own and four norms a layer",
    "bailing_hybrid": KIMI_DELTA,
    "cohere2_moe": "layers whose attention and feed-forward network run side by side",
    "deepseek_v32": INDEXER,
    "deepseek_v4": "compressed attention and hyper-connections",
    "exaone_moe": "layers without RoPE among layers with it",
    "gemma4": "heads of two widths and four norms a layer",
    "gemma4_text": "heads of two widths and four norms a layer",
    "glm_moe_dsa": INDEXER,
    "hunyuan_v1_moe": "norms of queries and keys after RoPE",
    "jamba": "Mamba layers",
    "kimi_linear": KIMI_DELTA,
    "laguna": "attention with a gate for each head, and numbers of heads that differ by layer",
    "lfm2_moe": "convolution layers",
    "llama4": "chunked attention, and weights on the experts' input",
    "llama4_text": "chunked attention, and weights on the experts' input",
    "mimo_v2_flash": "attention whose values are scaled and narrower than keys",
    "minimax_m2": NORMS_OF_ALL_HEADS,
    "minimax_m3_vl": INDEXER,
    "minimax_m3_vl_text": INDEXER,
    "mistral3": "queries that are scaled by their position",
    "mistral4": "queries that are scaled by their position",
    "nemotron_h": "Mamba layers",
    "olmoe": NORMS_OF_ALL_HEADS,
    "phimoe": "layer norms with a bias",
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
}
"""What the decoder lacks for each further family of :data:`~marlin_cy.checkpoints.family_rows.FAMILIES`."""


def find_architecture(config: JsonObject, file: StrPath) -> Architecture:
    """The row of :data:`ARCHITECTURES` for ``model_type``.

    Raises
    ------
    UnsupportedError
        There is no such row.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in MISSING:
        raise UnsupportedError(f"{file}: model_type {model_type!r}: the decoder lacks {MISSING[model_type]}")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedError(f"{file}: model_type {model_type!r}, the decoder supports {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]

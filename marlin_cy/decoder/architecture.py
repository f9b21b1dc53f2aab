"""Architectures: how the layers of each model family are built, and under which names their weights are stored.

An architecture is a row of :data:`ARCHITECTURES`. Names and routing of Mixture-of-Experts blocks are those of
:mod:`marlin_cy.checkpoints.families`. ``docs/adding-a-family.md`` says how to add a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.json_fields import JsonObject, StrPath

__all__ = ["ARCHITECTURES", "Architecture", "find_architecture"]


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
    correction_bias : bool
        Whether routers have a bias that selects experts, ``e_score_correction_bias``.
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
    correction_bias: bool = False
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
    "deepseek_v3": Architecture(latent=True, rope_interleaved="rope_interleave", correction_bias=True),
    "glm4_moe": Architecture(
        output_bias=False,
        head_norm="use_qk_norm",
        correction_bias=True,
        partial_rotary=0.5,
        defaults={"rms_norm_eps": 1e-5},
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


def find_architecture(config: JsonObject, file: StrPath) -> Architecture:
    """The row of :data:`ARCHITECTURES` for ``model_type``.

    Raises
    ------
    UnsupportedError
        There is no such row.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UnsupportedError(f"{file}: model_type {model_type!r}, the decoder supports {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[model_type]

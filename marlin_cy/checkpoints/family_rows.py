"""The model families: a row each, with the names of modules and the routing.

``docs/adding-a-family.md`` says how to add a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """The names of a model family's modules, and its routing.

    Attributes
    ----------
    name : str
    block : str
        The name of the MoE block in a layer: ``"mlp"``. Empty if experts and router lie in the layer itself.
    gate : str or None
        The name of an expert's gate; None if experts have no gate.
    up, down : str
        The names of an expert's other linear layers.
    gate_up : str
        The name of the tensor that holds gate and up of all experts, in checkpoints that have such a tensor.
    interleaved : bool
        Whether columns of gate and up alternate in that tensor. Otherwise all of gate comes before all of up.
    router : str
        The name of the router in the block.
    router_norm : bool
        Whether the router's input is normalised: divided by the root of the mean of its squares.
    router_scale : str or None
        The name, in the block, of the factors of the router's normalised input.
    expert_scale : str or None
        The name, in the block, of a factor for each expert's weight.
    correction : str or None
        The name, in the block, of the bias that is added to scores to select experts.
    correction_key : str or None
        The key of ``config.json`` that says whether there is this bias; None if there always is.
    shared_expert, shared_gate : str or None
        The names of the shared expert in the block, and of the linear layer with one output that weights it.
    shared_names : tuple of str
        The names of gate, up and down in the shared expert; up and down if there is no gate.
    aliases : tuple of mapping
        Attributes of this class under which other tools write the same model: each has those that differ.
    intermediate_size : str
        The key of ``config.json`` for an expert's width.
    shared_width : str or None
        The key for the shared expert's width. None: the width is that of an expert times a count.
    shared_count : tuple of str
        The synonymous keys for this count.
    scoring : str
        As in :class:`~marlin_cy.moe.routing.Routing`.
    scoring_key : str or None
        The key for the scoring of a family that has several: "softmax" (after the selection) or "sigmoid".
    norm_topk_prob : bool or None
        Whether the weights of the selected experts are normalised; None if ``config.json`` decides.
    norm_default : bool
        The default for a ``config.json`` that does not decide.
    topk_method : str or None
        The default of the key ``topk_method``; None if the family has no groups of experts.
    scaling : str or None
        The key for the factor of all weights.
    scaling_default : float
        The default of that key.
    average_key : str or None
        The key that says whether routed experts and shared expert are added or averaged: "sum" or "average".
    activation : str or None
        The experts' activation; None if ``hidden_act`` of ``config.json`` decides.
    limits : tuple of (str, float)
        Keys of ``config.json`` with the number that the activation has built in, which is also the default. Other
        numbers are refused.
    refused : tuple of (str, object)
        Keys of ``config.json`` with the only value that is supported, which is also the default.
    weight_on_input : bool
        Whether a token's weight multiplies the token, not the expert's output.
    routes : bool
        Whether this row describes the routing. Otherwise only the experts can be loaded.
    """

    name: str
    block: str = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str = "gate_up_proj"
    interleaved: bool = False
    router: str = "gate"
    router_norm: bool = False
    router_scale: str | None = None
    expert_scale: str | None = None
    correction: str | None = None
    correction_key: str | None = None
    shared_expert: str | None = None
    shared_gate: str | None = None
    shared_names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    aliases: tuple[Mapping[str, Any], ...] = ()
    intermediate_size: str = "moe_intermediate_size"
    shared_width: str | None = None
    shared_count: tuple[str, ...] = ("n_shared_experts", "num_shared_experts")
    scoring: str = "softmax"
    scoring_key: str | None = None
    norm_topk_prob: bool | None = None
    norm_default: bool = False
    topk_method: str | None = None
    scaling: str | None = None
    scaling_default: float = 1.0
    average_key: str | None = None
    activation: str | None = None
    limits: tuple[tuple[str, float], ...] = ()
    refused: tuple[tuple[str, object], ...] = ()
    weight_on_input: bool = False
    routes: bool = True

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The names of an expert's linear layers: gate if there is one, up and down."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def spellings(self) -> tuple[Family, ...]:
        """This family under each set of names, its own first."""
        return (self, *(replace(self, **alias) for alias in self.aliases))


MODULE_EXPERTS: Mapping[str, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""The names of an expert's layers in transformers, as llm-compressor and GPTQModel write them."""

GATED_SHARED = Family(
    "Qwen2-MoE",
    shared_expert="shared_expert",
    shared_gate="shared_expert_gate",
    shared_width="shared_expert_intermediate_size",
)
QWEN3_NEXT = replace(GATED_SHARED, name="Qwen3-Next", norm_default=True)
QWEN3_5 = replace(GATED_SHARED, name="Qwen3.5-MoE", norm_topk_prob=True)
QWEN3_VL = Family("Qwen3-VL-MoE", norm_topk_prob=True)
QWEN4_EXP = replace(GATED_SHARED, name="Qwen4-Exp", norm_default=True)

MIXTRAL = Family(
    "Mixtral",
    block="block_sparse_moe",
    gate="w1",
    up="w3",
    down="w2",
    aliases=({"block": "mlp", **MODULE_EXPERTS},),
    intermediate_size="intermediate_size",
    norm_topk_prob=True,
)

DEEPSEEK_V2 = Family(
    "DeepSeek-V2",
    shared_expert="shared_experts",
    norm_topk_prob=False,
    topk_method="greedy",
    scaling="routed_scaling_factor",
)
DEEPSEEK_V3 = Family(
    "DeepSeek-V3",
    correction="gate.e_score_correction_bias",
    shared_expert="shared_experts",
    scoring="sigmoid",
    norm_default=True,
    topk_method="noaux_tc",
    scaling="routed_scaling_factor",
)
GLM4 = replace(DEEPSEEK_V3, name="GLM-4.5-MoE")

GEMMA4 = Family(
    "Gemma-4",
    block="",
    router="router.proj",
    router_norm=True,
    router_scale="router.scale",
    expert_scale="router.per_expert_scale",
    norm_topk_prob=True,
)
MINIMAX_M2 = replace(
    MIXTRAL,
    name="MiniMax-M2",
    correction="e_score_correction_bias",
    scoring="sigmoid",
)
MINIMAX_M3 = Family(
    "MiniMax-M3",
    block="block_sparse_moe",
    gate="w1",
    up="w3",
    down="w2",
    correction="e_score_correction_bias",
    shared_expert="shared_experts",
    aliases=({"block": "mlp", "correction": "gate.e_score_correction_bias", **MODULE_EXPERTS},),
    intermediate_size="intermediate_size",
    shared_width="shared_intermediate_size",
    scoring="sigmoid",
    norm_topk_prob=True,
    scaling="routed_scaling_factor",
    scaling_default=2.0,
    activation="swigluoai",
    limits=(("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)),
)

LLAMA4 = Family(
    "Llama-4",
    block="feed_forward",
    router="router",
    shared_expert="shared_expert",
    intermediate_size="intermediate_size",
    shared_width="intermediate_size",
    scoring="sigmoid",
    norm_topk_prob=False,
    weight_on_input=True,
)

FAMILIES: Mapping[str, Family] = {
    "qwen2_moe": GATED_SHARED,
    "qwen3_moe": Family("Qwen3-MoE"),
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_moe": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5,
    "qwen3_vl_moe": QWEN3_VL,
    "qwen3_vl_moe_text": QWEN3_VL,
    "qwen4_exp": QWEN4_EXP,
    "qwen4_exp_text": QWEN4_EXP,
    "mixtral": MIXTRAL,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": replace(DEEPSEEK_V3, name="DeepSeek-V3.2"),
    "deepseek_v4": Family(
        "DeepSeek-V4",
        block="ffn",
        gate="w1",
        up="w3",
        down="w2",
        correction="gate.bias",
        shared_expert="shared_experts",
        shared_names=("w1", "w3", "w2"),
        aliases=(
            {"correction": "gate.e_score_correction_bias"},
            {
                "block": "mlp",
                "correction": "gate.e_score_correction_bias",
                "shared_names": ("gate_proj", "up_proj", "down_proj"),
                **MODULE_EXPERTS,
            },
        ),
        scoring="sqrt_softplus",
        norm_topk_prob=True,
        scaling="routed_scaling_factor",
        scaling_default=1.5,
        activation="silu_clamp10",
        limits=(("swiglu_limit", 10.0),),
    ),
    "kimi_k2": replace(DEEPSEEK_V3, name="Kimi-K2"),
    "kimi_k25": replace(DEEPSEEK_V3, name="Kimi-K2.5"),
    "kimi_linear": replace(
        DEEPSEEK_V3,
        name="Kimi-Linear",
        block="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
        aliases=({"block": "mlp", **MODULE_EXPERTS},),
        scaling_default=2.446,
    ),
    "glm4_moe": GLM4,
    "glm4_moe_lite": replace(DEEPSEEK_V3, name="GLM-4.7-Flash", scaling_default=1.8),
    "glm4v_moe": replace(GLM4, name="GLM-4.5V"),
    "glm4v_moe_text": replace(GLM4, name="GLM-4.5V"),
    "glm_moe_dsa": replace(DEEPSEEK_V3, name="GLM-5", scaling_default=2.5),
    "dots1": replace(DEEPSEEK_V3, name="dots.llm1", norm_default=False),
    "solar_open": replace(DEEPSEEK_V3, name="Solar-Open"),
    "exaone_moe": replace(
        DEEPSEEK_V3,
        name="EXAONE-MoE",
        correction="e_score_correction_bias",
        aliases=({"correction": "gate.e_score_correction_bias"},),
        scaling_default=2.5,
    ),
    "mimo_v2_flash": replace(DEEPSEEK_V3, name="MiMo-V2-Flash", shared_expert=None),
    "bailing_hybrid": replace(
        DEEPSEEK_V3,
        name="Ling-2.5",
        correction="gate.expert_bias",
        aliases=({"correction": "gate.e_score_correction_bias"},),
        scaling_default=2.5,
    ),
    "mistral4": replace(DEEPSEEK_V3, name="Mistral-4", correction=None, scoring="softmax"),
    "gemma4": GEMMA4,
    "gemma4_text": GEMMA4,
    "minimax_m2": MINIMAX_M2,
    "minimax_m3_vl": MINIMAX_M3,
    "minimax_m3_vl_text": MINIMAX_M3,
    "laguna": Family(
        "Laguna",
        correction="experts.e_score_correction_bias",
        shared_expert="shared_expert",
        aliases=({"correction": "gate.e_score_correction_bias", "shared_expert": "shared_experts"},),
        shared_width="shared_expert_intermediate_size",
        scoring="sigmoid",
        norm_topk_prob=True,
        scaling="moe_routed_scaling_factor",
        refused=(("moe_router_logit_softcapping", 0.0), ("moe_apply_router_weight_on_input", False)),
    ),
    "olmoe": Family("OLMoE", intermediate_size="intermediate_size"),
    "cohere2_moe": Family(
        "Command-MoE",
        shared_expert="shared_experts",
        intermediate_size="intermediate_size",
        norm_default=True,
        scoring_key="expert_selection_fn",
        average_key="shared_expert_combination_strategy",
    ),
    "hy_v3": Family(
        "Hunyuan-3",
        router="router.gate",
        correction="expert_bias",
        shared_expert="shared_mlp",
        aliases=({"router": "gate", "correction": "e_score_correction_bias", "shared_expert": "shared_experts"},),
        scoring="sigmoid",
        norm_topk_prob=True,
        scaling="router_scaling_factor",
        scaling_default=2.826,
    ),
    "afmoe": Family(
        "Trinity",
        router="router.gate",
        correction="expert_bias",
        shared_expert="shared_experts",
        scoring="sigmoid",
        norm_topk_prob=True,
        scaling="route_scale",
    ),
    "lfm2_moe": Family(
        "LFM2-MoE",
        block="feed_forward",
        gate="w1",
        up="w3",
        down="w2",
        correction="expert_bias",
        correction_key="use_expert_bias",
        aliases=(MODULE_EXPERTS,),
        scoring="sigmoid",
        norm_default=True,
        scaling="routed_scaling_factor",
    ),
    "hunyuan_v1_moe": Family(
        "Hunyuan-A13B",
        router="gate.wg",
        shared_expert="shared_mlp",
        intermediate_size="intermediate_size",
        shared_width="intermediate_size",
        norm_topk_prob=True,
    ),
    "ernie4_5_moe": Family(
        "ERNIE-4.5-MoE",
        correction="moe_statics.e_score_correction_bias",
        shared_expert="shared_experts",
        aliases=({"correction": "gate.moe_statics.e_score_correction_bias"},),
        shared_count=("moe_num_shared_experts",),
        norm_topk_prob=True,
    ),
    "jamba": Family(
        "Jamba",
        block="feed_forward",
        router="router",
        intermediate_size="intermediate_size",
        norm_topk_prob=False,
    ),
    "phimoe": replace(
        MIXTRAL,
        name="Phi-3.5-MoE",
        aliases=({"block": "mlp", "router": "router", **MODULE_EXPERTS},),
        scoring="sparsemixer",
    ),
    "nemotron_h": replace(
        DEEPSEEK_V3,
        name="Nemotron-H",
        block="mixer",
        gate=None,
        shared_names=("up_proj", "down_proj"),
        shared_width="moe_shared_expert_intermediate_size",
        refused=(("moe_latent_size", None),),
    ),
    "llama4": LLAMA4,
    "llama4_text": LLAMA4,
    "gpt_oss": Family(
        "gpt-oss",
        interleaved=True,
        router="router",
        intermediate_size="intermediate_size",
        scoring="softmax_topk",
        norm_topk_prob=True,
        activation="swigluoai",
        limits=(("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)),
    ),
}
"""The supported model families, by ``model_type`` of ``config.json``.

Source: transformers, ``models/*/modeling_*.py`` and ``conversion_mapping.py``.
"""

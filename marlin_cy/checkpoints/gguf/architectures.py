"""The architectures of GGUF files: which family each is, and what its tensors are called there.

A row of :data:`ARCHITECTURES` has the family's ``model_type``, the function that reads the configuration, and the names
of a layer's tensors. A name means a module of the family, or a function that makes views of what is stored. Names in
braces are attributes of :class:`~marlin_cy.checkpoints.families.Family`. Source: llama.cpp, ``conversion/*.py``,
``src/models/*.cpp``; ``gguf``, ``tensor_mapping.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from marlin_cy.checkpoints.gguf import config as settings
from marlin_cy.checkpoints.gguf import views
from marlin_cy.checkpoints.gguf.metadata import Metadata
from marlin_cy.checkpoints.gguf.views import Target
from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.json_fields import JsonObject

__all__ = ["ARCHITECTURES", "Architecture", "find_architecture"]


@dataclass(frozen=True)
class Architecture:
    """An architecture.

    Attributes
    ----------
    model_type : str
        A key of :data:`~marlin_cy.checkpoints.families.FAMILIES`, unless ``read`` gives another one.
    read : callable
        ``read(metadata)`` is the configuration.
    names : mapping
        What each tensor of a layer is: ``"attn_q"`` for ``blk.N.attn_q.weight`` and ``blk.N.attn_q.bias``, or the whole
        name of a single tensor.
    one_centred : bool
        Whether the family stores the factor of the last norm less 1.
    """

    model_type: str
    read: Callable[[Metadata], JsonObject]
    names: Mapping[str, Target]
    one_centred: bool = False


ATTENTION: Mapping[str, Target] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": views.fused_attention,
    "attn_output": "self_attn.o_proj",
}

HEAD_NORMS: Mapping[str, Target] = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

FFN_NORM: Mapping[str, Target] = {"ffn_norm": "post_attention_layernorm"}
POST_NORM: Mapping[str, Target] = {"post_attention_norm": "post_attention_layernorm"}

DENSE_FFN: Mapping[str, Target] = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}

EXPERTS: Mapping[str, Target] = {
    "ffn_gate_inp": "{block}.{router}",
    "ffn_gate_exps": "{block}.experts.{gate}",
    "ffn_up_exps": "{block}.experts.{up}",
    "ffn_down_exps": "{block}.experts.{down}",
    "ffn_gate_up_exps": "{block}.experts.{gate_up}",
}

SHARED_EXPERT: Mapping[str, Target] = {
    "ffn_gate_shexp": "{block}.{shared_expert}.{gate}",
    "ffn_up_shexp": "{block}.{shared_expert}.{up}",
    "ffn_down_shexp": "{block}.{shared_expert}.{down}",
}

SHARED_GATE: Mapping[str, Target] = {"ffn_gate_inp_shexp": views.shared_gate}

CORRECTION_BIAS: Mapping[str, Target] = {
    "exp_probs_b.bias": views.correction_bias,
    "exp_probs_b": views.correction_bias,
}

LATENT: Mapping[str, Target] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b.weight": views.key_value_up,
    "attn_v_b.weight": views.part_of_key_value_up,
    "attn_output": "self_attn.o_proj",
}

LINEAR_ATTENTION: Mapping[str, Target] = {
    "attn_qkv.weight": views.delta_qkv,
    "attn_gate.weight": views.delta_z,
    "ssm_in.weight": views.delta_qkv_z,
    "ssm_ba.weight": views.delta_b_a,
    "ssm_beta.weight": views.delta_b,
    "ssm_alpha.weight": views.delta_a,
    "ssm_conv1d.weight": views.delta_conv,
    "ssm_dt.bias": views.delta_dt_bias,
    "ssm_a": views.delta_a_log,
    "ssm_norm.weight": "linear_attn.norm",
    "ssm_out.weight": views.delta_out,
}
"""Of layers with linear attention, but for ``attn_qkv``, which other layers may have too."""

ONE_CENTRED: Mapping[str, Target] = {
    "attn_norm": views.one_centred("input_layernorm"),
    "attn_q_norm": views.one_centred("self_attn.q_norm"),
    "attn_k_norm": views.one_centred("self_attn.k_norm"),
    "post_attention_norm": views.one_centred("post_attention_layernorm"),
}

QWEN3_NEXT = Architecture(
    "qwen3_5_moe_text",
    settings.qwen3next,
    {**ATTENTION, **LINEAR_ATTENTION, **ONE_CENTRED, **DENSE_FFN, **EXPERTS, **SHARED_EXPERT, **SHARED_GATE},
    one_centred=True,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen2moe": Architecture(
        "qwen2_moe",
        settings.qwen2moe,
        {**ATTENTION, **FFN_NORM, **DENSE_FFN, **EXPERTS, **SHARED_EXPERT, **SHARED_GATE},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe", settings.qwen3moe, {**ATTENTION, **HEAD_NORMS, **FFN_NORM, **DENSE_FFN, **EXPERTS}
    ),
    "qwen3next": QWEN3_NEXT,
    "qwen35moe": QWEN3_NEXT,
    "llama": Architecture(
        "mixtral",
        settings.mixtral,
        {
            **ATTENTION,
            **FFN_NORM,
            **EXPERTS,
            "attn_q": views.pairs_apart("self_attn.q_proj", "num_attention_heads"),
            "attn_k": views.pairs_apart("self_attn.k_proj", "num_key_value_heads"),
        },
    ),
    "deepseek2": Architecture(
        "deepseek_v2",
        settings.deepseek2,
        {**LATENT, **FFN_NORM, **DENSE_FFN, **EXPERTS, **SHARED_EXPERT, **CORRECTION_BIAS},
    ),
    "glm4moe": Architecture(
        "glm4_moe",
        settings.glm4moe,
        {**ATTENTION, **HEAD_NORMS, **POST_NORM, **DENSE_FFN, **EXPERTS, **SHARED_EXPERT, **CORRECTION_BIAS},
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        settings.gpt_oss,
        {**ATTENTION, **POST_NORM, **EXPERTS, "attn_sinks.weight": views.sinks},
    ),
}
"""The architectures, by ``general.architecture``."""


def find_architecture(fields: Metadata) -> Architecture:
    """The row of :data:`ARCHITECTURES` for a file.

    Raises
    ------
    UnsupportedError
        There is no such row.
    """
    if fields.architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{fields.header.files[0]}: general.architecture {fields.architecture!r}, supported: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[fields.architecture]

"""Model families: the names of a family's modules, and its routing, which its configuration describes.

A family is a row of :data:`FAMILIES`; ``docs/adding-a-family.md`` says how to add one. The names are the ones
in checkpoints, which quantisers keep. The classes of transformers may use other names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import JsonObject, StrPath, finite, optional, positive

__all__ = ["FAMILIES", "Family", "MoeSpec", "find_family", "find_moe_layers", "read_moe_spec", "text_config"]

ACTIVATION_OF = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""The activation of each ``hidden_act``."""

GROUP_SCORE_OF = {"greedy": None, "group_limited_greedy": "max", "noaux_tc": "top2_sum"}
"""How each ``topk_method`` of DeepSeek's configurations scores groups of experts; None if it has no groups."""


@dataclass(frozen=True)
class Family:
    """The names of a model family's modules, and its routing.

    Attributes
    ----------
    name : str
    block : str
        The name of the MoE block in a layer: ``"mlp"``.
    gate, up, down : str
        The names of an expert's linear layers.
    gate_up : str
        The name of the tensor that holds gate and up of all experts, in checkpoints that have such a tensor.
    interleaved : bool
        Whether columns of gate and up alternate in that tensor. Otherwise all of gate comes before all of up.
    router : str
        The name of the router in the block.
    shared_expert, shared_gate : str or None
        The names of the shared expert in the block, and of the linear layer with one output that weights it.
    intermediate_size : str
        The key of ``config.json`` for an expert's width.
    scoring : str
        As in :class:`~marlin_cy.moe.routing.Routing`.
    norm_topk_prob : bool or None
        Whether the weights of the selected experts are normalised; None if ``config.json`` decides.
    norm_default : bool
        The default for a ``config.json`` that does not decide.
    topk_method : str or None
        The default of the key ``topk_method``, a key of :data:`GROUP_SCORE_OF`; None if the family has no such key.
    activation : str or None
        The experts' activation; None if ``hidden_act`` of ``config.json`` decides.
    """

    name: str
    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str = "gate_up_proj"
    interleaved: bool = False
    router: str = "gate"
    shared_expert: str | None = None
    shared_gate: str | None = None
    intermediate_size: str = "moe_intermediate_size"
    scoring: str = "softmax"
    norm_topk_prob: bool | None = None
    norm_default: bool = False
    topk_method: str | None = None
    activation: str | None = None


QWEN3_5 = Family("Qwen3.5-MoE", shared_expert="shared_expert", shared_gate="shared_expert_gate", norm_topk_prob=True)

FAMILIES = {
    "qwen2_moe": Family("Qwen2-MoE", shared_expert="shared_expert", shared_gate="shared_expert_gate"),
    "qwen3_moe": Family("Qwen3-MoE"),
    "qwen3_next": Family(
        "Qwen3-Next", shared_expert="shared_expert", shared_gate="shared_expert_gate", norm_default=True
    ),
    "qwen3_5_moe": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5,
    "mixtral": Family(
        "Mixtral",
        block="block_sparse_moe",
        gate="w1",
        up="w3",
        down="w2",
        intermediate_size="intermediate_size",
        norm_topk_prob=True,
    ),
    "deepseek_v2": Family("DeepSeek-V2", shared_expert="shared_experts", norm_topk_prob=False, topk_method="greedy"),
    "deepseek_v3": Family(
        "DeepSeek-V3", shared_expert="shared_experts", scoring="sigmoid", norm_default=True, topk_method="noaux_tc"
    ),
    "glm4_moe": Family(
        "GLM-4.5-MoE", shared_expert="shared_experts", scoring="sigmoid", norm_default=True, topk_method="noaux_tc"
    ),
    "gpt_oss": Family(
        "gpt-oss",
        interleaved=True,
        router="router",
        intermediate_size="intermediate_size",
        scoring="softmax_topk",
        norm_topk_prob=True,
        activation="swigluoai",
    ),
}
"""The supported model families, by ``model_type`` of ``config.json``.

Source: transformers, ``models/*/modeling_*.py`` and ``conversion_mapping.py``.
"""


@dataclass(frozen=True)
class MoeSpec:
    """The sizes and the routing of a model's MoE layers. All MoE layers of a model are the same.

    Attributes
    ----------
    num_experts, top_k : int
    hidden_size, intermediate_size : int
        Width of the model, and of one expert.
    shared_intermediate_size : int or None
        Width of the shared expert, if there is one.
    norm_topk_prob : bool
        Whether the weights of the selected experts are scaled to sum to one.
    activation : str
        A key of :data:`~marlin_cy.activations.ACTIVATIONS`.
    scoring, num_groups, topk_groups, group_score, routed_scaling_factor
        As in :class:`~marlin_cy.moe.routing.Routing`.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    shared_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    activation: str = "silu"
    scoring: str = "softmax"
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    routed_scaling_factor: float = 1.0

    def routing(self) -> dict[str, Any]:
        """The keyword arguments of :class:`~marlin_cy.moe.routing.Routing` that all layers share."""
        names = (
            "norm_topk_prob",
            "scoring",
            "num_groups",
            "topk_groups",
            "group_score",
            "routed_scaling_factor",
        )
        return {name: getattr(self, name) for name in names}


def text_config(config: JsonObject, file: StrPath) -> JsonObject:
    """The part of a configuration that describes the language model: its ``text_config`` if it has one, else all."""
    found: JsonObject = optional(config, ("text_config",), dict, file, default=config)
    return found


def find_family(config: JsonObject, file: StrPath) -> Family:
    """The row of :data:`FAMILIES` for ``model_type``.

    Raises
    ------
    UnsupportedError
        There is no such row.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(
            f"{file}: model_type {model_type!r}, supported: {', '.join(FAMILIES)}; they have tensors named "
            f"{', '.join(tensor_patterns())}"
        )
    return FAMILIES[model_type]


def tensor_patterns() -> list[str]:
    """The patterns of experts' names in all families, each once."""
    patterns = dict.fromkeys(
        f"model.layers.N.{family.block}.experts."
        + (
            f"{{{family.gate_up},{family.down}}}"
            if family.interleaved
            else f"N.{{{family.gate},{family.up},{family.down}}}"
        )
        for family in FAMILIES.values()
    )
    return list(patterns)


def read_moe_spec(config: JsonObject, family: Family, file: StrPath) -> MoeSpec:
    """The :class:`MoeSpec` of a configuration of this family.

    Raises
    ------
    CheckpointError, UnsupportedError
        A value is missing, invalid or not supported.
    """
    norm_topk_prob = family.norm_topk_prob
    if norm_topk_prob is None:
        norm_topk_prob = optional(config, ("norm_topk_prob",), bool, file, default=family.norm_default)
    elif (
        family.topk_method
        and optional(config, ("norm_topk_prob",), bool, file, default=norm_topk_prob) != norm_topk_prob
    ):
        raise UnsupportedError(f"{file}: norm_topk_prob {not norm_topk_prob} is not supported for {family.name}")
    # transformers 5 writes num_local_experts for every family.
    num_experts = positive(config, ("num_experts", "num_local_experts", "n_routed_experts"), file)
    intermediate_size = positive(config, (family.intermediate_size,), file)
    num_groups, topk_groups, group_score = _groups(config, family, file)
    spec = MoeSpec(
        num_experts=num_experts,
        top_k=positive(config, ("num_experts_per_tok", "experts_per_token"), file),
        hidden_size=positive(config, ("hidden_size",), file),
        intermediate_size=intermediate_size,
        shared_intermediate_size=_shared_size(config, family, intermediate_size, file),
        norm_topk_prob=norm_topk_prob,
        activation=_activation(config, family, file),
        scoring=_scoring(config, family, file),
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_score=group_score,
        routed_scaling_factor=finite(config, "routed_scaling_factor", file, 1.0) if family.topk_method else 1.0,
    )
    if spec.top_k > num_experts:
        raise CheckpointError(
            f"num_experts_per_tok: got {spec.top_k}, expected at most the number of experts, {num_experts}", file=file
        )
    return spec


def _groups(config: JsonObject, family: Family, file: StrPath) -> tuple[int, int, str]:
    """``(num_groups, topk_groups, group_score)``."""
    method = family.topk_method and optional(config, ("topk_method",), str, file, default=family.topk_method)
    if method is None:
        return 1, 1, "max"
    if method not in GROUP_SCORE_OF:
        raise UnsupportedError(f"{file}: topk_method {method!r}, supported: {', '.join(GROUP_SCORE_OF)}")
    group_score = GROUP_SCORE_OF[method]
    if group_score is None:
        return 1, 1, "max"
    groups = positive(config, ("n_group",), file, default=1)
    chosen = positive(config, ("topk_group",), file, default=1)
    experts = positive(config, ("num_experts", "num_local_experts", "n_routed_experts"), file)
    if experts % groups or chosen > groups:
        raise CheckpointError(
            f"n_group, topk_group: got {groups} and {chosen}, expected n_group to divide {experts}, and topk_group "
            "of at most n_group",
            file=file,
        )
    return groups, chosen, group_score


def _scoring(config: JsonObject, family: Family, file: StrPath) -> str:
    if family.topk_method is None:
        return family.scoring
    scoring = optional(config, ("scoring_func",), str, file, default=family.scoring)
    if scoring != family.scoring:
        raise UnsupportedError(f"{file}: scoring_func {scoring!r}, {family.name} has {family.scoring!r}")
    return scoring


def _activation(config: JsonObject, family: Family, file: StrPath) -> str:
    name = optional(config, ("hidden_act",), str, file, default="silu")
    if family.activation is None:
        if name not in ACTIVATION_OF:
            raise UnsupportedError(f"{file}: hidden_act {name!r}, supported: {', '.join(ACTIVATION_OF)}")
        return ACTIVATION_OF[name]
    for key, expected in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        value = finite(config, key, file, expected)
        if value != expected:
            raise UnsupportedError(f"{file}: {key} {value}, only {expected} is supported")
    return family.activation


def _shared_size(config: JsonObject, family: Family, intermediate_size: int, file: StrPath) -> int | None:
    """Width of the shared expert; None if the model has none."""
    if family.shared_expert is None:
        return None
    if family.shared_gate is not None:
        size = optional(config, ("shared_expert_intermediate_size",), int, file, default=0)
    else:
        size = intermediate_size * optional(config, ("n_shared_experts",), int, file, default=0)
    if size < 0:
        raise CheckpointError(f"the shared expert's width: got {size}, expected 0 or more", file=file)
    return size or None


def find_moe_layers(config: JsonObject, num_tensors: int, file: StrPath) -> list[int]:
    """The numbers of the MoE layers, by the keys of Qwen's and DeepSeek's configurations, as transformers reads them.

    Parameters
    ----------
    config : dict
    num_tensors : int
        An upper bound of the number of layers, so that an invalid ``num_hidden_layers`` is refused.
    file : path-like
        For messages.
    """
    num_layers = positive(config, ("num_hidden_layers",), file)
    if num_layers > num_tensors:
        raise CheckpointError(f"num_hidden_layers: got {num_layers}, but there are {num_tensors} tensors", file=file)
    step = positive(config, ("decoder_sparse_step",), file, default=1)
    frequency = positive(config, ("moe_layer_freq",), file, default=1)
    first = optional(config, ("first_k_dense_replace",), int, file, default=0)
    dense: list[Any] = optional(config, ("mlp_only_layers",), list, file, default=[])
    return [
        layer
        for layer in range(num_layers)
        if layer >= first and layer % frequency == 0 and (layer + 1) % step == 0 and layer not in dense
    ]

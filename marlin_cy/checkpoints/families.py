"""What ``config.json`` says about a model's MoE layers: their family, sizes and routing, and which layers they are.

A family is a row of :data:`~marlin_cy.checkpoints.family_rows.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marlin_cy.activations import ACTIVATIONS
from marlin_cy.checkpoints.argument_errors import as_checkpoint_error
from marlin_cy.checkpoints.family_rows import FAMILIES, Family
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import JsonObject, StrPath, finite, optional, positive
from marlin_cy.moe.routing import Routing

__all__ = [
    "FAMILIES",
    "Family",
    "MoeSpec",
    "block_prefix",
    "count_layers",
    "find_family",
    "find_moe_layers",
    "has_row",
    "read_moe_spec",
    "text_config",
]

ACTIVATION_OF = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}
"""The activation of each ``hidden_act``."""

ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "mlp_hidden_act")
NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""transformers 5 writes num_local_experts for every family."""

TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
)
NORM_KEYS = ("norm_topk_prob", "moe_renormalize")
GROUP_KEYS = ("n_group", "num_expert_group")
SCORING_KEYS = ("scoring_func", "score_func", "score_function", "moe_router_activation_func")
SCORING_OF = {"sqrtsoftplus": "sqrt_softplus"}
"""The scoring of each value of these keys, where the names differ."""

LAYER_KINDS_KEYS = ("mlp_layer_types", "layers_block_type", "layer_types")
SPARSE = ("sparse", "moe", "hash_moe")
"""The entries of these lists that are layers with experts."""

GROUP_SCORE_OF = {"greedy": None, "group_limited_greedy": "max", "noaux_tc": "top2_sum"}
"""How each ``topk_method`` of DeepSeek's configurations scores groups of experts; None if it has no groups."""


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
    scoring, num_groups, topk_groups, group_score, routed_scaling_factor, mixer_jitter
        As in :class:`~marlin_cy.moe.routing.Routing`.
    averaged : bool
        Whether the layer's output is the mean of routed experts and shared expert, not their sum.
    weight_on_input : bool
        Whether a token's weight multiplies the token, not the expert's output.
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
    mixer_jitter: float = 0.0
    averaged: bool = False
    weight_on_input: bool = False

    def routing(self) -> dict[str, Any]:
        """The keyword arguments of :class:`~marlin_cy.moe.routing.Routing` that all layers share."""
        names = (
            "norm_topk_prob",
            "scoring",
            "num_groups",
            "topk_groups",
            "group_score",
            "routed_scaling_factor",
            "mixer_jitter",
        )
        return {name: getattr(self, name) for name in names}


def text_config(config: JsonObject, file: StrPath) -> JsonObject:
    """The part of a configuration that describes the language model: its ``text_config`` if it has one, else all."""
    found: JsonObject = optional(config, ("text_config",), dict, file, default=config)
    return found


def has_row(config: JsonObject, file: StrPath) -> bool:
    """Whether :func:`find_family` finds a row."""
    types = config.get("model_type"), text_config(config, file).get("model_type")
    return any(isinstance(name, str) and name in FAMILIES for name in types)


def find_family(config: JsonObject, file: StrPath) -> Family:
    """The row of :data:`FAMILIES` for ``model_type``, or for that of ``text_config``.

    Raises
    ------
    UnsupportedError
        There is no such row.
    """
    model_type, inner = config.get("model_type"), text_config(config, file).get("model_type")
    for name in (model_type, inner):
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
    raise UnsupportedError(
        f"{file}: model_type {model_type!r}, supported: {', '.join(FAMILIES)}; they have tensors named "
        f"{', '.join(tensor_patterns())}"
    )


def tensor_patterns() -> list[str]:
    """The patterns of experts' names in all families, each once."""
    patterns = dict.fromkeys(
        f"model.layers.N.{block_prefix(spelling)}experts."
        + (
            f"{{{spelling.gate_up},{spelling.down}}}"
            if spelling.interleaved
            else f"N.{{{','.join(spelling.expert_names)}}}"
        )
        for family in FAMILIES.values()
        for spelling in family.spellings
    )
    return list(patterns)


def block_prefix(family: Family) -> str:
    """The beginning of names in a layer's MoE block: ``"mlp."``, or ``""`` if there is no block."""
    return f"{family.block}." if family.block else ""


def read_moe_spec(config: JsonObject, family: Family, file: StrPath) -> MoeSpec:
    """The :class:`MoeSpec` of a configuration of this family.

    Raises
    ------
    CheckpointError, UnsupportedError
        A value is missing, invalid or not supported.
    """
    for key, supported in family.refused:
        value = config.get(key)
        if value is not None and value != supported:
            raise UnsupportedError(f"{file}: {key} {value!r} is not supported for {family.name}")
    num_experts = _size(config, NUM_EXPERTS_KEYS, file)
    intermediate_size = _size(config, (family.intermediate_size,), file)
    num_groups, topk_groups, group_score = _groups(config, family, num_experts, file)
    shared_size = _shared_size(config, family, intermediate_size, file)
    averaged = shared_size is not None and _averaged(config, family, file)
    factor = 1.0 if family.scaling is None else finite(config, family.scaling, file, family.scaling_default)
    spec = MoeSpec(
        num_experts=num_experts,
        top_k=_size(config, TOP_K_KEYS, file),
        hidden_size=positive(config, ("hidden_size",), file),
        intermediate_size=intermediate_size,
        shared_intermediate_size=shared_size,
        norm_topk_prob=_norm_topk_prob(config, family, file),
        activation=_activation(config, family, file),
        scoring=_scoring(config, family, file),
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_score=group_score,
        routed_scaling_factor=factor / 2 if averaged else factor,
        mixer_jitter=finite(config, "router_jitter_noise", file, 0.01) if family.scoring == "sparsemixer" else 0.0,
        averaged=averaged,
        weight_on_input=family.weight_on_input,
    )
    if spec.top_k > num_experts:
        raise CheckpointError(
            f"num_experts_per_tok: got {spec.top_k}, expected at most the number of experts, {num_experts}", file=file
        )
    with as_checkpoint_error(file):
        Routing(num_experts, spec.top_k, **spec.routing())
    if spec.weight_on_input and spec.top_k != 1:
        raise UnsupportedError(f"{file}: {spec.top_k} experts for each token, {family.name} supports 1")
    return spec


def _size(config: JsonObject, names: tuple[str, ...], file: StrPath) -> int:
    """A positive number, which may be written as a list with one entry for each layer if all are equal."""
    numbers = dict(config)
    for name in names:
        value = config.get(name)
        if isinstance(value, list) and value:
            if any(entry != value[0] for entry in value):
                raise UnsupportedError(f"{file}: {name}: got {value}, layers that differ are not supported")
            numbers[name] = value[0]
    return positive(numbers, names, file)


def _norm_topk_prob(config: JsonObject, family: Family, file: StrPath) -> bool:
    always = family.norm_topk_prob
    given = optional(config, NORM_KEYS, bool, file)
    if always is None:
        return family.norm_default if given is None else given
    if family.topk_method and given is not None and given != always:
        raise UnsupportedError(f"{file}: norm_topk_prob {given} is not supported for {family.name}")
    return always


def _averaged(config: JsonObject, family: Family, file: StrPath) -> bool:
    if family.average_key is None:
        return False
    found = optional(config, (family.average_key,), str, file, default="average")
    if found not in ("sum", "average"):
        raise UnsupportedError(f"{file}: {family.average_key} {found!r}, supported: sum, average")
    return found == "average"


def _groups(config: JsonObject, family: Family, experts: int, file: StrPath) -> tuple[int, int, str]:
    """``(num_groups, topk_groups, group_score)``."""
    method = family.topk_method and optional(config, ("topk_method",), str, file, default=family.topk_method)
    if method is None:
        return 1, 1, "max"
    if method not in GROUP_SCORE_OF:
        raise UnsupportedError(f"{file}: topk_method {method!r}, supported: {', '.join(GROUP_SCORE_OF)}")
    group_score = GROUP_SCORE_OF[method]
    if group_score is None:
        return 1, 1, "max"
    groups = positive(config, GROUP_KEYS, file, default=1)
    chosen = positive(config, ("topk_group",), file, default=1)
    if experts % groups or chosen > groups:
        raise CheckpointError(
            f"n_group, topk_group: got {groups} and {chosen}, expected n_group to divide {experts}, and topk_group "
            "of at most n_group",
            file=file,
        )
    return groups, chosen, group_score


def _scoring(config: JsonObject, family: Family, file: StrPath) -> str:
    if family.scoring_key is not None:
        found = optional(config, (family.scoring_key,), str, file, default=family.scoring)
        if found not in ("softmax", "sigmoid"):
            raise UnsupportedError(f"{file}: {family.scoring_key} {found!r}, supported: softmax, sigmoid")
        return "softmax_topk" if found == "softmax" else found
    found = optional(config, SCORING_KEYS, str, file, default=family.scoring)
    if SCORING_OF.get(found, found) != family.scoring:
        raise UnsupportedError(f"{file}: scoring_func {found!r}, {family.name} has {family.scoring!r}")
    return family.scoring


def _activation(config: JsonObject, family: Family, file: StrPath) -> str:
    name = optional(config, ACTIVATION_KEYS, str, file, default="silu")
    if family.activation is None:
        found = ACTIVATION_OF.get(name)
        if found is None or ACTIVATIONS[found].gated == (family.gate is None):
            supported = [name for name, row in ACTIVATION_OF.items() if ACTIVATIONS[row].gated != (family.gate is None)]
            raise UnsupportedError(f"{file}: hidden_act {name!r}, supported: {', '.join(supported)}")
        return found
    for key, expected in family.limits:
        value = finite(config, key, file, expected)
        if value != expected:
            raise UnsupportedError(f"{file}: {key} {value}, only {expected} is supported")
    return family.activation


def _shared_size(config: JsonObject, family: Family, intermediate_size: int, file: StrPath) -> int | None:
    """Width of the shared expert; None if the model has no shared expert."""
    if family.shared_expert is None:
        return None
    if family.shared_width is not None:
        size = optional(config, (family.shared_width,), int, file, default=0)
    else:
        size = intermediate_size * optional(config, family.shared_count, int, file, default=0)
    if size < 0:
        raise CheckpointError(f"the shared expert's width: got {size}, expected 0 or more", file=file)
    return size or None


def find_moe_layers(config: JsonObject, num_tensors: int, file: StrPath) -> list[int]:
    """The numbers of the MoE layers, by the keys of all families, as transformers reads them.

    Parameters
    ----------
    config : dict
    num_tensors : int
        An upper bound of the number of layers, so that an invalid ``num_hidden_layers`` is refused.
    file : path-like
        For messages.
    """
    num_layers = count_layers(config, file)
    if num_layers > num_tensors:
        raise CheckpointError(f"num_hidden_layers: got {num_layers}, but there are {num_tensors} tensors", file=file)
    if optional(config, ("enable_moe_block",), bool, file, default=True) is False:
        return []
    listed = _listed_layers(config, num_layers, file)
    return [layer for layer in range(num_layers) if _is_moe(config, layer, file)] if listed is None else listed


def count_layers(config: JsonObject, file: StrPath) -> int:
    """The number of layers; of a list of their kinds if ``num_hidden_layers`` is missing, as in Nemotron-H."""
    kinds = optional(config, ("layers_block_type",), list, file)
    pattern = optional(config, ("hybrid_override_pattern",), str, file)
    default = len(kinds or pattern or ()) or None
    return positive(config, ("num_hidden_layers",), file, default=default)


def _listed_layers(config: JsonObject, num_layers: int, file: StrPath) -> list[int] | None:
    """The MoE layers by a list in the configuration; None if there is none."""
    for key in LAYER_KINDS_KEYS:
        kinds: list[Any] | None = optional(config, (key,), list, file)
        if kinds is not None and any(kind in SPARSE for kind in kinds):
            _check_length(key, kinds, num_layers, file)
            return [layer for layer, kind in enumerate(kinds) if kind in SPARSE]
    pattern = optional(config, ("hybrid_override_pattern",), str, file)
    if pattern is not None:  # Nemotron-H's: a letter for each layer
        _check_length("hybrid_override_pattern", pattern, num_layers, file)
        return [layer for layer, letter in enumerate(pattern) if letter == "E"]
    frequencies = config.get("moe_layer_freq")
    if isinstance(frequencies, list):  # MiMo's: 1 for a layer with experts
        _check_length("moe_layer_freq", frequencies, num_layers, file)
        return [layer for layer, sparse in enumerate(frequencies) if sparse]
    numbers: list[Any] | None = optional(config, ("moe_layers",), list, file)
    if numbers is not None:
        if not all(isinstance(number, int) and 0 <= number < num_layers for number in numbers):
            raise CheckpointError(f"moe_layers: got {numbers}, expected numbers of the {num_layers} layers", file=file)
        return sorted(numbers)
    return None


def _check_length(key: str, entries: Sequence[Any], num_layers: int, file: StrPath) -> None:
    if len(entries) != num_layers:
        raise CheckpointError(f"{key}: got {len(entries)} entries, expected {num_layers}", file=file)


def _is_moe(config: Mapping[str, Any], layer: int, file: StrPath) -> bool:
    """Whether a layer has experts, by the keys of periods and bounds. A missing key excludes no layer."""
    dense: list[Any] = optional(config, ("mlp_only_layers",), list, file, default=[])
    first = optional(config, ("first_k_dense_replace",), int, file, default=0)
    first = max(first, optional(config, ("num_dense_layers",), int, file, default=0))
    first = max(first, optional(config, ("moe_layer_start_index",), int, file, default=0))
    last = optional(config, ("moe_layer_end_index",), int, file, default=-1)
    period = positive(config, ("expert_layer_period",), file, default=1)
    offset = optional(config, ("expert_layer_offset",), int, file, default=0)
    # The last layer of each run of this many layers.
    steps = [
        positive(config, (key,), file, default=1)
        for key in ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step")
    ]
    return (
        layer >= first
        and not 0 <= last < layer
        and layer % positive(config, ("moe_layer_freq",), file, default=1) == 0
        and all((layer + 1) % step == 0 for step in steps)
        and (layer - offset) % period == 0
        and layer not in dense
    )

"""What a checkpoint's JSON files say: how it was quantised, its family, the sizes of its MoE layers.

A model family is a row of :data:`FAMILIES`: where its experts are, and what its configuration calls things.
"""

from dataclasses import dataclass, fields

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats import gptq
from marlin_cy.moe.layer import ACTIVATIONS
from marlin_cy.safetensors_file import read_json

__all__ = [
    "FAMILIES",
    "Family",
    "MoeSpec",
    "QuantizationConfig",
    "find_family",
    "find_moe_layers",
    "read_moe_spec",
    "read_quantization",
]

METHODS = ("gptq",)


@dataclass(frozen=True)
class QuantizationConfig:
    """How the weights were quantised.

    Attributes
    ----------
    bits : int
        4.
    group_size : int
        As the checkpoint says it: -1 for one group of all of K.
    desc_act : bool
        True when the rows of K were quantised in another order; ``g_idx`` then says which group each is in.
    sym : bool
        True when all zero points are 8. Nothing depends on it: the zero points are always read.
    checkpoint_format : str
        ``"gptq"`` or ``"gptq_v2"``: what the stored zero points mean.
    """

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    checkpoint_format: str


@dataclass(frozen=True)
class MoeSpec:
    """The sizes of a model's MoE layers, the same in all of them.

    Attributes
    ----------
    num_experts, top_k : int
    hidden_size, intermediate_size : int
        Width of the model, and of one expert.
    norm_topk_prob : bool
        Whether the weights of the chosen experts are scaled to sum to one.
    activation : str
        Of the gate: ``"silu"``.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    norm_topk_prob: bool
    activation: str


@dataclass(frozen=True)
class Family:
    """Where a model family keeps its experts.

    Attributes
    ----------
    name : str
    expert : str
        Pattern of an expert's linear layers: ``{layer}``, ``{expert}``, ``{projection}``.
    gate, up, down : str
        What ``{projection}`` is for each.
    router : str
        Pattern of the router's weight.
    intermediate_size : str
        The key of ``config.json`` that holds an expert's width.
    norm_topk_prob : bool or None
        Whether the family scales the chosen experts' weights; None when ``config.json`` says.
    """

    name: str
    expert: str
    gate: str
    up: str
    down: str
    router: str
    intermediate_size: str
    norm_topk_prob: bool | None


def _qwen(name):
    return Family(
        name=name,
        expert="model.layers.{layer}.mlp.experts.{expert}.{projection}",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        router="model.layers.{layer}.mlp.gate.weight",
        intermediate_size="moe_intermediate_size",
        norm_topk_prob=None,
    )


FAMILIES = {
    "qwen2_moe": _qwen("Qwen2-MoE"),
    "qwen3_moe": _qwen("Qwen3-MoE"),
    "mixtral": Family(
        name="Mixtral",
        expert="model.layers.{layer}.block_sparse_moe.experts.{expert}.{projection}",
        gate="w1",
        up="w3",
        down="w2",
        router="model.layers.{layer}.block_sparse_moe.gate.weight",
        intermediate_size="intermediate_size",
        norm_topk_prob=True,
    ),
}
"""The model families known, by ``model_type`` of ``config.json``. Source: transformers, ``models/*/modeling_*.py``."""


def read_quantization(folder, config):
    """The :class:`QuantizationConfig` that one file or both give, in agreement."""
    file = folder / "quantize_config.json"
    found = [_parse_quantization(read_json(file), file)] if file.exists() else []
    if config.get("quantization_config") is not None:
        file = folder / "config.json"
        found.append(_parse_quantization(config["quantization_config"], file))
    if not found:
        raise CheckpointError("no quantize_config.json and no quantization_config in config.json", file=folder)
    first, last = found[0], found[-1]
    for name, value in first.items():
        if last.get(name, value) != value:
            raise CheckpointError(
                f"{name}: got {last[name]!r} in quantization_config, but quantize_config.json says {value!r}", file=file
            )
    merged = {"desc_act": False, "sym": True, "checkpoint_format": "gptq", **first, **last}
    for field in fields(QuantizationConfig):
        if field.name not in merged:
            raise CheckpointError(f"{field.name}: missing", file=file)
    return QuantizationConfig(**merged)


def _parse_quantization(config, file):
    """The fields of :class:`QuantizationConfig` that one JSON object gives."""
    if not isinstance(config, dict):
        raise CheckpointError(f"quantization_config: got {config!r}, expected an object", file=file)
    # AutoGPTQ, the first to write these files, names no method.
    method = _either(config, ("quant_method", "method"), str, file, default="gptq")
    if method not in METHODS:
        raise UnsupportedError(f"{file}: quantisation method {method!r}, supported: {', '.join(METHODS)}")
    values = {
        "bits": _either(config, ("bits",), int, file),
        "group_size": _either(config, ("group_size",), int, file),
        "desc_act": _either(config, ("desc_act",), bool, file),
        "sym": _either(config, ("sym",), bool, file),
        "checkpoint_format": _either(config, ("checkpoint_format", "format"), str, file),
    }
    values = {name: value for name, value in values.items() if value is not None}
    if values.get("bits", 4) != 4:
        raise UnsupportedError(f"{file}: bits: got {values['bits']}, only 4 is supported")
    if values.get("checkpoint_format", "gptq") not in gptq.ZERO_OFFSETS:
        raise UnsupportedError(
            f"{file}: checkpoint_format {values['checkpoint_format']!r}, supported: {', '.join(gptq.ZERO_OFFSETS)}"
        )
    return values


def find_family(config, file):
    """The row of :data:`FAMILIES` that ``model_type`` names."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(f"{file}: model_type {model_type!r}, supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def read_moe_spec(config, family, file):
    """The :class:`MoeSpec` that a configuration of this family gives."""
    norm_topk_prob = family.norm_topk_prob
    if norm_topk_prob is None:
        # transformers' default for the families that have the key.
        norm_topk_prob = _either(config, ("norm_topk_prob",), bool, file, default=False)
    spec = MoeSpec(
        # transformers 5 writes num_local_experts for every family.
        num_experts=_positive(config, ("num_experts", "num_local_experts"), file),
        top_k=_positive(config, ("num_experts_per_tok",), file),
        hidden_size=_positive(config, ("hidden_size",), file),
        intermediate_size=_positive(config, (family.intermediate_size,), file),
        norm_topk_prob=norm_topk_prob,
        activation=_either(config, ("hidden_act",), str, file, default="silu"),
    )
    if spec.activation not in ACTIVATIONS:
        raise UnsupportedError(f"{file}: hidden_act {spec.activation!r}, supported: {', '.join(ACTIVATIONS)}")
    if spec.top_k > spec.num_experts:
        raise CheckpointError(
            f"num_experts_per_tok: got {spec.top_k}, expected at most the number of experts, {spec.num_experts}",
            file=file,
        )
    return spec


def find_moe_layers(config, num_tensors, file):
    """The layers that are MoE layers, as transformers' Qwen models choose them; Mixtral has no such keys."""
    num_layers = _positive(config, ("num_hidden_layers",), file)
    if num_layers > num_tensors:
        raise CheckpointError(f"num_hidden_layers: got {num_layers}, but there are {num_tensors} tensors", file=file)
    step = _positive(config, ("decoder_sparse_step",), file, default=1)
    dense = _either(config, ("mlp_only_layers",), list, file, default=[])
    return [layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense]


def _positive(config, names, file, default=None):
    value = _either(config, names, int, file, default)
    if value is None:
        raise CheckpointError(f"{' or '.join(names)}: missing", file=file)
    if value <= 0:
        raise CheckpointError(f"{names[0]}: got {value}, expected a positive number", file=file)
    return value


def _either(config, names, kind, file, default=None):
    """The value that ``config`` has under any of ``names``, which are names for one thing."""
    given = {name: config[name] for name in names if config.get(name) is not None}
    for name, value in given.items():
        # bool is an int to Python, but not to JSON.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{name}: got {value!r}, expected {kind.__name__}", file=file)
    values = list(given.values())
    if any(value != values[0] for value in values):
        said = " and ".join(f"{name} {value!r}" for name, value in given.items())
        raise CheckpointError(f"got {said}, which contradict each other", file=file)
    return values[0] if values else default

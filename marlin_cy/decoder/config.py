"""``config.json`` as the decoder reads it: a :class:`DecoderConfig`, every field of which was checked.

Sizes and routing of Mixture-of-Experts blocks are not here, but in :class:`~marlin_cy.checkpoints.families.MoeSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from marlin_cy.checkpoints.families import text_config
from marlin_cy.decoder.architecture import Architecture, find_architecture
from marlin_cy.decoder.rope import RopeConfig, read_rope
from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.json_fields import JsonObject, StrPath, finite, optional, positive

__all__ = [
    "AttentionConfig",
    "DecoderConfig",
    "DeltaNetConfig",
    "LatentAttentionConfig",
    "read_decoder_config",
]

MAX_LAYERS = 4096
MAX_CONTEXT = 1 << 24
"""Positions. The tables of RoPE have a row for each."""

MAX_SIZE = (1 << 31) - 1
"""The largest number of heads, width or vocabulary that kernels can index."""

HEAD_DIM_STEP = 16
MAX_HEAD_DIM = 640
"""Widths of heads in the attention kernels: the values' is a multiple of the first, the keys' at most the second."""


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention.

    Attributes
    ----------
    num_heads, num_kv_heads, head_dim : int
    bias, output_bias : bool
        Whether the projections of queries, keys and values have biases, and the output projection.
    head_norm, sinks, gated : bool
        As in :class:`~marlin_cy.decoder.architecture.Architecture`.
    window : int or None
        The window of layers of type "sliding_attention".
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool
    output_bias: bool
    head_norm: bool
    sinks: bool
    gated: bool
    window: int | None


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention.

    Attributes
    ----------
    num_heads : int
    q_rank : int or None
        Width of the compressed queries; None if queries are not compressed.
    latent_dim, nope_dim, rope_dim, v_head_dim : int
    bias : bool
        Whether the projections to compressed queries, to latent rows, and the output projection have biases.
    """

    num_heads: int
    q_rank: int | None
    latent_dim: int
    nope_dim: int
    rope_dim: int
    v_head_dim: int
    bias: bool


@dataclass(frozen=True)
class DeltaNetConfig:
    """Gated DeltaNet: the sizes of :class:`~marlin_cy.decoder.plan.DeltaNetPlan`."""

    num_k_heads: int
    num_v_heads: int
    key_dim: int
    value_dim: int
    conv_width: int

    @property
    def channels(self) -> int:
        """Channels of the convolution: those of queries, keys and values."""
        return 2 * self.num_k_heads * self.key_dim + self.num_v_heads * self.value_dim


@dataclass(frozen=True)
class DecoderConfig:
    """A language model.

    Attributes
    ----------
    model_type : str
    architecture : Architecture
    hidden_size, vocab_size : int
    context_length : int
        ``max_position_embeddings``.
    norm_eps : float
    tied : bool
        Whether the head is the embedding.
    layer_types : tuple of str
        Of each layer: "full_attention", "sliding_attention" or "linear_attention".
    attention : AttentionConfig or LatentAttentionConfig
    delta_net : DeltaNetConfig or None
        Of layers of type "linear_attention".
    ropes : mapping
        The :class:`~marlin_cy.decoder.rope.RopeConfig` of each type of attention layer, or None.
    rope_interleaved : bool
    dense_size : int or None
        ``intermediate_size``: width of a feed-forward network without experts.
    """

    model_type: str
    architecture: Architecture
    hidden_size: int
    vocab_size: int
    context_length: int
    norm_eps: float
    tied: bool
    layer_types: tuple[str, ...]
    attention: AttentionConfig | LatentAttentionConfig
    delta_net: DeltaNetConfig | None
    ropes: Mapping[str, RopeConfig | None]
    rope_interleaved: bool
    dense_size: int | None


def read_decoder_config(config: JsonObject, file: StrPath) -> DecoderConfig:
    """Check a ``config.json``.

    Parameters
    ----------
    config : dict
        The whole file.
    file : path-like
        For messages.

    Raises
    ------
    CheckpointError
        A value is missing, of another type or out of range, or values contradict each other.
    UnsupportedError
        The decoder does not support the model family, or a value that the family's models may have.
    """
    architecture = find_architecture(config, file)
    text = text_config(config, file)
    fields = {**architecture.defaults, **{key: value for key, value in text.items() if value is not None}}
    if not fields.keys() & {"rope_parameters", "rope_scaling"}:
        fields["rope_parameters"] = dict(architecture.rope)
    _refuse_what_is_not_computed(fields, file)
    layer_types = _layer_types(fields, architecture, file)
    read = _latent_attention if architecture.latent else _attention
    attention = read(fields, architecture, "sliding_attention" in layer_types, file)
    linear = "linear_attention" in layer_types
    return DecoderConfig(
        model_type=config["model_type"],
        architecture=architecture,
        hidden_size=_size(fields, "hidden_size", file),
        vocab_size=_size(fields, "vocab_size", file),
        context_length=_size(fields, "max_position_embeddings", file, most=MAX_CONTEXT),
        norm_eps=_norm_eps(fields, file),
        tied=_tied(config, text, file),
        layer_types=layer_types,
        attention=attention,
        delta_net=_delta_net(fields, file) if linear else None,
        ropes=read_rope(
            fields,
            attention.rope_dim if isinstance(attention, LatentAttentionConfig) else attention.head_dim,
            frozenset(layer_types) - {"linear_attention"},
            architecture.partial_rotary,
            architecture.rope_theta,
            file,
        ),
        rope_interleaved=_flag_of(architecture.rope_interleaved, fields, file, default=True),
        dense_size=_size(fields, "intermediate_size", file) if "intermediate_size" in fields else None,
    )


# ---------------------------------------------------------------------------------------------
# Fields


def _size(fields: JsonObject, name: str, file: StrPath, default: int | None = None, most: int = MAX_SIZE) -> int:
    value = positive(fields, (name,), file, default=default)
    if value > most:
        raise UnsupportedError(f"{file}: {name} {value}, supported: at most {most}")
    return value


def _norm_eps(fields: JsonObject, file: StrPath) -> float:
    eps = finite(fields, "rms_norm_eps", file, 1e-6)
    # Kernels take it as a float32.
    if not 0 < eps < 1 or np.float32(eps) == 0:
        raise CheckpointError(f"rms_norm_eps: got {eps}, expected a float32 between 0 and 1", file=file)
    return eps


def _tied(config: JsonObject, text: JsonObject, file: StrPath) -> bool:
    name = "tie_word_embeddings"
    inner, outer = (optional(part, (name,), bool, file) for part in (text, config))
    if None not in (inner, outer) and inner != outer:
        raise CheckpointError(f"{name}: got {outer}, and {inner} in text_config, which contradict", file=file)
    return bool(outer if inner is None else inner)


def _flag_of(setting: bool | str, fields: JsonObject, file: StrPath, default: bool = False) -> bool:
    """A setting of an architecture: a value, or the key that decides."""
    return optional(fields, (setting,), bool, file, default=default) if isinstance(setting, str) else setting


def _refuse_what_is_not_computed(fields: JsonObject, file: StrPath) -> None:
    """Refuse settings that would change the result, and that the families' models do not have."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "mlp_bias", "attention_chunk_size"):
        if fields.get(name):
            raise UnsupportedError(f"{file}: {name} {fields[name]!r} is not supported")


# ---------------------------------------------------------------------------------------------
# Layer types


def _layer_types(fields: JsonObject, architecture: Architecture, file: StrPath) -> tuple[str, ...]:
    num_layers = _size(fields, "num_hidden_layers", file, most=MAX_LAYERS)
    pattern, mixers = PATTERNS[architecture.pattern], architecture.mixers
    given: list[Any] | None = optional(fields, ("layer_types",), list, file)
    if given is None:
        return tuple(pattern(fields, layer, file) for layer in range(num_layers))
    if len(given) != num_layers:
        raise CheckpointError(f"layer_types: got {len(given)} entries, expected {num_layers}", file=file)
    for layer, layer_type in enumerate(given):
        if layer_type not in mixers:
            raise UnsupportedError(
                f"{file}: layer_types: got {layer_type!r} for layer {layer}, supported: {', '.join(mixers)}"
            )
        # transformers ignores the list for these families.
        if architecture.pattern in IGNORE_LAYER_TYPES and layer_type != (found := pattern(fields, layer, file)):
            raise UnsupportedError(f"{file}: layer_types: got {layer_type!r} for layer {layer}, expected {found!r}")
    return tuple(given)


def _full(fields: JsonObject, layer: int, file: StrPath) -> str:
    return "full_attention"


def _sliding_where(condition: bool) -> str:
    return "sliding_attention" if condition else "full_attention"


def _uses_window(fields: JsonObject, file: StrPath) -> bool:
    return optional(fields, ("use_sliding_window",), bool, file, default=False)


def _qwen2(fields: JsonObject, layer: int, file: StrPath) -> str:
    """Every second layer below ``max_window_layers``, if windows are used at all."""
    most = optional(fields, ("max_window_layers",), int, file, default=0)
    return _sliding_where(_uses_window(fields, file) and layer % 2 == 0 and layer < most)


def _qwen3(fields: JsonObject, layer: int, file: StrPath) -> str:
    return _sliding_where(_uses_window(fields, file))


def _window(fields: JsonObject, layer: int, file: StrPath) -> str:
    return _sliding_where("sliding_window" in fields)


def _alternating(fields: JsonObject, layer: int, file: StrPath) -> str:
    return _sliding_where(layer % 2 == 0)


def _late_window(fields: JsonObject, layer: int, file: StrPath) -> str:
    """The layers from ``max_window_layers`` on, if there is a window."""
    first = optional(fields, ("max_window_layers",), int, file, default=0)
    return _sliding_where("sliding_window" in fields and layer >= first)


def _interval(fields: JsonObject, layer: int, file: StrPath) -> str:
    interval = positive(fields, ("full_attention_interval",), file, default=4)
    return "linear_attention" if (layer + 1) % interval else "full_attention"


PATTERNS: Mapping[str, Callable[[JsonObject, int, StrPath], str]] = {
    "full": _full,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "window": _window,
    "alternating": _alternating,
    "late_window": _late_window,
    "interval": _interval,
}
"""``layer_type(fields, layer, file)`` of each :attr:`Architecture.pattern`."""

IGNORE_LAYER_TYPES = ("full", "qwen3", "window")


# ---------------------------------------------------------------------------------------------
# Token mixers


def _attention(
    fields: JsonObject, architecture: Architecture, sliding: bool, file: StrPath
) -> AttentionConfig | LatentAttentionConfig:
    num_heads = _size(fields, "num_attention_heads", file)
    num_kv_heads = _size(fields, "num_key_value_heads", file, default=num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"num_key_value_heads: got {num_kv_heads}, expected a divisor of num_attention_heads, {num_heads}",
            file=file,
        )
    if "head_dim" not in fields and _size(fields, "hidden_size", file) % num_heads:
        raise CheckpointError(
            f"num_attention_heads: got {num_heads}, expected a divisor of hidden_size, {fields['hidden_size']}, "
            "as there is no head_dim",
            file=file,
        )
    head_dim = _size(fields, "head_dim", file, default=_size(fields, "hidden_size", file) // num_heads)
    _check_head_dim("head_dim", head_dim, head_dim, file)
    bias = architecture.bias is not None and optional(fields, (architecture.bias,), bool, file, default=False)
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        bias=bias,
        output_bias=bias and architecture.output_bias,
        head_norm=_flag_of(architecture.head_norm, fields, file),
        sinks=architecture.sinks,
        gated=architecture.gated,
        window=_size(fields, "sliding_window", file) if sliding else None,
    )


def _latent_attention(
    fields: JsonObject, architecture: Architecture, sliding: bool, file: StrPath
) -> AttentionConfig | LatentAttentionConfig:
    del sliding
    num_heads = _size(fields, "num_attention_heads", file)
    num_kv_heads = _size(fields, "num_key_value_heads", file, default=num_heads)
    if num_kv_heads != num_heads:
        raise CheckpointError(
            f"num_key_value_heads: got {num_kv_heads}, expected num_attention_heads, {num_heads}", file=file
        )
    latent_dim, rope_dim = _size(fields, "kv_lora_rank", file), _size(fields, "qk_rope_head_dim", file)
    _check_head_dim("kv_lora_rank and qk_rope_head_dim", latent_dim, latent_dim + rope_dim, file)
    return LatentAttentionConfig(
        num_heads=num_heads,
        q_rank=_size(fields, "q_lora_rank", file) if "q_lora_rank" in fields else None,
        latent_dim=latent_dim,
        nope_dim=_size(fields, "qk_nope_head_dim", file),
        rope_dim=rope_dim,
        v_head_dim=_size(fields, "v_head_dim", file),
        bias=optional(fields, (architecture.bias or "",), bool, file, default=False),
    )


def _check_head_dim(names: str, value_dim: int, key_dim: int, file: StrPath) -> None:
    if value_dim % HEAD_DIM_STEP or key_dim % 2 or key_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"{file}: {names}: values of {value_dim} and keys of {key_dim} numbers, supported: values of a multiple "
            f"of {HEAD_DIM_STEP}, keys of an even number up to {MAX_HEAD_DIM}"
        )


def _delta_net(fields: JsonObject, file: StrPath) -> DeltaNetConfig:
    activation = optional(fields, ("hidden_act",), str, file, default="silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"{file}: hidden_act {activation!r}, linear attention supports silu")
    found = DeltaNetConfig(
        num_k_heads=_size(fields, "linear_num_key_heads", file),
        num_v_heads=_size(fields, "linear_num_value_heads", file),
        key_dim=_size(fields, "linear_key_head_dim", file),
        value_dim=_size(fields, "linear_value_head_dim", file),
        conv_width=_size(fields, "linear_conv_kernel_dim", file),
    )
    if found.num_v_heads % found.num_k_heads:
        raise CheckpointError(
            f"linear_num_value_heads: got {found.num_v_heads}, expected a multiple of linear_num_key_heads, "
            f"{found.num_k_heads}",
            file=file,
        )
    return found

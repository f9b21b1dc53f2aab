"""GPTQ tensors, as AutoGPTQ, GPTQModel and AutoRound store them, to canonical form and back.

==========  ====================  ============  ======================================================
qweight     int32                 ``[K/8, N]``  ``q[8*b + i, n]`` is bits ``4*i .. 4*i+3`` of word ``[b, n]``
scales      float16 or bfloat16   ``[G, N]``
qzeros      int32                 ``[G, N/8]``  the code of ``[g, 8*c + j]`` is bits ``4*j .. 4*j+3`` of word ``[g, c]``
g_idx       int32                 ``[K]``       the group of each row of K
==========  ====================  ============  ======================================================

with ``G = ceil(K / group_size)``. The two checkpoint formats differ in the meaning of a code of ``qzeros``. Format
``"gptq"`` stores the zero point minus one: the zero point is 1 to 16 and is never wrapped to four bits. Format
``"gptq_v2"`` stores the zero point itself, 0 to 15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.arrays import (
    SAFETENSORS_SCALES,
    SCALES,
    check_finite,
    check_symmetric,
    checked_order,
    unpack_zeros,
)
from marlin_cy.formats.fields import check_bits, refuse_rotation
from marlin_cy.formats.json_fields import JsonObject, StrPath, optional, required
from marlin_cy.formats.overrides import Dynamic, Override, overridden
from marlin_cy.formats.scheme import Scheme, TensorSpec
from marlin_cy.weights.arrays import WORDS, checked_array
from marlin_cy.weights.canonical import CanonicalWeight, pack_words
from marlin_cy.weights.sizes import BITS, checked_group_size, integer_codes, normalised_g_idx

__all__ = [
    "ZERO_OFFSETS",
    "GptqScheme",
    "check_checkpoint_format",
    "pack_gptq",
    "parse",
    "read_settings",
    "tensor_shapes",
    "to_canonical",
]

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
"""The number to add to a code of ``qzeros`` to get the zero point, by checkpoint format."""

CHECKPOINT_FORMATS = {"gptq": "gptq", "gptq_v2": "gptq_v2", "gptq_p": "gptq_v2"}
"""The format that each value of ``checkpoint_format`` means. GPTQModel's "gptq_p" differs only for other widths."""

SUPPORTED_FORMATS = (*CHECKPOINT_FORMATS, "marlin")
PACK_DTYPE = "int32"


@dataclass(frozen=True)
class GptqScheme(Scheme):
    """GPTQ tensors: see :mod:`marlin_cy.formats.gptq`.

    Attributes
    ----------
    checkpoint_format : str
        ``"gptq"`` or ``"gptq_v2"``.
    desc_act : bool or None
        Rows of K were quantised in another order, and ``g_idx`` is required. None if the config does not say: then
        ``g_idx`` decides.
    sym : bool or None
        All zero points are 8. They are stored in any case, and decide if the config does not say (None).
    overrides : tuple of Override
        See :mod:`marlin_cy.formats.overrides`.
    """

    group_size: int
    checkpoint_format: str = "gptq"
    desc_act: bool | None = None
    sym: bool | None = None
    overrides: tuple[Override, ...] = ()
    bits: int = 4

    widths = BITS
    format = "gptq"
    marker = ".qweight"
    scales = ".scales"
    order = ".g_idx"

    @property
    def symmetric(self) -> bool:
        return self.sym is not False

    @property
    def act_order(self) -> bool:
        return bool(self.desc_act)

    def for_module(self, module: str) -> GptqScheme:
        return overridden(self, module)

    def sizes(self, marker_shape: tuple[int, ...]) -> tuple[int, int]:
        if len(marker_shape) != 2:
            raise ValueError(f"got shape {marker_shape}, expected two dimensions")
        return 32 // self.bits * marker_shape[0], marker_shape[1]

    def checked_group_size(self, k: int, n: int) -> int:
        return checked_group_size(group_size=self.group_size, k=k, n=n, bits=self.bits)

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        shapes = tensor_shapes(k, n, self.checked_group_size(k, n), self.bits)
        return {
            ".qweight": TensorSpec(shapes["qweight"], ("I32",)),
            ".scales": TensorSpec(shapes["scales"], SAFETENSORS_SCALES),
            ".qzeros": TensorSpec(shapes["qzeros"], ("I32",)),
            # Without g_idx, groups are runs of consecutive rows, which contradicts desc_act.
            ".g_idx": TensorSpec(shapes["g_idx"], ("I32",), required=self.act_order),
        }

    def g_idx(self, array: npt.ArrayLike, k: int, n: int) -> npt.NDArray[np.int32] | None:
        return checked_order("g_idx", array, k, self.checked_group_size(k, n), self.desc_act)

    def to_canonical(self, arrays: Mapping[str, npt.NDArray[Any]], k: int, n: int, label: str = "") -> CanonicalWeight:
        weight = to_canonical(
            arrays[".qweight"],
            arrays[".scales"],
            arrays[".qzeros"],
            arrays.get(".g_idx"),
            bits=self.bits,
            group_size=self.group_size,
            k=k,
            n=n,
            checkpoint_format=self.checkpoint_format,
            label=label,
        )
        if self.sym and weight.zero is not None:
            check_symmetric(f"qzeros{label}", weight.zero, "sym: true", self.bits)
        return weight


def parse(config: JsonObject, file: StrPath) -> GptqScheme:
    """The scheme that a quantisation config of AutoGPTQ, GPTQModel or transformers describes.

    Parameters
    ----------
    config : dict
    file : path-like
        For messages.

    Raises
    ------
    CheckpointError, UnsupportedError
    """
    checkpoint_format = optional(config, ("checkpoint_format", "format"), str, file, default="gptq")
    if checkpoint_format.lower() not in CHECKPOINT_FORMATS:
        raise UnsupportedError(
            f"{file}: checkpoint_format {checkpoint_format!r}, supported: {', '.join(SUPPORTED_FORMATS)}"
        )
    refuse_rotation(config, "rotation", file)
    check_bits(required(config, ("bits",), int, file), file)
    required(config, ("group_size",), int, file)
    dynamic = optional(config, ("dynamic",), dict, file)
    settings = read_settings(config, file)
    return GptqScheme(
        checkpoint_format=CHECKPOINT_FORMATS[checkpoint_format.lower()],
        overrides=(Dynamic.parse(dynamic, read_settings, file),) if dynamic else (),
        **settings,
    )


def read_settings(config: JsonObject, file: StrPath) -> dict[str, Any]:
    """The settings ``bits``, ``group_size``, ``desc_act`` and ``sym``, if the JSON object contains them."""
    kinds: dict[str, type[Any]] = {"bits": int, "group_size": int, "desc_act": bool, "sym": bool}
    settings = {name: optional(config, (name,), kind, file) for name, kind in kinds.items()}
    if optional(config, ("pack_dtype",), str, file, default=PACK_DTYPE) != PACK_DTYPE:
        raise UnsupportedError(f"{file}: pack_dtype: got {config['pack_dtype']!r}, only {PACK_DTYPE!r} is supported")
    return {name: value for name, value in settings.items() if value is not None}


def to_canonical(
    qweight: npt.ArrayLike,
    scales: npt.ArrayLike,
    qzeros: npt.ArrayLike,
    g_idx: npt.ArrayLike | None = None,
    *,
    bits: int,
    group_size: int,
    k: int,
    n: int,
    checkpoint_format: str = "gptq",
    label: str = "",
) -> CanonicalWeight:
    """One weight in canonical form. Only ``qzeros`` (unpacked) and ``g_idx`` are copied.

    Parameters
    ----------
    qweight : int32 or uint32 ``[k * bits / 32, n]``
    scales : float16, bfloat16 or float32 ``[G, n]``
        Finite.
    qzeros : int32 or uint32 ``[G, n * bits / 32]``
    g_idx : int32 or uint32 ``[k]``, optional
        Each in ``0 .. G-1``, in any order.
    bits, group_size, k, n
        As in :func:`~marlin_cy.weights.sizes.checked_group_size`.
    checkpoint_format : {"gptq", "gptq_v2"}
    label : str
        Follows each argument's name in messages: ``" of expert 3"``.

    Raises
    ------
    TypeError
        An array has another dtype, or not native byte order.
    ValueError
        A shape or size contradicts the others, ``checkpoint_format`` is unknown, or a scale is not finite.
    IndexError
        An entry of ``g_idx`` is not in ``0 .. G-1``.
    UnsupportedError
        No kernel supports ``bits`` or ``group_size``.
    """
    check_checkpoint_format(checkpoint_format, label)
    group_size = checked_group_size(bits=bits, group_size=group_size, k=k, n=n, label=label)
    shapes = tensor_shapes(k, n, group_size, bits)
    words = checked_array(f"qweight{label}", qweight, WORDS, shapes["qweight"])
    scale = checked_array(f"scales{label}", scales, SCALES, shapes["scales"])
    zero_words = checked_array(f"qzeros{label}", qzeros, WORDS, shapes["qzeros"])
    check_finite(f"scales{label}", scale)
    return CanonicalWeight(
        words=words.view(np.uint32),
        scale=scale,
        zero=unpack_zeros(zero_words, bits, ZERO_OFFSETS[checkpoint_format]),
        group_size=group_size,
        g_idx=normalised_g_idx(g_idx, k, group_size, label),
        codes=integer_codes(bits),
    )


def check_checkpoint_format(checkpoint_format: str, label: str = "") -> None:
    """Refuse a ``checkpoint_format`` that is not a key of :data:`ZERO_OFFSETS`, with a ``ValueError``."""
    if not isinstance(checkpoint_format, str) or checkpoint_format not in ZERO_OFFSETS:
        raise ValueError(
            f"checkpoint_format{label}: got {checkpoint_format!r}, expected one of {', '.join(ZERO_OFFSETS)}"
        )


def tensor_shapes(k: int, n: int, group_size: int, bits: int = 4) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a ``[k, n]`` weight, by name. The sizes were checked, -1 resolved."""
    groups, codes = -(-k // group_size), 32 // bits
    return {"qweight": (k // codes, n), "scales": (groups, n), "qzeros": (groups, n // codes), "g_idx": (k,)}


def pack_gptq(
    q: npt.ArrayLike,
    scale: npt.ArrayLike,
    zero: npt.ArrayLike,
    *,
    checkpoint_format: str = "gptq",
    bits: int = 4,
    scale_dtype: npt.DTypeLike = np.float16,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any], npt.NDArray[np.int32]]:
    """GPTQ tensors from plain codes: the inverse of :func:`to_canonical`, slow and obvious.

    ``g_idx`` is not returned, because a checkpoint stores it unchanged.

    Parameters
    ----------
    q : integers ``[K, N]``
        0 to 15, or 0 to 255 with 8 bits; K and N multiples of 8.
    scale : floats ``[G, N]``
    zero : integers ``[G, N]``
        With 4 bits, 1 to 16 for ``"gptq"``, and 0 to 15 for ``"gptq_v2"``.
    checkpoint_format : {"gptq", "gptq_v2"}
    bits : {4, 8}
    scale_dtype : dtype
        Of the returned scales.

    Returns
    -------
    qweight, scales, qzeros : int32 ``[K * bits / 32, N]``, ``[G, N]``, int32 ``[G, N * bits / 32]``

    Raises
    ------
    ValueError
        The format cannot hold a code or a zero point.
    """
    offset = ZERO_OFFSETS[checkpoint_format]
    q, zero = np.asarray(q), np.asarray(zero)
    for name, codes, low in (("q", q, 0), ("zero", zero, offset)):
        high = low + 2**bits - 1
        if codes.min() < low or codes.max() > high:
            raise ValueError(f"{name}: got {codes.min()} to {codes.max()}, {checkpoint_format} holds {low} to {high}")
    # qzeros is packed along N as qweight is packed along K.
    qzeros = np.ascontiguousarray(pack_words((zero.astype(np.int64) - offset).T, bits).T)
    return pack_words(q, bits).view(np.int32), np.asarray(scale, scale_dtype), qzeros.view(np.int32)

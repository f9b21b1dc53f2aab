"""AWQ tensors in AutoAWQ's "gemm" layout, as AutoAWQ, GPTQModel and AutoRound store them.

=======  ====================  ============  =====================================================================
qweight  int32                 ``[K, N/8]``  bits ``4*i .. 4*i+3`` of word ``[k, c]`` are ``q[k, 8*c + ORDER[i]]``
qzeros   int32                 ``[G, N/8]``  zero points, 0 to 15, in the same order
scales   float16 or bfloat16   ``[G, N]``
=======  ====================  ============  =====================================================================

with ``G = K / group_size`` and ``ORDER`` = 0 2 4 6 1 3 5 7. The format has no ``g_idx``. Source: AutoAWQ,
``awq/modules/linear/gemm.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.arrays import SAFETENSORS_SCALES, SCALES, check_finite, check_symmetric, unpack_nibbles
from marlin_cy.formats.fields import check_bits, refuse_rotation
from marlin_cy.formats.json_fields import JsonObject, StrPath, optional, required
from marlin_cy.formats.overrides import Dynamic, NotConverted, Override, overridden
from marlin_cy.formats.scheme import Scheme, TensorSpec
from marlin_cy.weights._nibbles import words_of_awq
from marlin_cy.weights.arrays import WORDS, checked_array
from marlin_cy.weights.canonical import NIBBLE_SHIFTS, CanonicalWeight
from marlin_cy.weights.sizes import checked_group_size

__all__ = ["AwqScheme", "pack_awq", "parse", "read_settings"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NIBBLE_OF_COLUMN = np.argsort(ORDER)
SUPPORTED_VERSIONS = ("gemm", "marlin")


@dataclass(frozen=True)
class AwqScheme(Scheme):
    """AWQ tensors: see :mod:`marlin_cy.formats.awq`.

    Attributes
    ----------
    zero_point : bool or None
        False if all zero points are 8. They are stored in any case, and decide if the config does not say (None).
    overrides : tuple of Override
        See :mod:`marlin_cy.formats.overrides`.
    """

    group_size: int
    zero_point: bool | None = None
    overrides: tuple[Override, ...] = ()
    bits: int = 4

    format = "awq"
    marker = ".qweight"
    scales = ".scales"

    @property
    def symmetric(self) -> bool:
        return self.zero_point is False

    @property
    def act_order(self) -> bool:
        return False

    def for_module(self, module: str) -> AwqScheme:
        return overridden(self, module)

    def sizes(self, marker_shape: tuple[int, ...]) -> tuple[int, int]:
        if len(marker_shape) != 2:
            raise ValueError(f"got shape {marker_shape}, expected two dimensions")
        return marker_shape[0], 8 * marker_shape[1]

    def checked_group_size(self, k: int, n: int) -> int:
        return checked_group_size(group_size=self.group_size, k=k, n=n)

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        groups = -(-k // self.checked_group_size(k, n))
        return {
            ".qweight": TensorSpec((k, n // 8), ("I32",)),
            ".scales": TensorSpec((groups, n), SAFETENSORS_SCALES),
            ".qzeros": TensorSpec((groups, n // 8), ("I32",)),
        }

    def to_canonical(self, arrays: Mapping[str, npt.NDArray[Any]], k: int, n: int, label: str = "") -> CanonicalWeight:
        specs = self.tensors(k, n)
        qweight = checked_array(f"qweight{label}", arrays[".qweight"], WORDS, specs[".qweight"].shape)
        scales = checked_array(f"scales{label}", arrays[".scales"], SCALES, specs[".scales"].shape)
        qzeros = checked_array(f"qzeros{label}", arrays[".qzeros"], WORDS, specs[".qzeros"].shape)
        check_finite(f"scales{label}", scales)
        zero = unpack_nibbles(qzeros).reshape(len(scales), -1, 8)[:, :, NIBBLE_OF_COLUMN]
        zero = np.ascontiguousarray(zero).reshape(scales.shape)
        if self.symmetric:
            check_symmetric(f"qzeros{label}", zero, "zero_point: false, or sym: true")
        return CanonicalWeight(
            words=words_of_awq(qweight.view(np.uint32)),
            scale=scales,
            zero=zero,
            group_size=self.checked_group_size(k, n),
        )


def parse(config: JsonObject, file: StrPath) -> AwqScheme:
    """The scheme that a quantisation config of AutoAWQ, GPTQModel or transformers describes.

    Parameters
    ----------
    config : dict
    file : path-like
        For messages.

    Raises
    ------
    CheckpointError, UnsupportedError
        The layouts "gemv", "gemv_fast" and llm-awq's own are not supported. :mod:`marlin_cy.formats.marlin` reads
        the layout "marlin".
    """
    version = optional(config, ("version", "format", "checkpoint_format"), str, file, default="gemm").lower()
    if config.get("backend") == "llm-awq":  # llm-awq names its layout in this field, not in version
        version = "llm-awq"
    if version != "gemm":
        raise UnsupportedError(f"{file}: version {version!r} of AWQ, supported: {', '.join(SUPPORTED_VERSIONS)}")
    refuse_rotation(config, "rotation", file)
    check_bits(required(config, ("bits", "w_bit"), int, file), file, AwqScheme.widths)
    required(config, ("group_size", "q_group_size"), int, file)
    dynamic = optional(config, ("dynamic",), dict, file)
    not_converted = optional(config, ("modules_to_not_convert",), list, file)
    overrides: list[Override] = []
    if dynamic:
        overrides.append(Dynamic.parse(dynamic, read_settings, file))
    if not_converted:
        overrides.append(NotConverted.parse(not_converted, file))
    settings = read_settings(config, file)
    return AwqScheme(overrides=tuple(overrides), **settings)


def read_settings(config: JsonObject, file: StrPath) -> dict[str, Any]:
    """The settings ``bits``, ``group_size`` and ``zero_point``, if the JSON object contains them."""
    zero_point, sym = (optional(config, (name,), bool, file) for name in ("zero_point", "sym"))
    if zero_point is not None and zero_point is sym:
        raise CheckpointError(f"got zero_point {zero_point} and sym {sym}, which contradict each other", file=file)
    settings = {
        "bits": optional(config, ("bits", "w_bit"), int, file),
        "group_size": optional(config, ("group_size", "q_group_size"), int, file),
        "zero_point": not sym if zero_point is None and sym is not None else zero_point,
    }
    return {name: value for name, value in settings.items() if value is not None}


def pack_awq(
    q: npt.ArrayLike, scale: npt.ArrayLike, zero: npt.ArrayLike
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float16], npt.NDArray[np.int32]]:
    """AWQ tensors from plain codes: the inverse of :meth:`AwqScheme.to_canonical`, slow and obvious.

    Parameters
    ----------
    q : integers ``[K, N]``
        0 to 15; N a multiple of 8.
    scale : floats ``[G, N]``
    zero : integers ``[G, N]``
        0 to 15.

    Returns
    -------
    qweight, scales, qzeros : int32 ``[K, N/8]``, float16 ``[G, N]``, int32 ``[G, N/8]``

    Raises
    ------
    ValueError
        The format cannot hold a code or a zero point.
    """
    packed = []
    for name, codes in (("q", np.asarray(q)), ("zero", np.asarray(zero))):
        if codes.min() < 0 or codes.max() > 15:
            raise ValueError(f"{name}: got {codes.min()} to {codes.max()}, awq holds 0 to 15")
        eights = codes.reshape(len(codes), -1, 8)[:, :, ORDER].astype(np.uint32)
        packed.append(np.bitwise_or.reduce(eights << NIBBLE_SHIFTS, axis=2).view(np.int32))
    return packed[0], np.asarray(scale, np.float16), packed[1]

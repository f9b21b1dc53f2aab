"""MXFP4 tensors of gpt-oss, which hold all experts, and of compressed-tensors, which hold one layer.

The tensors of one expert or one layer:

==========================  =====  =================  =====================================================
blocks (or weight_packed)   uint8  ``[N, K/32, 16]``  low and high nibbles of byte ``[n, b, i]`` are the codes
                                   (or ``[N, K/2]``)  of ``[32*b + 2*i, n]`` and ``[32*b + 2*i + 1, n]``
scales (or weight_scale)    uint8  ``[N, K/32]``      ``e`` is ``2**(e - 127)``; 255 is NaN
==========================  =====  =================  =====================================================

Canonical scales are bfloat16, which represents all of them. Source: OCP Microscaling Formats (MX) Specification 1.0;
transformers, ``integrations/mxfp4.py``; compressed-tensors, ``compressors/mxfp4``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from marlin_cy.formats.json_fields import JsonObject, StrPath, optional
from marlin_cy.formats.overrides import NotConverted, Override, overridden
from marlin_cy.formats.scheme import Scheme, TensorSpec
from marlin_cy.weights._nibbles import transpose
from marlin_cy.weights.arrays import checked_array
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.sizes import checked_group_size

__all__ = ["Mxfp4Scheme", "pack_mxfp4", "parse", "powers_of_two", "scales_of_exponents"]

GROUP_SIZE = 32
"""Rows of K that share a scale."""

BYTES: tuple[np.dtype[Any], ...] = (np.dtype(np.uint8),)
BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
NAN = 255
MANTISSA_BITS = 7  # fraction bits of a bfloat16
SMALLEST = 0x0040
"""The bits of 2**-127, the only scale that is a subnormal bfloat16."""


@dataclass(frozen=True)
class Mxfp4Scheme(Scheme):
    """The MXFP4 tensors of gpt-oss: see :mod:`marlin_cy.formats.mxfp4`.

    Attributes
    ----------
    overrides : tuple of Override
        See :mod:`marlin_cy.formats.overrides`.
    """

    overrides: tuple[Override, ...] = ()

    format = "mxfp4"
    marker = "_blocks"
    scales = "_scales"
    group_size = GROUP_SIZE

    @property
    def codes(self) -> str:
        return "e2m1"

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def act_order(self) -> bool:
        return False

    def for_module(self, module: str) -> Scheme:
        return overridden(self, module)

    def sizes(self, marker_shape: tuple[int, ...]) -> tuple[int, int]:
        if len(marker_shape) != 3 or marker_shape[2] != GROUP_SIZE // 2:
            raise ValueError(f"got shape {marker_shape}, expected three dimensions, the last of {GROUP_SIZE // 2}")
        return GROUP_SIZE * marker_shape[1], marker_shape[0]

    def checked_group_size(self, k: int, n: int) -> int:
        return checked_group_size(group_size=GROUP_SIZE, k=k, n=n)

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        self.checked_group_size(k, n)
        return {
            "_blocks": TensorSpec((n, k // GROUP_SIZE, GROUP_SIZE // 2), ("U8",)),
            "_scales": TensorSpec((n, k // GROUP_SIZE), ("U8",)),
        }

    def scale_dtype(self, stored: npt.DTypeLike) -> np.dtype[Any]:
        return BFLOAT16

    def to_canonical(self, arrays: Mapping[str, npt.NDArray[Any]], k: int, n: int, label: str = "") -> CanonicalWeight:
        specs, blocks, name = self.tensors(k, n), self.marker.lstrip("._"), self.scales.lstrip("._")
        pairs = checked_array(f"{blocks}{label}", arrays[self.marker], BYTES, specs[self.marker].shape)
        exponents = checked_array(f"{name}{label}", arrays[self.scales], BYTES, specs[self.scales].shape)
        scale = scales_of_exponents(f"{name}{label}", exponents)
        # Four consecutive bytes are a canonical word, but the words of a column are consecutive: transpose them.
        words = np.require(pairs.reshape(n, k // 2).view("<u4"), np.uint32, ("C_CONTIGUOUS", "ALIGNED"))
        return CanonicalWeight(
            words=transpose(words),
            scale=scale,
            zero=None,
            group_size=GROUP_SIZE,
            codes=self.codes,
        )


def scales_of_exponents(name: str, exponents: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """Canonical scales, bfloat16 ``[K/32, N]``, from exponents, uint8 ``[N, K/32]``.

    Raises
    ------
    ValueError
        An exponent is 255, NaN. The message has ``name``.
    """
    if exponents.max() == NAN:
        row, block = np.argwhere(exponents == NAN)[0]
        raise ValueError(f"{name}: got {NAN} (NaN) at [{row}, {block}], expected 0 to {NAN - 1}")
    return powers_of_two(transpose(exponents))


def powers_of_two(exponents: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """``2**(e - 127)`` of each exponent, bfloat16; infinity for 255."""
    bits = np.where(exponents == 0, np.uint16(SMALLEST), exponents.astype(np.uint16) << MANTISSA_BITS)
    return bits.view(BFLOAT16)


def parse(config: JsonObject, file: StrPath) -> Mxfp4Scheme:
    """The scheme of a quantisation config of gpt-oss, whose only setting is ``modules_to_not_convert``.

    Parameters
    ----------
    config : dict
    file : path-like
        For messages.

    Raises
    ------
    CheckpointError
    """
    not_converted = optional(config, ("modules_to_not_convert",), list, file)
    return Mxfp4Scheme(overrides=(NotConverted.parse(not_converted, file),) if not_converted else ())


def pack_mxfp4(q: npt.ArrayLike, exponents: npt.ArrayLike) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The tensors of one expert of gpt-oss from plain codes: the inverse of :meth:`Mxfp4Scheme.to_canonical`.

    Parameters
    ----------
    q : integers ``[K, N]``
        0 to 15; K a multiple of 32.
    exponents : integers ``[K/32, N]``
        0 to 254.

    Returns
    -------
    blocks, scales : uint8 ``[N, K/32, 16]``, uint8 ``[N, K/32]``

    Raises
    ------
    ValueError
        The format cannot hold a code or an exponent.
    """
    q, exponents = np.asarray(q), np.asarray(exponents)
    for name, values, highest in (("q", q, 15), ("exponents", exponents, NAN - 1)):
        if values.min() < 0 or values.max() > highest:
            raise ValueError(f"{name}: got {values.min()} to {values.max()}, mxfp4 holds 0 to {highest}")
    pairs = q.T.reshape(q.shape[1], -1, GROUP_SIZE // 2, 2).astype(np.uint8)
    return np.asarray(pairs[..., 0] | pairs[..., 1] << 4, np.uint8), np.ascontiguousarray(exponents.T).astype(np.uint8)

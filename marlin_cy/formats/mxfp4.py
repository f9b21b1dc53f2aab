"""MXFP4 tensors: gpt-oss's, whose experts are stacked, and compressed-tensors' of single layers.

Of one expert, or one layer:

==========================  =====  =================  =====================================================
blocks (or weight_packed)   uint8  ``[N, K/32, 16]``  low and high nibbles of byte ``[n, b, i]`` are the codes
                                   (or ``[N, K/2]``)  of ``[32*b + 2*i, n]`` and ``[32*b + 2*i + 1, n]``
scales (or weight_scale)    uint8  ``[N, K/32]``      ``e`` stands for ``2**(e - 127)``; 255 is NaN
==========================  =====  =================  =====================================================

Canonical scales are bfloat16, which holds all of these. Source: OCP Microscaling Formats (MX) Specification 1.0;
transformers, ``integrations/mxfp4.py``; compressed-tensors, ``compressors/mxfp4``.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from marlin_cy.checkpoints.json_fields import optional
from marlin_cy.formats import gptq
from marlin_cy.formats.arrays import as_array
from marlin_cy.formats.overrides import NotConverted, overridden
from marlin_cy.formats.scheme import Scheme, TensorSpec
from marlin_cy.weights._nibbles import transpose
from marlin_cy.weights.int4 import Int4Weight

__all__ = ["Mxfp4Scheme", "pack_mxfp4", "parse"]

BLOCK_K = 32
"""Rows of K that share a scale."""

BYTES = (np.dtype(np.uint8),)
NAN = 255
MANTISSA_BITS = 7  # of a bfloat16
SMALLEST = 0x0040
"""The bits of 2**-127, the one scale that is no normal bfloat16."""


@dataclass(frozen=True)
class Mxfp4Scheme(Scheme):
    """gpt-oss's MXFP4 tensors: see :mod:`marlin_cy.formats.mxfp4`.

    Attributes
    ----------
    overrides : tuple
        Of :mod:`marlin_cy.formats.overrides`.
    """

    overrides: tuple = ()

    format = "mxfp4"
    marker = "_blocks"
    scales = "_scales"
    codes = "e2m1"
    group_size = BLOCK_K

    def for_module(self, module):
        return overridden(self, module)

    def sizes(self, marker_shape):
        if len(marker_shape) != 3 or marker_shape[2] != BLOCK_K // 2:
            raise ValueError(f"got shape {marker_shape}, expected three dimensions, the last of {BLOCK_K // 2}")
        return BLOCK_K * marker_shape[1], marker_shape[0]

    def checked_group_size(self, k, n):
        return gptq.checked_group_size(bits=4, group_size=BLOCK_K, k=k, n=n)

    def tensors(self, k, n):
        self.checked_group_size(k, n)
        return {
            "_blocks": TensorSpec((n, k // BLOCK_K, BLOCK_K // 2), ("U8",)),
            "_scales": TensorSpec((n, k // BLOCK_K), ("U8",)),
        }

    def scale_dtype(self, stored):
        return np.dtype(ml_dtypes.bfloat16)

    def to_canonical(self, arrays, k, n, label=""):
        specs, name = self.tensors(k, n), self.scales.lstrip("._")
        pairs = as_array(f"{self.marker.lstrip('._')}{label}", arrays[self.marker], BYTES, specs[self.marker].shape)
        exponents = as_array(f"{name}{label}", arrays[self.scales], BYTES, specs[self.scales].shape)
        if exponents.max() == NAN:
            row, block = np.argwhere(exponents == NAN)[0]
            raise ValueError(f"{name}{label}: got {NAN} (NaN) at [{row}, {block}], expected 0 to {NAN - 1}")
        scale = transpose(exponents).astype(np.uint16) << MANTISSA_BITS
        scale[scale == 0] = SMALLEST
        # Four bytes are a canonical word; only that words of one column follow each other.
        words = np.require(pairs.reshape(n, k // 2).view("<u4"), np.uint32, ("C_CONTIGUOUS", "ALIGNED"))
        return Int4Weight(
            words=transpose(words),
            scale=scale.view(ml_dtypes.bfloat16),
            zero=None,
            group_size=BLOCK_K,
            codes=self.codes,
        )


def parse(config, file) -> Mxfp4Scheme:
    """The scheme of gpt-oss's quantisation config, which has nothing but ``modules_to_not_convert``.

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


def pack_mxfp4(q, exponents):
    """gpt-oss's tensors of one expert from plain codes: the inverse of :meth:`Mxfp4Scheme.to_canonical`.

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
        A code or an exponent that the format cannot hold.
    """
    q, exponents = np.asarray(q), np.asarray(exponents)
    for name, values, highest in (("q", q, 15), ("exponents", exponents, NAN - 1)):
        if values.min() < 0 or values.max() > highest:
            raise ValueError(f"{name}: got {values.min()} to {values.max()}, mxfp4 holds 0 to {highest}")
    blocks = q.T.reshape(q.shape[1], -1, BLOCK_K // 2, 2).astype(np.uint8)
    return blocks[..., 0] | blocks[..., 1] << 4, np.ascontiguousarray(exponents.T).astype(np.uint8)

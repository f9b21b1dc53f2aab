"""DeepSeek-V4's own checkpoints: experts of 4-bit floats, beside linear layers in FP8.

=======  ==================  =============  ==========================================================================
weight   I8                  ``[N, K/2]``   low and high nibbles of byte ``[n, i]`` are the codes of ``[2*i, n]`` and
                                            ``[2*i + 1, n]``
scale    F8_E8M0             ``[N, K/32]``  ``e`` is ``2**(e - 127)``; 255 is NaN
=======  ==================  =============  ==========================================================================

The codes are those of MXFP4 (:mod:`marlin_cy.formats.mxfp4`). Other linear layers are described in
:mod:`marlin_cy.formats.scaled`: their scales are called ``scale`` too. The quantisation config names the method "fp8",
and ``expert_dtype`` of ``config.json`` is "fp4", or missing.

Source: DeepSeek-V4, ``inference/convert.py``, and vLLM, ``models/deepseek_v4``, as their documentation describes them;
transformers, ``integrations/finegrained_fp8.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.errors import UnsupportedError
from marlin_cy.formats.json_fields import JsonObject, StrPath, optional
from marlin_cy.formats.mxfp4 import GROUP_SIZE, Mxfp4Scheme
from marlin_cy.formats.scheme import TensorSpec
from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["DeepSeekFp4Scheme", "check_experts", "parse"]

EXPERT_DTYPE = "fp4"


@dataclass(frozen=True)
class DeepSeekFp4Scheme(Mxfp4Scheme):
    """DeepSeek-V4's experts: see :mod:`marlin_cy.formats.deepseek_fp4`."""

    format = "deepseek-fp4"
    marker = ".weight"
    marker_dtypes = ("I8",)
    scales = ".scale"

    def sizes(self, marker_shape: tuple[int, ...]) -> tuple[int, int]:
        if len(marker_shape) != 2:
            raise ValueError(f"got shape {marker_shape}, expected two dimensions")
        return 2 * marker_shape[1], marker_shape[0]

    def tensors(self, k: int, n: int) -> dict[str, TensorSpec]:
        self.checked_group_size(k, n)
        return {
            ".weight": TensorSpec((n, k // 2), ("I8",)),
            ".scale": TensorSpec((n, k // GROUP_SIZE), ("F8_E8M0",)),
        }

    def to_canonical(self, arrays: Mapping[str, npt.NDArray[Any]], k: int, n: int, label: str = "") -> CanonicalWeight:
        signed = arrays[self.marker]
        if isinstance(signed, np.ndarray) and signed.dtype == np.int8:
            arrays = {**arrays, self.marker: signed.view(np.uint8)}
        return super().to_canonical(arrays, k, n, label)


def parse(config: JsonObject, file: StrPath) -> DeepSeekFp4Scheme:
    """The scheme of a quantisation config of method "fp8", whose experts are then 4-bit floats.

    Parameters
    ----------
    config : dict
    file : path-like
        For messages.

    Raises
    ------
    CheckpointError
    UnsupportedError
        The FP8 numbers have another format than E4M3.
    """
    kind = optional(config, ("fmt",), str, file, default="e4m3")
    if kind != "e4m3":
        raise UnsupportedError(f"{file}: fmt: got {kind!r}, only 'e4m3' is supported")
    return DeepSeekFp4Scheme()


def check_experts(config: JsonObject, file: StrPath) -> None:
    """Refuse a model with this quantisation whose experts are not 4-bit floats by ``config.json``.

    Raises
    ------
    CheckpointError
    UnsupportedError
    """
    found = optional(config, ("expert_dtype",), str, file, default=EXPERT_DTYPE)
    if found != EXPERT_DTYPE:
        raise UnsupportedError(f"{file}: expert_dtype {found!r} of method 'fp8', supported: {EXPERT_DTYPE!r}")

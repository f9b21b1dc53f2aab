"""Linear layers of 8-bit numbers with scales that occur beside 4-bit layers: FP8, and int8.

As llm-compressor, ModelOpt and DeepSeek store FP8, and llm-compressor int8 (``int-quantized``):

======================================  ==================  =========================================================
weight                                  F8_E4M3 or I8       ``[N, K]``
weight_scale, weight_scale_inv, scale   F32, BF16, F16 or   one value: of the tensor; ``[N]`` or ``[N, 1]``: of each
                                        F8_E8M0             output; ``[ceil(N / 128), ceil(K / 128)]``: of each block
======================================  ==================  =========================================================

The matrix is ``weight * scale``, whatever the scale is called; that of int8 is ``weight_scale``, and there are no zero
points. Blocks have 128 by 128 elements unless the quantisation config has another ``weight_block_size`` or
``block_structure``.

The decoder keeps the bytes. It rounds each product of a weight and its scale once to float32, as transformers does when
it dequantises. If the products were float16, a matrix in FP8 would change by 1.4e-4 of its norm, and logits of small
models by up to 8e-4. Integers in groups of 32 would change it by 5e-3: E4M3 numbers differ in size by up to 2**18.

Source: DeepSeek-V3, ``inference/fp8_cast_bf16.py``; compressed-tensors, ``compressors``; transformers,
``integrations/finegrained_fp8.py``.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from marlin_cy.formats.json_fields import JsonObject
from marlin_cy.formats.mxfp4 import powers_of_two

__all__ = [
    "BLOCK",
    "SCALE_SUFFIXES",
    "WEIGHT_DTYPES",
    "ZERO_POINTS",
    "block_size",
    "by_rows",
    "check_elements",
    "dequantize",
    "kind_of",
    "scale_values",
]

FP8, INT8 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.int8)
WEIGHT_DTYPES = {"F8_E4M3": FP8, "I8": INT8}
"""The dtypes of weights, by safetensors' names."""

EXPONENTS = "F8_E8M0"
"""The dtype of scales that are powers of two: ``e`` is ``2**(e - 127)``, and 255 is NaN."""

SCALE_DTYPES = ("F32", "BF16", "F16", EXPONENTS)
SCALE_SUFFIXES = {"F8_E4M3": (".weight_scale", ".weight_scale_inv", ".scale"), "I8": (".weight_scale",)}
"""What a scale is called, by the weight's dtype."""

ZERO_POINTS = ".weight_zero_point"
"""Layers that have these are not read."""

BLOCK = (128, 128)
BYTES = np.arange(256, dtype=np.uint8)
NAN = 127  # of E4M3; 255 is NaN too
ROWS = 256  # that are checked at once
LARGEST_SCALE = 2.0**119
"""With larger scales, a product may exceed the largest float32: E4M3 numbers reach 448."""


def block_size(config: JsonObject) -> tuple[int, int]:
    """Rows of N and of K of a block, by a quantisation config; :data:`BLOCK` if the config has no valid ones.

    A scale of another shape is refused in any case.
    """
    groups = config.get("config_groups")
    parts = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    found = [config.get("weight_block_size")]
    found += [part.get("block_structure") for part in parts if isinstance(part, dict)]
    for size in found:
        if isinstance(size, list) and len(size) == 2 and all(type(number) is int and number > 0 for number in size):
            return size[0], size[1]
    return BLOCK


def kind_of(shape: tuple[int, ...], scale_shape: tuple[int, ...], block: tuple[int, int]) -> str | None:
    """What a scale of this shape belongs to: "tensor", "channel" or "block"; None if it fits no matrix ``shape``."""
    n, k = shape
    if int(np.prod(scale_shape)) == 1:
        return "tensor"
    if scale_shape in ((n,), (n, 1)):
        return "channel"
    return "block" if scale_shape == (-(-n // block[0]), -(-k // block[1])) else None


def scale_values(scale: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The scales in float32; uint8 are exponents.

    Raises
    ------
    ValueError
        A scale is not finite, or so large that a weight would not be.
    """
    values = (powers_of_two(scale) if scale.dtype == np.uint8 else scale).astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("got a scale that is not finite, expected finite values")
    if np.abs(values).max(initial=0) > LARGEST_SCALE:
        raise ValueError(f"got a scale of {np.abs(values).max()}, expected at most {LARGEST_SCALE}")
    return values


def by_rows(
    scales: npt.NDArray[np.float32], shape: tuple[int, int], block: tuple[int, int]
) -> tuple[npt.NDArray[np.float32], int]:
    """``(scales [N, ceil(K / scale_k)], scale_k)``: the scales of each row of a matrix ``shape``."""
    n, k = shape
    kind = kind_of(shape, scales.shape, block)
    if kind == "block":
        return np.repeat(scales, block[0], axis=0)[:n], block[1]
    return np.ascontiguousarray(np.broadcast_to(scales.reshape(-1, 1), (n, 1))), k


def check_elements(weight: npt.NDArray[Any]) -> None:
    """Refuse weights that are NaN.

    Raises
    ------
    ValueError
    """
    for begin in range(0, len(weight) if weight.dtype == FP8 else 0, ROWS):
        found = weight[begin : begin + ROWS].view(np.uint8) & NAN == NAN
        if found.any():
            row, column = np.argwhere(found)[0]
            raise ValueError(f"got NaN at [{begin + row}, {column}], expected finite values")


def dequantize(
    weight: npt.NDArray[Any], scales: npt.NDArray[np.float32], block: tuple[int, int], dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    """The matrix, ``[N, K]``, each element rounded once to ``dtype``.

    Parameters
    ----------
    weight : float8_e4m3fn or int8 ``[N, K]``
    scales : float32
        Of a shape that :func:`kind_of` knows.
    block : (int, int)
    dtype : dtype

    Raises
    ------
    ValueError
        A weight is NaN.
    """
    check_elements(weight)
    n, k = weight.shape
    values, codes = BYTES.view(weight.dtype).astype(np.float32), weight.view(np.uint8)
    kind = kind_of((n, k), scales.shape, block)
    rows, columns = {"tensor": (n, k), "channel": (1, k)}.get(str(kind), block)
    grid = scales.reshape(-(-n // rows), -(-k // columns))
    matrix = np.empty((n, k), dtype)
    # A scale has 256 products, so each element is looked up.
    for i, line in enumerate(grid):
        for j, scale in enumerate(line):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            with np.errstate(over="ignore", invalid="ignore"):
                products = (values * scale).astype(dtype)
            matrix[part] = products[codes[part]]
    return matrix

"""Checks and conversions of stored tensors that several formats share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.code_types import CODE_TYPES
from marlin_cy.weights.scale_records import SCALE_RECORDS
from marlin_cy.weights.sizes import normalised_g_idx

__all__ = [
    "SAFETENSORS_SCALES",
    "SCALES",
    "check_finite",
    "check_symmetric",
    "checked_order",
    "symmetric_zeros",
    "unpack_nibbles",
    "unpack_zeros",
]

SCALES: tuple[np.dtype[Any], ...] = tuple(
    row.scale for row in SCALE_RECORDS.values() if not row.has_minimum and not row.has_blocks
)
"""The dtypes in which float scales may be stored."""

EXPONENT_BITS = {dtype: np.array(np.inf, dtype).view(f"u{dtype.itemsize}") for dtype in SCALES}
"""The bits of infinity: an exponent of all ones."""

SAFETENSORS_SCALES = ("F16", "BF16", "F32")
"""The same dtypes by safetensors' names."""

SYMMETRIC_ZERO = CODE_TYPES["uint4"].symmetric_zero


def check_finite(name: str, scales: npt.NDArray[Any]) -> None:
    """Refuse scales, of a dtype of :data:`SCALES` and ``[a, b]``, that are not all finite, with a ``ValueError``."""
    # A number is finite unless its exponent is all ones. This test takes a quarter of the time of np.isfinite.
    exponent = EXPONENT_BITS[scales.dtype]
    bits = scales.view(exponent.dtype)
    if (bits & exponent).max() == exponent:
        a, b = np.argwhere((bits & exponent) == exponent)[0]
        raise ValueError(f"{name}: got {scales[a, b]} at [{a}, {b}], expected finite values")


def check_symmetric(name: str, zeros: npt.NDArray[Any], setting: str, bits: int = 4) -> None:
    """Refuse zero points ``[G, N]`` that are not all 8, or 128 for 8 bits, although ``setting`` of the config says so.

    A file whose zero points are all 7 or 9 is probably labelled with the wrong ``checkpoint_format``.
    """
    expected = CODE_TYPES[f"uint{bits}"].symmetric_zero
    wrong = zeros != expected
    if wrong.any():
        group, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name}: got zero point {zeros[group, column]} at [{group}, {column}], expected {expected}, as the "
            f"config says {setting}"
        )


def checked_order(
    name: str, g_idx: npt.ArrayLike, k: int, group_size: int, act_order: bool | None, label: str = ""
) -> npt.NDArray[np.int32] | None:
    """The canonical ``g_idx`` of a checkpoint's linear layer, which must agree with the config.

    Zeros for all rows mean that no order was stored: some tools write a tensor that they never fill.

    Parameters
    ----------
    name : str
        The tensor's name, for messages.
    g_idx : int32 or uint32 ``[k]``
    k, group_size : int
        Checked, -1 resolved.
    act_order : bool or None
        Whether the config says that rows are permuted; None if the config does not say.
    label : str
        As in :func:`~marlin_cy.weights.sizes.normalised_g_idx`.

    Returns
    -------
    int32 ``[k]``, or None for K's own order

    Raises
    ------
    TypeError, IndexError
        As :func:`~marlin_cy.weights.sizes.normalised_g_idx`.
    ValueError
        Rows are permuted although the config says that they are not, or groups differ in size.
    """
    order = normalised_g_idx(g_idx, k, group_size, label)
    if order is None or not (act_order or order.any()):
        return None
    if act_order is False:
        row = int(np.argmax(order != np.arange(k) // group_size))
        raise ValueError(
            f"{name}{label}: got group {order[row]} for row {row}, expected {row // group_size}, as the config says "
            "that rows are not permuted"
        )
    wanted = np.bincount(np.arange(k) // group_size)
    sizes = np.bincount(order, minlength=len(wanted))
    if (sizes != wanted).any():
        group = int(np.argmax(sizes != wanted))
        raise ValueError(f"{name}{label}: got {sizes[group]} rows in group {group}, expected {wanted[group]}")
    return order


def unpack_nibbles(words: npt.NDArray[Any], offset: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 ``[M, 8*N]`` from contiguous 32-bit words ``[M, N]``, low nibble first along N, plus ``offset``."""
    pairs = words.astype("<u4", copy=False).view(np.uint8)
    codes = np.empty((pairs.shape[0], 2 * pairs.shape[1]), np.uint8)
    np.bitwise_and(pairs, 15, out=codes[:, 0::2])
    np.right_shift(pairs, 4, out=codes[:, 1::2])
    codes += np.uint8(offset)
    return codes


def unpack_zeros(words: npt.NDArray[Any], bits: int, offset: int = 0) -> npt.NDArray[Any]:
    """Zero points ``[M, 32 / bits * N]`` from 32-bit words ``[M, N]``, plus ``offset``, in the code type's dtype."""
    if bits == 4:
        return unpack_nibbles(words, offset)
    zeros: npt.NDArray[Any] = words.astype("<u4", copy=False).view(np.uint8).astype(np.uint16) + np.uint16(offset)
    return zeros


def symmetric_zeros(shape: tuple[int, ...], bits: int = 4) -> npt.NDArray[Any]:
    """The zero points of a symmetric weight: codes are signed integers, stored with 8, or 128 for 8 bits, added."""
    row = CODE_TYPES[f"uint{bits}"]
    return np.full(shape, row.symmetric_zero, row.zero_dtype)

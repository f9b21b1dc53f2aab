"""Checks and conversions of stored tensors that several formats share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.code_types import CODE_TYPES, SCALE_TYPES
from marlin_cy.weights.sizes import normalised_g_idx

__all__ = ["SCALES", "check_finite", "check_symmetric", "checked_order", "symmetric_zeros", "unpack_nibbles"]

SCALES: tuple[np.dtype[Any], ...] = tuple(row.dtype for row in SCALE_TYPES.values())
"""The dtypes in which float scales may be stored."""

EXPONENT_BITS = {dtype: np.array(np.inf, dtype).view(np.uint16) for dtype in SCALES}
"""The bits of infinity: an exponent of all ones."""

SYMMETRIC_ZERO = CODE_TYPES["uint4"].symmetric_zero


def check_finite(name: str, scales: npt.NDArray[Any]) -> None:
    """Refuse scales, float16 or bfloat16 ``[a, b]``, that are not all finite, with a ``ValueError``."""
    # A number is finite unless its exponent is all ones. This test takes a quarter of the time of np.isfinite.
    exponent = EXPONENT_BITS[scales.dtype]
    if (scales.view(np.uint16) & exponent).max() == exponent:
        a, b = np.argwhere((scales.view(np.uint16) & exponent) == exponent)[0]
        raise ValueError(f"{name}: got {scales[a, b]} at [{a}, {b}], expected finite values")


def check_symmetric(name: str, zeros: npt.NDArray[np.uint8], setting: str) -> None:
    """Refuse zero points ``[G, N]`` that are not all 8, although ``setting`` of the config says that they are.

    A file whose zero points are all 7 or 9 is probably labelled with the wrong ``checkpoint_format``.
    """
    wrong = zeros != SYMMETRIC_ZERO
    if wrong.any():
        group, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"{name}: got zero point {zeros[group, column]} at [{group}, {column}], expected {SYMMETRIC_ZERO}, as the "
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


def symmetric_zeros(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """The zero points of a symmetric weight. All are 8: codes are integers from -8 to 7, stored with 8 added."""
    return np.full(shape, SYMMETRIC_ZERO, np.uint8)

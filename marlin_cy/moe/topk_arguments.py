"""Checks of the experts and weights that a caller has selected for each token."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["as_ids", "as_topk"]

WEIGHT_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))


def as_ids(topk_ids: Any, name: str, num_experts: int) -> npt.NDArray[np.int32]:
    """A checked copy of expert ids, int32 ``[tokens, choices]``.

    The ids are copied before they are checked. So a thread that changes ``topk_ids`` during the call cannot
    introduce an unchecked id.

    Raises
    ------
    TypeError
        The ids are not integers.
    ValueError
        The array is not two-dimensional.
    IndexError
        An id is not between -1 and ``num_experts - 1``.
    """
    ids = copied(topk_ids, name)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {ids.dtype}, expected int32 or int64")
    if ids.ndim != 2:
        raise ValueError(f"{name}: got shape {ids.shape}, expected [tokens, top_k]")
    if ids.size and (int(ids.min()) < -1 or int(ids.max()) >= num_experts):
        at = tuple(map(int, np.argwhere((ids < -1) | (ids >= num_experts))[0]))
        raise IndexError(f"{name}{list(at)}: got {ids[at]}, expected -1 to {num_experts - 1}")
    return ids.astype(np.int32, copy=False)


def as_topk(
    topk_ids: Any, topk_weights: Any, num_experts: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Checked copies of selected experts and their weights: int32 and float32 ``[tokens, choices]``.

    Both are copies, so ``out`` may overlap the caller's arrays.

    Raises
    ------
    TypeError, ValueError, IndexError
        An invalid argument. The message names the argument.
    """
    ids = as_ids(topk_ids, "topk_ids", num_experts)
    weights = copied(topk_weights, "topk_weights")
    if weights.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"topk_weights: got dtype {weights.dtype}, expected float32")
    if weights.shape != ids.shape:
        raise ValueError(f"topk_weights: got shape {weights.shape}, expected {ids.shape}, as topk_ids")
    if ids.shape[1] == 0:
        raise ValueError(f"topk_ids: got shape {ids.shape}, expected at least one expert for each token")
    return ids, weights.astype(np.float32, copy=False)


def copied(value: Any, name: str) -> npt.NDArray[Any]:
    """A C-contiguous copy of an array; nested sequences must be rectangular."""
    try:
        return np.array(value, order="C")
    except ValueError as error:
        raise ValueError(f"{name}: got {type(value).__name__} ({error}), expected [tokens, top_k]") from None

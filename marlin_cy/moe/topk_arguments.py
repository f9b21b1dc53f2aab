"""Checks of the experts that a caller has chosen for each token."""

import ml_dtypes
import numpy as np

__all__ = ["as_ids", "as_topk"]

WEIGHT_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))


def as_ids(topk_ids, name, num_experts):
    """A copy of expert ids as int32 ``[tokens, top_k]``, each -1 to ``num_experts - 1``.

    A copy, so that what was checked is what is used, whoever else writes to ``topk_ids``.
    """
    ids = as_array(topk_ids, name).copy()  # first of all: another thread may write to the argument
    if ids.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {ids.dtype}, expected int32 or int64")
    if ids.ndim != 2:
        raise ValueError(f"{name}: got shape {ids.shape}, expected [tokens, top_k]")
    if ids.size and (int(ids.min()) < -1 or int(ids.max()) >= num_experts):
        at = tuple(map(int, np.argwhere((ids < -1) | (ids >= num_experts))[0]))
        raise IndexError(f"{name}{list(at)}: got {ids[at]}, expected -1 to {num_experts - 1}")
    return np.asarray(ids, np.int32, order="C")


def as_topk(topk_ids, topk_weights, num_experts):
    """Copies of chosen experts and their weights: int32 and float32 ``[tokens, choices]``."""
    ids = as_ids(topk_ids, "topk_ids", num_experts)
    weights = as_array(topk_weights, "topk_weights")
    if weights.dtype not in WEIGHT_DTYPES:
        raise TypeError(f"topk_weights: got dtype {weights.dtype}, expected float32")
    if weights.shape != ids.shape:
        raise ValueError(f"topk_weights: got shape {weights.shape}, expected {ids.shape}, as topk_ids")
    if ids.shape[1] == 0:
        raise ValueError(f"topk_ids: got shape {ids.shape}, expected at least one expert a token")
    return ids, np.array(weights, np.float32, order="C")  # a copy, as ids are: out may overlap neither


def as_array(value, name):
    """``np.asarray(value)``, of a regular shape."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}: got {type(value).__name__} ({error}), expected [tokens, top_k]") from None

"""Grouping of routed tokens into blocks of one expert each."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import integer
from marlin_cy.moe._align import align_block_size
from marlin_cy.moe.topk_arguments import as_ids

__all__ = ["moe_align_block_size"]


def moe_align_block_size(
    topk_ids: npt.ArrayLike, block_size: int, num_experts: int, expert_map: npt.ArrayLike | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Sort (token, choice) slots by expert and pad each expert's run to whole blocks.

    Parameters
    ----------
    topk_ids : int32 or int64 ``[tokens, top_k]``
        Expert of each slot, 0 to ``num_experts - 1``; -1 for a slot that is left out.
    block_size : int
        Slots per block.
    num_experts : int
    expert_map : int32 ``[num_experts]``, optional
        For expert parallelism: the local index of each expert, or -1 for an expert on another device.
        Blocks of such experts are kept, with an expert id of -1.

    Returns
    -------
    sorted_token_ids : int32 ``[capacity]``
        Slot ids ``token * top_k + choice``, ascending within an expert; ``tokens * top_k`` is padding.
        ``capacity`` is the largest number that any routing needs: ``tokens * top_k + num_experts * (block_size - 1)``.
    expert_ids : int32 ``[ceil(capacity / block_size)]``
        Expert of each block; -1 for blocks past the end.
    num_tokens_past_padded : int32 ``[1]``
        Slots used, padding included.

    Raises
    ------
    TypeError, ValueError, IndexError
        Naming the argument.

    Notes
    -----
    The arrays are those of vLLM's ``moe_align_block_size``, the source of this function.
    """
    block_size, num_experts = integer("block_size", block_size), integer("num_experts", num_experts)
    for name, value in (("block_size", block_size), ("num_experts", num_experts)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    ids = as_ids(topk_ids, "topk_ids", num_experts)
    capacity = ids.size + num_experts * (block_size - 1)
    if capacity > np.iinfo(np.int32).max:
        raise ValueError(f"topk_ids: got {ids.size} slots, expected fewer than 2**31 with their padding")
    if expert_map is not None:
        local: npt.NDArray[Any] = np.array(expert_map)  # a copy: another thread may write to the argument
        if local.dtype.kind not in "iu":
            raise TypeError(f"expert_map: got dtype {local.dtype}, expected int32")
        if local.shape != (num_experts,):
            raise ValueError(f"expert_map: got shape {local.shape}, expected ({num_experts},)")
        if local.min() < -1 or local.max() > np.iinfo(np.int32).max:
            raise IndexError(f"expert_map: got {local.min()} to {local.max()}, expected -1 or a local index")
    sorted_token_ids = np.empty(capacity, np.int32)
    expert_ids = np.empty(-(-capacity // block_size), np.int32)
    past = align_block_size(ids.reshape(-1), block_size, num_experts, sorted_token_ids, expert_ids)
    if expert_map is not None:
        used = expert_ids[: past // block_size]
        used[:] = local[used]
    return sorted_token_ids, expert_ids, np.array([past], np.int32)

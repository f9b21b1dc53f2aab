"""The dispatches of ``gemm_phase_batched``: conversion to an array, and checks."""

from collections.abc import Iterable

import numpy as np

from marlin_cy.arguments import integer
from marlin_cy.stacks._dispatches import check_disjoint, check_dispatches

__all__ = ["as_dispatches", "check_dispatches", "check_disjoint"]


def as_dispatches(dispatches):
    """A private int64 ``[D, 4]`` copy of what ``gemm_phase_batched`` accepts."""
    if isinstance(dispatches, np.ndarray):
        array = dispatches
        if array.dtype.kind not in "iu" or not np.can_cast(array.dtype, np.int64):
            raise TypeError(f"dispatches: got dtype {array.dtype}, expected int64")
        if array.ndim != 2 or array.shape[1] != 4:
            raise ValueError(f"dispatches: got shape {array.shape}, expected [D, 4]")
        return np.array(array, np.int64, order="C")
    if not isinstance(dispatches, Iterable):
        raise TypeError(f"dispatches: got {type(dispatches).__name__}, expected a sequence of 4-tuples or int64 [D, 4]")
    rows = [as_dispatch(f"dispatches[{position}]", dispatch) for position, dispatch in enumerate(dispatches)]
    return np.array(rows, np.int64).reshape(len(rows), 4)


def as_dispatch(name, dispatch):
    """Four ints of at most 64 bits."""
    if not isinstance(dispatch, Iterable):
        raise TypeError(f"{name}: got {dispatch!r}, expected (expert_idx, in_row_offset, out_row_offset, m)")
    numbers = [integer(name, number) for number in dispatch]
    if len(numbers) != 4:
        raise ValueError(f"{name}: got {len(numbers)} numbers, expected (expert_idx, in_row_offset, out_row_offset, m)")
    return numbers

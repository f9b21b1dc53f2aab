"""The dispatches of ``gemm_phase_batched``: conversion to a private array, and checks of that array.

Call :func:`as_dispatches` first and check what it returns. The array is always a copy, so that no other thread can
change it between a check and its use.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import integer
from marlin_cy.stacks._dispatches import check_disjoint, check_dispatches

__all__ = ["as_dispatches", "check_dispatches", "check_disjoint"]

INT64 = np.dtype(np.int64)


def as_dispatches(dispatches: npt.NDArray[np.int64] | Iterable[Iterable[int]]) -> npt.NDArray[np.int64]:
    """A private int64 ``[D, 4]`` copy of dispatches.

    Parameters
    ----------
    dispatches : integers ``[D, 4]``, or iterable of ``(expert_idx, in_row_offset, out_row_offset, m)``

    Raises
    ------
    TypeError, ValueError
        The argument, or one of its entries, is of another type or shape.
    """
    if isinstance(dispatches, np.ndarray):
        # Copy first and check the copy: another thread may write to the caller's array.
        own = np.array(dispatches, order="C")
        if own.dtype != INT64:
            if own.dtype.kind not in "iu" or not np.can_cast(own.dtype, INT64):
                raise TypeError(f"dispatches: got dtype {own.dtype}, expected int64")
            own = own.astype(INT64)
        if own.ndim != 2 or own.shape[1] != 4:
            raise ValueError(f"dispatches: got shape {own.shape}, expected [D, 4]")
        return own
    if not isinstance(dispatches, Iterable):
        raise TypeError(f"dispatches: got {type(dispatches).__name__}, expected a sequence of 4-tuples or int64 [D, 4]")
    rows = [as_dispatch(f"dispatches[{position}]", dispatch) for position, dispatch in enumerate(dispatches)]
    return np.array(rows, np.int64).reshape(len(rows), 4)


def as_dispatch(name: str, dispatch: Iterable[int]) -> list[int]:
    """The four numbers of a dispatch, each an int of at most 64 bits."""
    if not isinstance(dispatch, Iterable):
        raise TypeError(f"{name}: got {dispatch!r}, expected (expert_idx, in_row_offset, out_row_offset, m)")
    numbers = [integer(name, number) for number in dispatch]
    if len(numbers) != 4:
        raise ValueError(f"{name}: got {len(numbers)} numbers, expected (expert_idx, in_row_offset, out_row_offset, m)")
    return numbers

"""The dispatches of ``gemm_phase_batched``: conversion to a private array, and checks of that array.

Call :func:`as_dispatches` first and check what it returns. The array is always a copy, so that no other thread can
change it between a check and its use.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import integer

__all__ = ["as_dispatches", "check_dispatches", "check_disjoint"]


def as_dispatches(dispatches: npt.NDArray[np.int64] | Iterable[Iterable[int]]) -> npt.NDArray[np.int64]:
    """A private int64 ``[D, 4]`` copy of dispatches.

    Parameters
    ----------
    dispatches : integers ``[D, 4]``, or iterable of ``(expert_idx, in_row_offset, out_row_offset, m)``

    Raises
    ------
    TypeError, ValueError
        The argument, or one of its entries, is something else.
    """
    if isinstance(dispatches, np.ndarray):
        # Copy first and check the copy: another thread may write to the caller's array.
        own = np.array(dispatches, order="C")
        if own.dtype.kind not in "iu" or not np.can_cast(own.dtype, np.int64):
            raise TypeError(f"dispatches: got dtype {own.dtype}, expected int64")
        if own.ndim != 2 or own.shape[1] != 4:
            raise ValueError(f"dispatches: got shape {own.shape}, expected [D, 4]")
        return own.astype(np.int64, copy=False)
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


def check_dispatches(dispatches: npt.NDArray[np.int64], num_experts: int, input_rows: int, output_rows: int) -> None:
    """Refuse dispatches, int64 ``[D, 4]``, that name an expert or a row that does not exist.

    Raises
    ------
    IndexError
        An expert or a range of rows is out of bounds.
    ValueError
        ``m`` is negative.
    """
    if not len(dispatches):
        return
    experts, in_rows, out_rows, counts = dispatches.T
    wrong = (experts < 0) | (experts >= num_experts) | (counts < 0)
    wrong |= (in_rows < 0) | (in_rows > input_rows - counts) | (out_rows < 0) | (out_rows > output_rows - counts)
    if not wrong.any():
        return
    position = int(np.flatnonzero(wrong)[0])
    expert, in_row, out_row, m = map(int, dispatches[position])
    if not 0 <= expert < num_experts:
        raise IndexError(f"dispatches[{position}]: got expert_idx {expert}, expected 0 to {num_experts - 1}")
    if m < 0:
        raise ValueError(f"dispatches[{position}]: got m {m}, expected 0 or more")
    if not 0 <= in_row <= input_rows - m:
        raise IndexError(
            f"dispatches[{position}]: got {m} input rows from {in_row} on, expected them within the input's "
            f"{input_rows}"
        )
    raise IndexError(
        f"dispatches[{position}]: got {m} output rows from {out_row} on, expected them within the output's "
        f"{output_rows}"
    )


def check_disjoint(dispatches: npt.NDArray[np.int64]) -> None:
    """Refuse dispatches, int64 ``[D, 4]``, of which two write the same output row, with a ``ValueError``."""
    if len(dispatches) < 2:
        return
    ordered = dispatches[np.argsort(dispatches[:, 2], kind="stable")]
    begins, ends = ordered[:, 2], ordered[:, 2] + ordered[:, 3]
    wrong = np.flatnonzero(ends[:-1] > begins[1:])
    if len(wrong):
        i = wrong[0]
        raise ValueError(
            f"dispatches: got overlapping output rows {begins[i]} to {ends[i]} and {begins[i + 1]} to {ends[i + 1]}, "
            "expected separate ones"
        )

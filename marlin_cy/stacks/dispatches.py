"""The dispatches of ``gemm_phase_batched``: conversion to an array, and checks."""

from collections.abc import Iterable

import numpy as np

from marlin_cy.arguments import integer

__all__ = ["as_dispatches", "check_dispatches", "check_disjoint"]


def as_dispatches(dispatches):
    """int64 ``[D, 4]`` from what ``gemm_phase_batched`` accepts."""
    if isinstance(dispatches, np.ndarray):
        array = dispatches
        if array.dtype.kind not in "iu" or not np.can_cast(array.dtype, np.int64):
            raise TypeError(f"dispatches: got dtype {array.dtype}, expected int64")
        if array.ndim != 2 or array.shape[1] != 4:
            raise ValueError(f"dispatches: got shape {array.shape}, expected [D, 4]")
        return np.ascontiguousarray(array, np.int64)
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


def check_dispatches(dispatches, num_experts, input_rows, output_rows):
    """Refuse dispatches (int64 ``[D, 4]``) that reach outside."""
    if not len(dispatches):
        return
    experts, in_rows, out_rows, m = dispatches.T
    wrong = (experts < 0) | (experts >= num_experts) | (m < 0)
    wrong |= (in_rows < 0) | (in_rows > input_rows - m) | (out_rows < 0) | (out_rows > output_rows - m)
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


def check_disjoint(dispatches):
    """Refuse output rows that two dispatches write."""
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

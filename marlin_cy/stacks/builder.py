"""The part that the stack builders of all backends share: checks, and a record of the packed columns."""

from __future__ import annotations

import threading
from abc import abstractmethod

import ml_dtypes
import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import integer
from marlin_cy.errors import UnsupportedError
from marlin_cy.interface import MarlinExpertStack, StackBuilder
from marlin_cy.weights.code_types import SCALE_TYPES, code_type
from marlin_cy.weights.int4 import Int4Weight
from marlin_cy.weights.sizes import N_TILE, StackSizes, checked_stack_sizes, normalised_g_idx

__all__ = [
    "N_TILE",
    "CheckedStackBuilder",
    "StackSizes",
    "as_bias",
    "check_weight",
    "checked_stack_sizes",
    "same_groups",
]

BIAS_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))

MISSING, RESERVED, PACKED = 0, 1, 2
"""The states of a column: :meth:`CheckedStackBuilder.add` reserves it, packs it, and marks it as packed."""


class CheckedStackBuilder(StackBuilder):
    """Checks all weights; a subclass packs them.

    Parameters
    ----------
    sizes : StackSizes
        Checked, by :func:`checked_stack_sizes`.
    """

    def __init__(self, sizes: StackSizes) -> None:
        self._sizes = sizes
        self._states = np.full((sizes.num_experts, sizes.n_per_expert), MISSING, np.uint8)
        self._lock = threading.Lock()

    @abstractmethod
    def _pack(self, expert: int, column_offset: int, weight: Int4Weight) -> None:
        """Write a weight that was checked. May run in several threads at once for different columns."""

    @abstractmethod
    def _stack(self, bias: npt.NDArray[np.float32] | None) -> MarlinExpertStack:
        """The stack, after all columns were packed; ``bias`` is float32 ``[num_experts, n_per_expert]`` or None."""

    def add(self, expert: int, column_offset: int, weight: Int4Weight) -> None:
        sizes = self._sizes
        num_experts, n = sizes.num_experts, sizes.n_per_expert
        expert, column_offset = integer("expert", expert), integer("column_offset", column_offset)
        check_weight(weight)
        end = column_offset + weight.n
        if not 0 <= expert < num_experts:
            raise IndexError(f"expert: got {expert}, expected 0 to {num_experts - 1}")
        if column_offset % N_TILE or weight.n % N_TILE:
            raise ValueError(f"column_offset: got columns {column_offset} to {end}, expected multiples of {N_TILE}")
        if column_offset < 0 or end > n:
            raise IndexError(f"column_offset: got columns {column_offset} to {end}, expected a part of 0 to {n}")
        if (weight.k, weight.group_size) != (sizes.k, sizes.group_size):
            raise ValueError(
                f"weight: got k {weight.k} and group_size {weight.group_size}, expected {sizes.k} and "
                f"{sizes.group_size}"
            )
        if (weight.codes, weight.scale.dtype) != (sizes.codes, sizes.scale_dtype):
            raise ValueError(
                f"weight: got codes {weight.codes!r} with {weight.scale.dtype} scales, expected {sizes.codes!r} with "
                f"{sizes.scale_dtype}"
            )
        g_idx = normalised_g_idx(weight.g_idx, sizes.k, sizes.group_size)
        if not same_groups(g_idx, sizes.g_idx[expert]):
            raise UnsupportedError(
                f"weight.g_idx: differs from the builder's g_idx for expert {expert}; the parts of an "
                "expert (gate and up) must have the same order of K, or be loaded as two stacks"
            )
        with self._lock:
            columns = self._states[expert, column_offset:end]
            if columns.any():
                raise ValueError(
                    f"column_offset: columns {column_offset} to {end} of expert {expert} were added before"
                )
            columns[:] = RESERVED
        state = MISSING
        try:
            self._pack(expert, column_offset, weight)
            state = PACKED
        finally:
            with self._lock:
                columns[:] = state

    def finish(self, bias: npt.ArrayLike | None = None) -> MarlinExpertStack:
        with self._lock:
            unfinished = np.argwhere(self._states != PACKED)
            if len(unfinished):
                expert, column = unfinished[0]
                reserved = self._states[expert, column] == RESERVED
                raise ValueError(
                    f"finish: column {column} of expert {expert} "
                    + ("is still being packed by another thread" if reserved else "was not added")
                )
        return self._stack(None if bias is None else as_bias(bias, self._states.shape))


def as_bias(bias: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A float32 copy of a bias of this shape.

    Raises
    ------
    TypeError, ValueError
        ``bias`` has another dtype or shape.
    """
    expected = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    try:
        bias = np.asarray(bias)
    except ValueError as error:
        raise ValueError(f"bias: got {type(bias).__name__} ({error}), expected {expected}") from None
    if bias.dtype not in BIAS_DTYPES:
        raise TypeError(f"bias: got dtype {bias.dtype}, expected float32, float16 or bfloat16")
    if bias.shape != tuple(shape):
        raise ValueError(f"bias: got shape {bias.shape}, expected {expected}")
    return np.array(bias, np.float32, order="C")


def check_weight(weight: object) -> None:
    """Refuse an object that is not an :class:`Int4Weight`, or whose arrays are not as that class describes them.

    Raises
    ------
    TypeError, ValueError
        The message names the attribute.
    """
    if not isinstance(weight, Int4Weight):
        raise TypeError(f"weight: got {type(weight).__name__}, expected Int4Weight")
    try:
        row = code_type(weight.codes)
    except ValueError as error:
        raise ValueError(f"weight.{error}") from None
    if not row.has_zero_points and weight.zero is not None:
        raise TypeError(f"weight.zero: got {type(weight.zero).__name__}, expected None with {row.name!r} codes")
    parts = {"words": [np.dtype(np.uint32)], "scale": [scale.dtype for scale in SCALE_TYPES.values()]}
    if row.has_zero_points:
        parts["zero"] = [np.dtype(np.uint8)]
    for name, dtypes in parts.items():
        array = getattr(weight, name)
        if not isinstance(array, np.ndarray) or array.dtype not in dtypes:
            raise TypeError(
                f"weight.{name}: got {getattr(array, 'dtype', type(array).__name__)}, "
                f"expected {' or '.join(map(str, dtypes))}"
            )
        if array.ndim != 2:
            raise ValueError(f"weight.{name}: got shape {array.shape}, expected two dimensions")
    if integer("weight.group_size", weight.group_size) < 1:
        raise ValueError(f"weight.group_size: got {weight.group_size}, expected at least 1")
    groups = (-(-weight.k // weight.group_size), weight.n)
    for name in [name for name in parts if name != "words"]:
        if getattr(weight, name).shape != groups:
            raise ValueError(f"weight.{name}: got shape {getattr(weight, name).shape}, expected {groups}")
    if weight.zero is not None and weight.zero.max(initial=0) > row.max_zero:
        raise ValueError(f"weight.zero: got {weight.zero.max()}, expected 0 to {row.max_zero}")


def same_groups(a: npt.NDArray[np.int32] | None, b: npt.NDArray[np.int32] | None) -> bool:
    """Whether two normalised ``g_idx`` are equal; None is K's own order."""
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)

"""The part that the stack builders of all backends share: checks, and a record of the packed columns."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import integer
from marlin_cy.errors import UnsupportedError
from marlin_cy.interface import MarlinExpertStack, StackBuilder
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.code_types import code_type
from marlin_cy.weights.scale_records import BLOCK_ROWS, SCALE_RECORDS
from marlin_cy.weights.sizes import N_TILE, StackSizes, checked_stack_sizes, normalised_g_idx
from marlin_cy.weights.stored import StoredWeight

__all__ = [
    "N_TILE",
    "CheckedStackBuilder",
    "StackSizes",
    "as_bias",
    "check_weight",
    "checked_stack_sizes",
    "refuse_unsupported",
    "same_groups",
]

BIAS_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16, np.float64))

MISSING, RESERVED, PACKED = 0, 1, 2
"""The states of a column: :meth:`CheckedStackBuilder.add` reserves it, packs it, and marks it as packed."""


def refuse_unsupported(backend: str, sizes: StackSizes, codes: Collection[str], scales: Collection[str]) -> None:
    """Refuse weights for which a backend has no kernels.

    Parameters
    ----------
    backend : str
        The name of the backend, for messages.
    sizes : StackSizes
    codes, scales : collections of str
        The code types and the scale records that the backend supports.

    Raises
    ------
    UnsupportedError
    """
    for name, value, supported in (("codes", sizes.codes, codes), ("scales", sizes.scales, scales)):
        if value not in supported:
            raise UnsupportedError(
                f"{name}: got {value!r}, the {backend} backend supports {', '.join(map(repr, supported))}"
            )


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
    def _pack(self, expert: int, column_offset: int, weight: CanonicalWeight) -> None:
        """Write a weight that was checked. May run in several threads at once for different columns."""

    @abstractmethod
    def _stack(self, bias: npt.NDArray[np.float32] | None) -> MarlinExpertStack:
        """The stack, after all columns were packed; ``bias`` is float32 ``[num_experts, n_per_expert]`` or None."""

    def add(self, expert: int, column_offset: int, weight: CanonicalWeight) -> None:
        expert, column_offset = integer("expert", expert), integer("column_offset", column_offset)
        check_weight(weight)
        self._check_place(expert, column_offset, weight)
        sizes = self._sizes
        g_idx = normalised_g_idx(weight.g_idx, sizes.k, sizes.group_size)
        if not same_groups(g_idx, sizes.g_idx[expert]):
            raise UnsupportedError(
                f"weight.g_idx: differs from the builder's g_idx for expert {expert}; the parts of an "
                "expert (gate and up) must have the same order of K, or be loaded as two stacks"
            )
        with self._reserved(expert, column_offset, weight.n):
            self._pack(expert, column_offset, weight)

    def _check_place(self, expert: int, column_offset: int, weight: CanonicalWeight | StoredWeight) -> None:
        """Refuse a weight that does not fit the stack, or a place that the stack does not have."""
        sizes, end = self._sizes, column_offset + weight.n
        if not 0 <= expert < sizes.num_experts:
            raise IndexError(f"expert: got {expert}, expected 0 to {sizes.num_experts - 1}")
        if column_offset % N_TILE or weight.n % N_TILE:
            raise ValueError(f"column_offset: got columns {column_offset} to {end}, expected multiples of {N_TILE}")
        if column_offset < 0 or end > sizes.n_per_expert:
            raise IndexError(
                f"column_offset: got columns {column_offset} to {end}, expected a part of 0 to {sizes.n_per_expert}"
            )
        if (weight.k, weight.group_size) != (sizes.k, sizes.group_size):
            raise ValueError(
                f"weight: got k {weight.k} and group_size {weight.group_size}, expected {sizes.k} and "
                f"{sizes.group_size}"
            )
        if (weight.codes, weight.scales) != (sizes.codes, sizes.scales):
            raise ValueError(
                f"weight: got codes {weight.codes!r} with {weight.scales} scales, expected {sizes.codes!r} with "
                f"{sizes.scales}"
            )

    @contextmanager
    def _reserved(self, expert: int, begin: int, n: int) -> Iterator[None]:
        """While these columns are packed. They count as packed afterwards, unless there is an exception."""
        with self._lock:
            columns = self._states[expert, begin : begin + n]
            if columns.any():
                raise ValueError(f"column_offset: columns {begin} to {begin + n} of expert {expert} were added before")
            columns[:] = RESERVED
        state = MISSING
        try:
            yield
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
    """Refuse an object that is not an :class:`CanonicalWeight`, or whose arrays are not as that class describes them.

    Raises
    ------
    TypeError, ValueError
        The message names the attribute.
    """
    if not isinstance(weight, CanonicalWeight):
        raise TypeError(f"weight: got {type(weight).__name__}, expected CanonicalWeight")
    try:
        row = code_type(weight.codes)
    except ValueError as error:
        raise ValueError(f"weight.{error}") from None
    check_array("words", weight.words, [np.dtype(np.uint32)])
    check_array("scale", weight.scale, list({record.scale: None for record in SCALE_RECORDS.values()}))
    try:
        record = SCALE_RECORDS[weight.scales]
    except ValueError as error:
        raise TypeError(f"weight.{error}") from None
    if integer("weight.group_size", weight.group_size) < 1:
        raise ValueError(f"weight.group_size: got {weight.group_size}, expected at least 1")
    group_parts, block_parts = record.group_parts(row), record.block_parts()
    if not record.has_zero_points(row):
        group_parts.pop("zero", None)
        if weight.zero is not None:
            raise TypeError(
                f"weight.zero: got {type(weight.zero).__name__}, expected None with {row.name!r} codes and "
                f"{record.name} scales"
            )
    for parts, rows in ((group_parts, weight.group_size), (block_parts, BLOCK_ROWS)):
        shape = (-(-weight.k // rows), weight.n)
        for name, dtype in parts.items():
            array = check_array(name, getattr(weight, name), [dtype])
            if array.shape != shape:
                raise ValueError(f"weight.{name}: got shape {array.shape}, expected {shape}")
    if weight.zero is not None and weight.zero.max(initial=0) > row.max_zero:
        raise ValueError(f"weight.zero: got {weight.zero.max()}, expected 0 to {row.max_zero}")


def check_array(name: str, array: object, dtypes: list[np.dtype[Any]]) -> npt.NDArray[Any]:
    """An array of a weight, after a check of its type, its dtype and its number of dimensions."""
    if not isinstance(array, np.ndarray) or array.dtype not in dtypes:
        raise TypeError(
            f"weight.{name}: got {getattr(array, 'dtype', type(array).__name__)}, "
            f"expected {' or '.join(map(str, dtypes))}"
        )
    if array.ndim != 2:
        raise ValueError(f"weight.{name}: got shape {array.shape}, expected two dimensions")
    return array


def same_groups(a: npt.NDArray[np.int32] | None, b: npt.NDArray[np.int32] | None) -> bool:
    """Whether two normalised ``g_idx`` are equal; None is K's own order."""
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)

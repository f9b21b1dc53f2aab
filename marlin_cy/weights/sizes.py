"""Checks of a weight's sizes: K and N, the width of codes, group sizes, and ``g_idx``.

Rules of single formats are in the formats' own modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.arguments import integer, sequence
from marlin_cy.errors import UnsupportedError
from marlin_cy.weights.arrays import WORDS, checked_array
from marlin_cy.weights.code_types import CODE_TYPES, CodeType, code_type
from marlin_cy.weights.scale_records import BLOCK_ROWS, ScaleRecord, scale_record

__all__ = [
    "K_STEP",
    "N_TILE",
    "StackSizes",
    "check_bits",
    "checked_group_size",
    "checked_stack_sizes",
    "g_idx_per_expert",
    "integer_codes",
    "normalised_g_idx",
]

K_STEP = 32
"""K is a multiple of this."""

N_TILE = 8
"""Weights and views begin and end at multiples of this many columns: half a packed tile or strip of 16."""

SMALL_GROUPS = (16, 32, 64)
"""The supported group sizes below :data:`GROUP_STEP`. A code type's ``min_group`` excludes the smallest."""

GROUP_STEP = 128
"""Larger group sizes are multiples of this."""

MAX_BLOCK_GROUP = 128
"""The largest group of a two-level record."""

BITS = tuple(sorted({row.bits for row in CODE_TYPES.values()}))
"""The supported widths of codes, in bits."""


@dataclass(frozen=True, eq=False)
class StackSizes:
    """The sizes and types of a stack's weights. :func:`checked_stack_sizes` makes checked ones.

    Attributes
    ----------
    num_experts, k, n_per_expert : int
        Number of experts, and the shape ``[k, n_per_expert]`` of each.
    group_size : int
        Number of rows of K that share a scale; -1 is resolved.
    g_idx : sequence of int32 ``[k]`` or None, one per expert
        The group of each row of K; None for ``row // group_size``.
    codes : str
        The name of the code type.
    scales : str
        The name of the scale record.
    """

    num_experts: int
    k: int
    n_per_expert: int
    group_size: int
    g_idx: Sequence[npt.NDArray[np.int32] | None]
    codes: str = "uint4"
    scales: str = "float16"


def check_bits(name: str, bits: int, supported: Sequence[int] = BITS) -> None:
    """Refuse a width of codes that is not supported, with an :class:`~marlin_cy.errors.UnsupportedError`."""
    if bits not in supported:
        raise UnsupportedError(f"{name}: got {bits}, supported: {', '.join(map(str, supported))}")


def integer_codes(bits: int) -> str:
    """The name of the code type of unsigned integers of this width, which :func:`check_bits` has checked."""
    return f"uint{bits}"


def checked_group_size(
    *, group_size: int, k: int, n: int, bits: int = 4, label: str = "", n_name: str = "n", codes: str | None = None
) -> int:
    """The number of rows of K that share a scale, after all sizes were checked. -1 becomes ``k``.

    Parameters
    ----------
    group_size : int
        32, 64, a multiple of 128, or one group of all of K: ``k`` or -1. With some code types also 16.
    k, n : int
        Multiples of 32 and of 8.
    bits : int
        The width of a code.
    label : str
        Follows each argument's name in messages: ``" of expert 3"``.
    n_name : str
        The caller's name of ``n``, for messages.
    codes : str, optional
        The name of the code type; by default unsigned integers of this width.

    Raises
    ------
    TypeError
        A size is not an integer.
    ValueError
        A size is not positive, or not a multiple of its unit.
    UnsupportedError
        No kernel supports ``bits`` or ``group_size``.
    """
    bits = integer(f"bits{label}", bits)
    group_size = integer(f"group_size{label}", group_size)
    for name, size, unit in (("k", k, K_STEP), (n_name, n, N_TILE)):
        size = integer(f"{name}{label}", size)
        if size <= 0 or size % unit:
            raise ValueError(f"{name}{label}: got {size}, expected a positive multiple of {unit}")
    if codes is None:
        check_bits(f"bits{label}", bits)
    if group_size in (-1, k):
        return k
    if group_size <= 0:
        raise ValueError(f"group_size{label}: got {group_size}, expected a positive number, or -1 for one group")
    row = code_type(integer_codes(bits) if codes is None else codes)
    small = [size for size in SMALL_GROUPS if size >= row.min_group]
    if group_size not in small and group_size % GROUP_STEP:
        raise UnsupportedError(
            f"group_size{label}: got {group_size}, supported are {', '.join(map(str, small))}, multiples of "
            f"{GROUP_STEP}, and -1 or k ({k}) for one group"
        )
    return group_size


def normalised_g_idx(
    g_idx: npt.ArrayLike | None, k: int, group_size: int, label: str = ""
) -> npt.NDArray[np.int32] | None:
    """A private, checked copy of ``g_idx``; None if ``g_idx`` is None or equals ``k // group_size`` for every k.

    The copy is made before the check, so that another thread that writes to ``g_idx`` cannot change a checked value.

    Parameters
    ----------
    g_idx : int32 or uint32 ``[k]``, or None
        The group of each row of K.
    k, group_size : int
        Checked, -1 resolved.
    label : str
        As in :func:`checked_group_size`.

    Raises
    ------
    TypeError, ValueError
        ``g_idx`` has another dtype or shape.
    IndexError
        An entry is not in ``0 .. ceil(k / group_size) - 1``.
    """
    if g_idx is None:
        return None
    own = checked_array(f"g_idx{label}", g_idx, WORDS, (k,)).copy()
    groups = -(-k // group_size)
    # A negative entry is a large one when it is read as unsigned.
    outside = own.view(np.uint32) >= groups
    if outside.any():
        first = int(np.argmax(outside))
        raise IndexError(f"g_idx{label}: got {own[first]} at row {first}, expected 0 to {groups - 1}")
    own = own.view(np.int32)
    return None if np.array_equal(own, np.arange(k, dtype=np.int32) // group_size) else own


def g_idx_per_expert(g_idx: Any, num_experts: int, k: int) -> list[Any]:
    """A list of one ``g_idx`` (or None) per expert.

    Parameters
    ----------
    g_idx : None, array ``[k]``, array ``[num_experts, k]``, or sequence of arrays ``[k]`` and Nones
        A single array ``[k]`` is used for all experts.
    num_experts, k : int

    Raises
    ------
    TypeError
        ``g_idx`` is not a sequence.
    ValueError
        ``g_idx`` has another shape or length. :func:`normalised_g_idx` checks the entries.
    """
    if g_idx is None:
        return [None] * num_experts
    ndim = getattr(g_idx, "ndim", None)
    if ndim == 1:
        if len(g_idx) != k:
            raise ValueError(f"g_idx: got shape ({len(g_idx)},), expected ({k},) or one per expert")
        return [g_idx] * num_experts
    if ndim not in (None, 2):
        raise ValueError(f"g_idx: got {ndim} dimensions, expected ({k},) or ({num_experts}, {k})")
    entries = list(sequence("g_idx", g_idx))
    if len(entries) != num_experts:
        raise ValueError(f"g_idx: got {len(entries)} entries, expected one per expert: {num_experts}")
    return entries


def checked_stack_sizes(
    num_experts: int,
    k: int,
    n_per_expert: int,
    group_size: int,
    g_idx: Any,
    codes: str,
    scales: str | npt.DTypeLike,
) -> StackSizes:
    """The arguments of :meth:`~marlin_cy.interface.Backend.new_stack_builder`, checked.

    The arrays of ``g_idx`` are private copies. Experts that were given the same array share one copy.

    Raises
    ------
    TypeError, ValueError, IndexError, UnsupportedError
        The message names the argument.
    """
    num_experts, k = integer("num_experts", num_experts), integer("k", k)
    n_per_expert = integer("n_per_expert", n_per_expert)
    for name, value, multiple in (
        ("num_experts", num_experts, 1),
        ("k", k, K_STEP),
        ("n_per_expert", n_per_expert, N_TILE),
    ):
        if value < 1 or value % multiple:
            raise ValueError(f"{name}: got {value}, expected a positive multiple of {multiple}")
    row, record = code_type(codes), scale_record(scales)
    group_size = checked_group_size(group_size=group_size, k=k, n=n_per_expert, bits=row.bits, codes=row.name)
    check_record(row, record, k, group_size, g_idx)
    given = g_idx_per_expert(g_idx, num_experts, k)
    copies: dict[int, npt.NDArray[np.int32] | None] = {}
    for expert, groups in enumerate(given):
        if id(groups) not in copies:
            copies[id(groups)] = normalised_g_idx(groups, k, group_size, f" of expert {expert}")
    return StackSizes(
        num_experts, k, n_per_expert, group_size, [copies[id(groups)] for groups in given], row.name, record.name
    )


def check_record(codes: CodeType, record: ScaleRecord, k: int, group_size: int, g_idx: Any) -> None:
    """Refuse a scale record that does not go with the other sizes.

    Raises
    ------
    ValueError
        Minima with a code type without zero points; two levels with a ``k`` or a ``group_size`` that does not fit
        blocks of 256 rows, or with ``g_idx``.
    """
    if record.has_minimum and not codes.has_zero_points:
        raise ValueError(f"scales: got {record.name!r}, expected a record without minima for {codes.name!r} codes")
    if not record.has_blocks:
        return
    if k % BLOCK_ROWS:
        raise ValueError(f"k: got {k}, expected a multiple of {BLOCK_ROWS} with {record.name!r} scales")
    if group_size > MAX_BLOCK_GROUP:
        raise ValueError(
            f"group_size: got {group_size}, expected at most {MAX_BLOCK_GROUP} with {record.name!r} scales"
        )
    if g_idx is not None and any(groups is not None for groups in g_idx):
        raise ValueError(f"g_idx: got one, expected None with {record.name!r} scales")

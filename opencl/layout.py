"""The layout of packed weights in plain NumPy: its sizes, and a packer that tests compare with the device's packer.

The layout is drawn in ``kernels/common.cl``. Sizes are in uint32 ("words") unless stated otherwise.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.order import GroupOrder

__all__ = ["ExpertLayout", "expert_layout", "pack_expert", "unpack_expert"]

STRIP_N = 16
BLOCK_K = 64
BLOCK_WORDS = 128
EXPERT_ALIGNMENT = 64
MAX_GROUP_SHIFT = 7
ROW_NIBBLES = (0, 4, 2, 6)  # of a word's four rows in the strip's first eight columns; 1 more in the last eight


@dataclass(frozen=True)
class ExpertLayout:
    """Sizes of one packed expert.

    Attributes
    ----------
    packed_k : int
        Rows: a multiple of 32.
    n : int
        Columns: a multiple of 8.
    group_shift : int
        A group has ``2**group_shift`` rows.
    has_zeros : bool
        Whether zero points are stored.
    """

    packed_k: int
    n: int
    group_shift: int
    has_zeros: bool = True

    @property
    def strips(self) -> int:
        """Strips of 16 columns; the last may be half padding."""
        return -(-self.n // STRIP_N)

    @property
    def k_blocks(self) -> int:
        """Blocks of 64 rows; the last may be half padding."""
        return -(-self.packed_k // BLOCK_K)

    @property
    def groups(self) -> int:
        """Packed groups."""
        return -(-self.packed_k // (1 << self.group_shift))

    @property
    def words(self) -> int:
        """Words of codes; the scales follow them."""
        return self.strips * self.k_blocks * BLOCK_WORDS

    @property
    def scale_offset(self) -> int:
        """The first word of the scales."""
        return self.words

    @property
    def zero_offset(self) -> int:
        """The first word of the zero points. Without zero points, the end of the scales."""
        return self.words + self.strips * self.groups * STRIP_N // 2

    @property
    def expert_words(self) -> int:
        """Words from one expert to the next."""
        end = self.zero_offset + self.has_zeros * self.strips * self.groups * STRIP_N // 4
        return -(-end // EXPERT_ALIGNMENT) * EXPERT_ALIGNMENT


def expert_layout(packed_k: int, n: int, packed_group_size: int, has_zeros: bool = True) -> ExpertLayout:
    """The layout for packed groups of ``packed_group_size`` rows: a power of two, or all of K as one group."""
    power_of_two = packed_group_size & (packed_group_size - 1) == 0
    return ExpertLayout(packed_k, n, packed_group_size.bit_length() - 1 if power_of_two else MAX_GROUP_SHIFT, has_zeros)


def place(row: int, column: int) -> tuple[int, int, int, int, int]:
    """``(strip, block, lane, step, nibble)`` of a packed row and a column."""
    strip, half, g = column // STRIP_N, column % STRIP_N // 8, column % 8
    block, half_block, t = row // BLOCK_K, row % BLOCK_K // 32, row % 32 // 8
    return strip, block, 4 * g + t, 2 * half_block + row % 8 // 4, ROW_NIBBLES[row % 4] + half


def pack_expert(
    q: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.float16],
    zero: npt.NDArray[np.uint8] | None,
    order: GroupOrder,
    layout: ExpertLayout,
) -> npt.NDArray[np.uint32]:
    """One packed expert, uint32 ``[layout.expert_words]``, by simple loops.

    Parameters
    ----------
    q : uint8 ``[K, N]`` in 0..15
    scale : float16 ``[G, N]``
    zero : uint8 ``[G, N]``, or None if the layout has no zero points
    order : GroupOrder
    layout : ExpertLayout
        Its ``packed_k`` may exceed the order's; the remaining rows are zeros.
    """
    expert = np.zeros(layout.expert_words, np.uint32)
    words, scales, zeros = sections(expert, layout)
    rows = np.arange(order.packed_k) if order.rows is None else order.rows
    for column in range(layout.n):
        for position, row in enumerate(rows):
            if row >= 0:
                strip, block, lane, step, nibble = place(position, column)
                words[strip, block, lane, step] |= np.uint32(q[row, column]) << np.uint32(4 * nibble)
        strip, half, g = column // STRIP_N, column % STRIP_N // 8, column % 8
        for group, scale_row in enumerate(order.scale_rows):
            scales[strip, group, g] |= np.uint32(scale[scale_row, column].view(np.uint16)) << np.uint32(16 * half)
            if zero is not None:
                zeros[strip, group, g] |= np.uint16(zero[scale_row, column]) << np.uint16(8 * half)
    return expert


def unpack_expert(
    expert: npt.NDArray[np.uint32], order: GroupOrder, layout: ExpertLayout, k: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
    """``(q, scale, zero)`` of one packed expert, each ``[k, n]`` by rows of K: uint8, float16 and uint8, which is 0 if
    there are no zero points."""
    words, scales, zeros = sections(expert, layout)
    rows = np.arange(order.packed_k) if order.rows is None else order.rows
    shape = k, layout.n
    q, scale, zero = np.zeros(shape, np.uint8), np.zeros(shape, np.float16), np.zeros(shape, np.uint8)
    for position, row in enumerate(rows):
        if row < 0:
            continue
        group = position >> layout.group_shift
        for column in range(layout.n):
            strip, block, lane, step, nibble = place(position, column)
            q[row, column] = words[strip, block, lane, step] >> np.uint32(4 * nibble) & np.uint32(15)
            half, g = column % STRIP_N // 8, column % 8
            scale[row, column] = np.uint16(scales[strip, group, g] >> np.uint32(16 * half) & 0xFFFF).view(np.float16)
            if layout.has_zeros:
                zero[row, column] = zeros[strip, group, g] >> np.uint16(8 * half) & 0xFF
    return q, scale, zero


def sections(
    expert: npt.NDArray[np.uint32], layout: ExpertLayout
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32], Any]:
    """Views of one packed expert: words uint32 ``[strips, k_blocks, 32, 4]``, scales uint32 and zeros (or None) uint16
    ``[strips, groups, 8]``."""
    groups = layout.strips, layout.groups, 8
    words = expert[: layout.words].reshape(layout.strips, layout.k_blocks, 32, 4)
    scales = expert[layout.scale_offset : layout.zero_offset].reshape(groups)
    if not layout.has_zeros:
        return words, scales, None
    zeros = expert[layout.zero_offset :].view(np.uint16)[: np.prod(groups)].reshape(groups)
    return words, scales, zeros

"""The layout of packed weights in plain NumPy: its sizes, and a packer that tests compare with the device's packer.

The layout is drawn in ``kernels/common.cl``. Sizes are in uint32 ("words") unless stated otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.weights.code_types import CODE_TYPES, CodeType
from marlin_cy.weights.order import GroupOrder
from marlin_cy.weights.scale_records import BLOCK_ROWS, SCALE_RECORDS, ScaleRecord

__all__ = ["ExpertLayout", "Place", "expert_layout", "pack_expert", "stored_scales", "unpack_expert"]

STRIP_N = 16
BLOCK_K = 64
BLOCK_WORDS = 128  # of 4-bit codes
EXPERT_ALIGNMENT = 64
MAX_GROUP_SHIFT = 7
SMALL_GROUP_SHIFT = 4
ROW_NIBBLES = (0, 4, 2, 6)  # of a word's four rows in the strip's first eight columns; 1 more in the last eight


def stored_scales(scales: str) -> str:
    """The scale record that device memory has for weights of a scale record: bfloat16 scales become float16."""
    return "float16" if scales == "bfloat16" else scales


@dataclass(frozen=True)
class Place:
    """Where a part of the scale records lies in an expert.

    Attributes
    ----------
    base : int
        Bytes from the expert's first byte to the part's first value.
    record_bytes : int
        Bytes from one pair of columns, g and g + 8, to the next.
    rows : int
        Pairs of 16 columns follow each other for each packed group, or for each block of 256 packed rows.
    dtype : dtype
        The value of column g + 8 follows that of column g.
    of_blocks : bool
        Whether the rows are those of blocks.
    """

    base: int
    record_bytes: int
    rows: int
    dtype: np.dtype[Any]
    of_blocks: bool = False

    def of(self, strip: int, row: int, column: int) -> int:
        """The byte of the value of a column of a strip, 0 to 15."""
        pair = (strip * self.rows + row) * 8 + column % 8
        return self.base + pair * self.record_bytes + column // 8 * self.dtype.itemsize


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
    codes, scales : str
        The names of the code type, and of the scale record that is stored.
    """

    packed_k: int
    n: int
    group_shift: int
    codes: str = "uint4"
    scales: str = "float16"

    @property
    def code_type(self) -> CodeType:
        """The code type."""
        return CODE_TYPES[self.codes]

    @property
    def record(self) -> ScaleRecord:
        """The scale record."""
        return SCALE_RECORDS[self.scales]

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
    def scale_blocks(self) -> int:
        """Blocks of 256 packed rows."""
        return -(-self.packed_k // BLOCK_ROWS)

    @property
    def has_zeros(self) -> bool:
        """Whether zero points are stored."""
        return self.record.has_zero_points(self.code_type)

    @property
    def words(self) -> int:
        """Words of codes; the scales follow them."""
        return self.strips * self.k_blocks * BLOCK_WORDS * self.code_type.bits // 4

    @property
    def scale_offset(self) -> int:
        """The first word of the records of groups: scales, or sub-scales, with their minima."""
        return self.words

    @property
    def zero_offset(self) -> int:
        """The first word of the zero points or the block scales. Without them, the end of the records of groups."""
        return self.words + self.strips * self.groups * 8 * self.record_bytes // 4

    @property
    def sections(self) -> tuple[tuple[int, int], ...]:
        """``(first word, words)`` of the codes, the records of groups, and the zero points or the block scales. A
        section has as many words for each strip."""
        sections = (0, self.words), (self.scale_offset, self.zero_offset - self.scale_offset)
        return (*sections, (self.zero_offset, self.end - self.zero_offset)) if self.end > self.zero_offset else sections

    @property
    def record_bytes(self) -> int:
        """Bytes of two columns of a group's record, without zero points."""
        return 2 * self.record.scale.itemsize * (1 + self.record.has_minimum)

    @property
    def places(self) -> Mapping[str, Place]:
        """Where the parts of a weight's scale record lie, by the names of a canonical weight's attributes."""
        record, begin, second = self.record, 4 * self.scale_offset, 4 * self.zero_offset
        rows, record_bytes = self.second_record
        places = {"scale": Place(begin, self.record_bytes, self.groups, record.scale)}
        if record.has_minimum:
            minimum = begin + 2 * record.scale.itemsize
            places["minimum"] = Place(minimum, self.record_bytes, self.groups, record.scale)
        if self.has_zeros:
            zero = self.code_type.zero_dtype
            places["zero"] = Place(second, record_bytes, rows, zero)
        for name, dtype in record.block_parts().items():
            places[name] = Place(second, record_bytes, rows, dtype, of_blocks=True)
            second += 2 * dtype.itemsize
        return places

    @property
    def second_record(self) -> tuple[int, int]:
        """Of the zero points or the block scales: the rows of a strip, and the bytes of two columns of a row."""
        if self.has_zeros:
            return self.groups, 2 * self.code_type.zero_dtype.itemsize
        return self.scale_blocks, 2 * sum(dtype.itemsize for dtype in self.record.block_parts().values())

    @property
    def end(self) -> int:
        """Words of an expert without its padding."""
        rows, record_bytes = self.second_record
        return self.zero_offset + self.strips * rows * 8 * record_bytes // 4

    @property
    def expert_words(self) -> int:
        """Words from one expert to the next."""
        return -(-self.end // EXPERT_ALIGNMENT) * EXPERT_ALIGNMENT


def expert_layout(
    packed_k: int, n: int, packed_group_size: int, codes: str = "uint4", scales: str = "float16"
) -> ExpertLayout:
    """The layout for packed groups of ``packed_group_size`` rows: a power of two, or all of K as one group."""
    power_of_two = packed_group_size & (packed_group_size - 1) == 0
    shift = packed_group_size.bit_length() - 1 if power_of_two else MAX_GROUP_SHIFT
    return ExpertLayout(packed_k, n, shift, codes, stored_scales(scales))


def place(row: int, column: int, layout: ExpertLayout) -> tuple[int, int]:
    """``(word, bit)`` of the code of a packed row and a column: the word of the expert, and the code's lowest bit."""
    strip, half, g = column // STRIP_N, column % STRIP_N // 8, column % 8
    block, half_block, row = row // BLOCK_K, row % BLOCK_K // 32, row % 32
    if layout.group_shift == SMALL_GROUP_SHIFT:
        step, t = row // 16, row % 16 // 4
    else:
        t, step = row // 8, row % 8 // 4
    lane, of_four = 4 * g + t, row % 4
    first = (strip * layout.k_blocks + block) * BLOCK_WORDS
    if layout.code_type.bits == 4:
        return first + 4 * lane + 2 * half_block + step, 4 * (ROW_NIBBLES[of_four] + half)
    return 2 * first + BLOCK_WORDS * half_block + 4 * lane + 2 * step + of_four // 2, 16 * (of_four % 2) + 8 * half


def pack_expert(
    q: npt.NDArray[np.uint8], parts: Mapping[str, npt.NDArray[Any]], order: GroupOrder, layout: ExpertLayout
) -> npt.NDArray[np.uint32]:
    """One packed expert, uint32 ``[layout.expert_words]``, by simple loops.

    Parameters
    ----------
    q : uint8 ``[K, N]``
        Codes.
    parts : dict of str to array ``[G or B, N]``
        Those of ``layout.places``, in their dtypes.
    order : GroupOrder
    layout : ExpertLayout
        Its ``packed_k`` may exceed the order's; the remaining rows are zeros.
    """
    expert = np.zeros(layout.expert_words, np.uint32)
    rows = np.arange(order.packed_k) if order.rows is None else order.rows
    for column in range(layout.n):
        for position, row in enumerate(rows):
            if row >= 0:
                word, bit = place(position, column, layout)
                expert[word] |= np.uint32(q[row, column]) << np.uint32(bit)
    data = expert.view(np.uint8)
    for name, where in layout.places.items():
        from_rows = np.arange(where.rows) if where.of_blocks else order.scale_rows
        for column in range(layout.n):
            for packed_row, row in enumerate(from_rows):
                begin = where.of(column // STRIP_N, packed_row, column % STRIP_N)
                value = parts[name][row, column]
                data[begin : begin + where.dtype.itemsize] = np.frombuffer(value.tobytes(), np.uint8)
    return expert


def unpack_expert(
    expert: npt.NDArray[np.uint32], order: GroupOrder, layout: ExpertLayout, k: int
) -> tuple[npt.NDArray[np.uint8], dict[str, npt.NDArray[Any]]]:
    """``(q, parts)`` of one packed expert, all ``[k, n]`` by rows of K: the codes, uint8, and the parts of
    ``layout.places``, in their dtypes."""
    rows = np.arange(order.packed_k) if order.rows is None else order.rows
    places, data = layout.places, expert.view(np.uint8)
    q = np.zeros((k, layout.n), np.uint8)
    parts = {name: np.zeros((k, layout.n), where.dtype) for name, where in places.items()}
    for position, row in enumerate(rows):
        if row < 0:
            continue
        for column in range(layout.n):
            word, bit = place(position, column, layout)
            q[row, column] = expert[word] >> np.uint32(bit) & np.uint32(2**layout.code_type.bits - 1)
            for name, where in places.items():
                packed_row = position // BLOCK_ROWS if where.of_blocks else position >> layout.group_shift
                begin = where.of(column // STRIP_N, packed_row, column % STRIP_N)
                parts[name][row, column] = data[begin : begin + where.dtype.itemsize].view(where.dtype)[0]
    return q, parts

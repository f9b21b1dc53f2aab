"""The packed weights of a stack in device memory, and the builder that packs them there.

The layout is drawn in ``kernels/common.cl`` and written out in plain NumPy in ``layout.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.errors import UnsupportedError
from marlin_cy.opencl.arguments import arguments_of, pack_values_values, pack_words_values, rescale_values
from marlin_cy.opencl.gemm.codes import code_macros
from marlin_cy.opencl.launch import Launch
from marlin_cy.opencl.layout import STRIP_N, ExpertLayout, expert_layout
from marlin_cy.opencl.memory import (
    Memory,
    live_stores,
    memory_errors,
    too_little_memory,
    uploaded,
    zeroed_buffers,
)
from marlin_cy.stacks.builder import CheckedStackBuilder
from marlin_cy.weights.canonical import CanonicalWeight
from marlin_cy.weights.code_types import CODE_TYPES
from marlin_cy.weights.order import distinct_orders, packed_group_size, rows_of_orders
from marlin_cy.weights.sizes import StackSizes

if TYPE_CHECKING:
    from marlin_cy.opencl.stack import OpenClMarlinExpertStack, Runtime

__all__ = ["OpenClGptqStore", "OpenClStackBuilder"]

PARTS = (1, 2, 4, 8)  # numbers of buffers that kernels can be compiled for
STAGING_BYTES = 64 << 20  # size of the staging buffers; a launch reads it in well under a millisecond
SCALE_EXPONENT = 15  # stored scales are below 2**15
MIN_FACTOR = (
    2.0**-120
)  # the smallest for kernels; half of it, and its products with the tiers' units, are normal floats
MAX_SCALE = 2.0**118  # kernels multiply a weight_factor of at most 2**103 by up to 2**24 (EVEN_UNIT of mma.cl)
LARGEST_FLOAT16 = 65504.0
PACK_MACROS = ("CODE_BITS", "GROUP_16")
FLOAT_PARTS = ("scale", "minimum", "block_scale", "block_minimum")


class OpenClGptqStore:
    """The packed weights of ``num_experts`` experts in one buffer, or in several if they exceed the largest buffer.

    A new store is empty (all weights are zero); :class:`OpenClStackBuilder` fills it.

    Parameters
    ----------
    runtime : object
        ``context``, ``device``, ``loading_queue`` (in-order) with ``loading_lock``, ``max_alloc_bytes``.
    sizes : StackSizes
        Checked. bfloat16 scales are stored as float16, other scale records as they are.

    Attributes
    ----------
    runtime : object
    layout : ExpertLayout
    parts : list of pyopencl.Buffer
        1, 2, 4 or 8 entries. If fewer buffers hold all experts, the last buffer is repeated.
    experts_per_part : int
        Experts in each part but the last.
    order : pyopencl.Buffer or None
        int32 ``[1 or num_experts, packed_k]``: row of K at each packed position, -1 for padding. One row
        if all experts have the same order; None if the order is K's own.
    group_orders : list of GroupOrder
        The distinct orders of the experts' rows.
    order_of : int32 ``[num_experts]``
        Index in ``group_orders`` of each expert's order.
    symmetric : bool
        Every zero point is the one of symmetric quantisers, or none is stored. Like ``weight_factor``, it is set when
        the builder finishes.
    weight_factor : float
        A power of two, 2**-147 to 2**103, by which stored scales must be multiplied. Stored scales of the record
        "float16" are float16, the largest from 2**14 to 2**15. Each has an error of at most 2**-39 of the largest
        scale; smaller scales become 0. With other records, scales are stored exactly, and the factor is 1.
    nbytes : int
        Device memory of the weights.

    Raises
    ------
    DeviceMemoryError
        The device has too little memory, or an eighth of the experts exceeds its largest buffer.
        Nothing stays allocated, and the context is unchanged.
    """

    def __init__(self, runtime: Memory, sizes: StackSizes) -> None:
        self.num_experts, self.k, self.n = num_experts, k, n = sizes.num_experts, sizes.k, sizes.n_per_expert
        self.weight_group_size, self.codes = sizes.group_size, sizes.codes
        self.group_orders, self.order_of = distinct_orders(sizes.g_idx, k, sizes.group_size)
        packed_k = max(order.packed_k for order in self.group_orders)
        self.layout = expert_layout(packed_k, n, packed_group_size(sizes.group_size), sizes.codes, sizes.scales)
        self.symmetric, self.weight_factor = False, 1.0
        self.runtime, self.device = runtime, runtime.device
        expert_bytes = 4 * self.expert_words
        self.nbytes = num_experts * expert_bytes
        what = f"packed weights: {num_experts} experts of [{k}, {n}] in at most {PARTS[-1]} buffers"
        self.experts_per_part, count = cut_into_parts(num_experts, runtime.max_alloc_bytes // expert_bytes)
        if not count or self.nbytes > self.device.global_mem_size:
            raise too_little_memory(runtime, f"{what}: {self.nbytes} bytes do not fit")
        experts = [
            min(self.experts_per_part, num_experts - first) for first in range(0, num_experts, self.experts_per_part)
        ]
        self._buffers = zeroed_buffers(runtime, [expert_bytes * number for number in experts], what)
        self.parts = self._buffers + self._buffers[-1:] * (count - len(experts))
        live_stores.add(self)
        rows = rows_of_orders(self.group_orders, k)
        try:
            if rows is None:
                self.order = None
            else:
                self.order = uploaded(runtime, rows if len(rows) == 1 else rows[self.order_of], "orders of K")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Free the weights' memory without waiting for the garbage collector."""
        live_stores.discard(self)
        while self._buffers:
            self._buffers.pop().release()

    @property
    def scales(self) -> str:
        """The name of the scale record that is stored."""
        return self.layout.scales

    @property
    def weight_macros(self) -> dict[str, int]:
        """The macros that tell a program of products what the weights are."""
        return code_macros(self.codes, self.symmetric, self.scales, self.group_shift)

    @property
    def weight_factors(self) -> tuple[float, float]:
        """``weight_factor`` as a product of two normal float32; the second is 1 unless the factor is subnormal."""
        first = max(self.weight_factor, MIN_FACTOR)
        return first, self.weight_factor / first

    @property
    def packed_k(self) -> int:
        """Packed rows: K, plus the padding of groups."""
        return self.layout.packed_k

    @property
    def groups(self) -> int:
        """Packed groups."""
        return self.layout.groups

    @property
    def group_shift(self) -> int:
        """Binary logarithm of the rows in a packed group."""
        return self.layout.group_shift

    @property
    def expert_words(self) -> int:
        """Distance of two experts, in uint32."""
        return self.layout.expert_words

    @property
    def act_order(self) -> bool:
        """Whether the rows of K of any expert are packed in another order than K's own."""
        return self.order is not None

    def place(self, expert: int) -> tuple[cl.Buffer, int]:
        """``(part, word)``: the buffer of an expert, and where the expert begins in it."""
        part, index = divmod(expert, self.experts_per_part)
        return self.parts[part], index * self.expert_words

    def read(self, queue: cl.CommandQueue, expert: int) -> npt.NDArray[np.uint32]:
        """One packed expert, uint32 ``[expert_words]``. For tests and inspection."""
        part, word = self.place(expert)
        packed = np.empty(self.expert_words, np.uint32)
        cl.enqueue_copy(queue, packed, part, src_offset=4 * word)
        return packed


class OpenClStackBuilder(CheckedStackBuilder):
    """Packs weights on the device: uploads canonical weights, some columns at a time, and packs them there.

    Parameters
    ----------
    runtime : object
        As for :class:`OpenClGptqStore`, with ``programs`` (ProgramCache) and ``make_stack(store, bias)`` as well.
    sizes : StackSizes
        Checked, by :func:`~marlin_cy.stacks.builder.checked_stack_sizes`.

    Raises
    ------
    DeviceMemoryError
        As :class:`OpenClGptqStore`; also raised by :meth:`add`.
    """

    def __init__(self, runtime: Runtime, sizes: StackSizes) -> None:
        self._store = store = OpenClGptqStore(runtime, sizes)
        try:
            super().__init__(sizes)
            self._runtime = runtime
            self._pack_words = pack_launch(runtime, "pack_words", store)
            self._pack_values = pack_launch(runtime, "pack_values", store)
            self._staging: Staging | None = Staging(runtime, sizes, store.layout)
            self._from_rows = rows_of_parts(store, runtime)
        except BaseException:
            store.release()
            raise
        self._symmetric = True
        self._largest = 0.0  # magnitude of a scale

    def _pack(self, expert: int, column_offset: int, weight: CanonicalWeight) -> None:
        runtime, staging = self._runtime, self._staging
        assert staging is not None  # until _stack
        row = CODE_TYPES[weight.codes]
        symmetric = weight.zero is None or bool((weight.zero == row.symmetric_zero).all())
        largest = largest_scale(weight)
        for begin in range(0, weight.n, staging.columns):
            columns = slice(begin, begin + staging.columns)
            parts = [weight.words, *(getattr(weight, name) for name in staging.parts)]
            arrays = [np.ascontiguousarray(part[:, columns]) for part in parts]
            with runtime.loading_lock, memory_errors(runtime, staging.nbytes, "staging of weights"):
                staging.upload(arrays)
                self._launch(staging, expert, column_offset + begin, arrays[0].shape[1])
        with self._lock:
            self._symmetric = self._symmetric and symmetric
            self._largest = max(self._largest, largest)

    def _launch(self, staging: Staging, expert: int, column_offset: int, n: int) -> None:
        """Pack the contents of the staging buffers. The caller holds the loading lock."""
        store, queue = self._store, self._runtime.loading_queue
        layout, order = store.layout, int(store.order_of[expert])
        part, base = store.place(expert)
        strips = (column_offset + n - 1) // STRIP_N - column_offset // STRIP_N + 1
        self._pack_words(
            queue,
            (32 * strips, layout.k_blocks),
            None,
            pack_words_values(
                words=staging.words,
                n=n,
                rows=store.order,
                rows_offset=0 if len(store.group_orders) == 1 else expert * layout.packed_k,
                packed_k=layout.packed_k,
                packed=part,
                base=base,
                column_offset=column_offset,
            ),
        )
        for name, where in staging.places.items():
            self._pack_values(
                queue,
                (n, where.rows),
                None,
                pack_values_values(
                    values=staging.parts[name],
                    size=where.dtype.itemsize,
                    n=n,
                    from_rows=self._from_rows[where.of_blocks],
                    from_offset=0 if where.of_blocks else order * layout.groups,
                    packed=part,
                    base=4 * base + where.base,
                    record_bytes=where.record_bytes,
                    column_offset=column_offset,
                ),
            )

    def _stack(self, bias: npt.NDArray[np.float32] | None) -> OpenClMarlinExpertStack:
        runtime, store = self._runtime, self._store
        if self._staging is not None:
            with runtime.loading_lock, memory_errors(runtime, store.nbytes, "packing of weights"):
                store.symmetric = self._symmetric
                self._normalise()
                # Other queues may read the weights from here on.
                runtime.loading_queue.finish()
            self._staging = None
            self._from_rows.clear()
        return runtime.make_stack(store, bias)

    def _normalise(self) -> None:
        """Make all scales float16, the largest 2**14 or more and below 2**15, by one power of two.

        Tensor-core kernels multiply float16 codes by scales, so no scale may overflow, and small scales should keep
        their bits. float16 scales keep them, except subnormal scales in a stack with scales of 2**15 and more. bfloat16
        scales keep them if they are at least 2**-31 of the largest scale.
        """
        store = self._store
        if not self._largest or store.scales != "float16":
            return
        exponent = SCALE_EXPONENT - math.frexp(self._largest)[1]
        rescale = pack_launch(self._runtime, "rescale", store)
        for index, buffer in enumerate(store._buffers):
            experts = min(store.experts_per_part, store.num_experts - index * store.experts_per_part)
            rescale(
                self._runtime.loading_queue,
                (2 * (store.layout.zero_offset - store.layout.scale_offset), experts),
                None,
                rescale_values(
                    packed=buffer,
                    expert_words=store.expert_words,
                    scale_base=store.layout.scale_offset,
                    exponent=exponent,
                    bfloat16=int(self._sizes.scales != "float16"),
                ),
            )
        store.weight_factor = 2.0**-exponent


def pack_launch(runtime: Runtime, name: str, store: OpenClGptqStore) -> Launch:
    """A :class:`Launch` of a kernel of ``pack.cl``, for one user, who packs into a store."""
    macros = {name: store.weight_macros[name] for name in PACK_MACROS}
    return Launch(runtime.programs.kernel("pack", name, macros), arguments_of(name, macros))


def rows_of_parts(store: OpenClGptqStore, runtime: Runtime) -> list[cl.Buffer]:
    """The rows of a weight's parts that packed rows come from.

    Two buffers: for packed groups int32 ``[orders, groups]``, -1 for padding; for blocks of 256 packed rows int32
    ``[blocks]``.
    """
    of_groups = np.full((len(store.group_orders), store.groups), -1, np.int32)
    for rows, order in zip(of_groups, store.group_orders, strict=True):
        rows[: len(order.scale_rows)] = order.scale_rows
    of_blocks = np.arange(store.layout.scale_blocks, dtype=np.int32)
    return [uploaded(runtime, rows, "rows of scales") for rows in (of_groups, of_blocks)]


def largest_scale(weight: CanonicalWeight) -> float:
    """The largest magnitude of scales and minima; refuses those that are too large for the kernels."""
    largest = 0.0
    for name in FLOAT_PARTS:
        part = getattr(weight, name)
        if part is None or part.dtype.kind in "iu":
            continue
        unsigned = np.dtype(f"u{part.dtype.itemsize}")
        # All bits but the sign are ordered as the magnitudes are.
        bits = (part.view(unsigned) & unsigned.type(np.iinfo(unsigned).max >> 1)).max(initial=0)
        found = float(bits.view(part.dtype))
        if part.dtype == np.float16:
            found = min(LARGEST_FLOAT16, found)  # in this order also of a NaN
        elif not found < MAX_SCALE:
            raise UnsupportedError(
                f"weight.{name}: got {found:g}, expected magnitudes below 2**118, "
                "whose products with codes float32 holds"
            )
        largest = max(largest, found)
    return largest


class Staging:
    """Device buffers for the columns of a canonical weight that are being packed.

    Attributes
    ----------
    columns : int
        Columns that the buffers hold.
    words : pyopencl.Buffer
    places : dict of str to Place
        Of ``layout``, by the names of the parts of the scale record.
    parts : dict of str to pyopencl.Buffer
        By the same names.
    nbytes : int
    """

    def __init__(self, runtime: Memory, sizes: StackSizes, layout: ExpertLayout) -> None:
        k, n, row = sizes.k, sizes.n_per_expert, layout.code_type
        groups, self.places = -(-k // sizes.group_size), layout.places
        column_bytes = [k * row.bits // 8]
        for where in self.places.values():
            column_bytes.append(where.dtype.itemsize * (where.rows if where.of_blocks else groups))
        limit = min(STAGING_BYTES, runtime.max_alloc_bytes) // sum(column_bytes)
        self.columns = min(n, max(limit // STRIP_N, 1) * STRIP_N)
        self.nbytes = self.columns * sum(column_bytes)
        self._queue = runtime.loading_queue
        with memory_errors(runtime, self.nbytes, "staging of weights"):
            self._buffers = [
                cl.Buffer(runtime.context, cl.mem_flags.READ_ONLY, self.columns * nbytes) for nbytes in column_bytes
            ]
        self.words = self._buffers[0]
        self.parts = dict(zip(self.places, self._buffers[1:], strict=True))

    def upload(self, arrays: Sequence[npt.NDArray[Any]]) -> None:
        """Copy words, then the parts of the scale record; returns when the copies have been made."""
        for buffer, array in zip(self._buffers, arrays, strict=True):
            cl.enqueue_copy(self._queue, buffer, array, is_blocking=True)


def cut_into_parts(num_experts: int, most: int) -> tuple[int, int]:
    """``(experts per part, parts)`` with at most ``most`` experts per part; ``(0, 0)`` if that needs too many parts."""
    for count in PARTS:
        experts = -(-num_experts // count)
        if experts <= most:
            return experts, count
    return 0, 0

"""The memory of a decoder's cache on the device: pages of keys and values, and recurrent state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
import pyopencl as cl

from marlin_cy.decoder.plan import (
    AttentionPlan,
    DecoderPlan,
    DeltaNetPlan,
    DenseLinear,
    LatentAttentionPlan,
    MixerPlan,
)
from marlin_cy.decoder.program import PAGE_TOKENS
from marlin_cy.errors import UnsupportedError
from marlin_cy.opencl.memory import live_stores, zeroed_buffers

if TYPE_CHECKING:
    from marlin_cy.opencl.stack import Runtime

__all__ = ["KvPool", "Segmentation", "StatePool", "check_memory", "dense_bytes", "new_pools", "provide_pages"]

CACHE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
CHUNK = 8  # of decoder.cl
MAX_HEAD_DIM = 640  # of decoder_heads.cl
SEGMENTS = 8  # of decoder.cl
WHOLE_SHARE = 32
"""A cache that takes at most this part of the device's memory is one segment, allocated when the model is loaded."""


class Segmentation(NamedTuple):
    """How a layer's pages are divided into buffers; ``kernels/decoder.cl`` describes it.

    Attributes
    ----------
    segments : int
        Buffers of keys, and as many of values, at most: 1 or SEGMENTS.
    pages : int
        Pages of a segment: of several, a power of two.
    """

    segments: int
    pages: int

    @property
    def shift(self) -> int:
        """The logarithm of ``pages`` to base 2."""
        return self.pages.bit_length() - 1

    @classmethod
    def of(cls, num_pages: int, page_bytes: Sequence[int], runtime: Runtime) -> Segmentation:
        """The division of a cache whose layers' buffers have ``page_bytes`` for each page."""
        small = num_pages * sum(page_bytes) <= runtime.capabilities.global_memory // WHOLE_SHARE
        if not page_bytes or (small and num_pages * max(page_bytes) <= runtime.max_alloc_bytes):
            return cls(1, num_pages)
        return cls(SEGMENTS, 1 << (-(-num_pages // SEGMENTS) - 1).bit_length())


class KvPool:
    """Pages of keys and values of a layer; ``kernels/decoder.cl`` draws a page.

    Attributes
    ----------
    type_code : int
        CACHE_TYPE of ``decoder.cl``.
    shares_values : bool
        Latent attention has no values of its own: they are the keys.
    """

    def __init__(
        self,
        runtime: Runtime,
        mixer: AttentionPlan | LatentAttentionPlan,
        num_pages: int,
        dtype: str,
        segmentation: Segmentation | None = None,
    ) -> None:
        self.type_code = CACHE_TYPES[dtype]
        self._runtime, self._num_pages = runtime, num_pages
        self._segmentation = segmentation or Segmentation(1, num_pages)
        self._page_bytes = page_bytes(mixer, dtype)
        self.shares_values = len(self._page_bytes) == 1
        self._segments: list[list[cl.Buffer]] = []
        self.add_segment()

    @property
    def keys(self) -> cl.Buffer:
        """The keys of the first segment: ``[pages][heads][page of a head]``."""
        return self._segments[0][0]

    @property
    def values(self) -> cl.Buffer:
        """The values of the first segment."""
        return self._segments[0][-1]

    @property
    def segments(self) -> int:
        """Segments, at most."""
        return self._segmentation.segments

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, of segments that are not there yet, too."""
        return self._num_pages * sum(self._page_bytes)

    @property
    def provided_pages(self) -> int:
        """Pages that have memory."""
        return min(self._num_pages, len(self._segments) * self._segmentation.pages)

    @property
    def macros(self) -> dict[str, int]:
        """Macros of kernels that read or write the pool."""
        return {"CACHE_TYPE": self.type_code, "SEGMENTS": self._segmentation.segments}

    @property
    def table_macros(self) -> dict[str, int]:
        """Macros of a kernel that has the addresses of the segments in a table."""
        shift = {"SEGMENT_SHIFT": self._segmentation.shift} if self.segments > 1 else {}
        return {**self.macros, **shift}

    def all_segments(self) -> Iterator[tuple[str, int, cl.Buffer]]:
        """The buffers of the segments that there are: ``"keys"`` or ``"values"``, the segment, and the buffer."""
        for number, buffers in enumerate(self._segments):
            yield "keys", number, buffers[0]
            yield "values", number, buffers[-1]

    @property
    def arguments(self) -> dict[str, Any]:
        """CACHE_ARGS of ``decoder.cl``."""
        there = {(name, number): buffer for name, number, buffer in self.all_segments()}
        found: dict[str, Any] = {"segment_shift": self._segmentation.shift} if self.segments > 1 else {}
        for name in ("keys", "values"):
            for number in range(self.segments):
                found[name + (str(number) if number else "")] = there.get((name, number))
        return found

    def add_segment(self) -> None:
        """Provide memory for another segment."""
        pages = min(self._segmentation.pages, self._num_pages - len(self._segments) * self._segmentation.pages)
        self._segments.append(zeroed_buffers(self._runtime, [pages * size for size in self._page_bytes], "cache"))

    def drop_segment(self) -> None:
        """Release the last segment."""
        for buffer in self._segments.pop():
            buffer.release()

    def copy_page(self, queue: cl.CommandQueue, source: int, target: int) -> None:
        """Enqueue the copy of a page."""
        (from_segment, source), (to_segment, target) = (
            divmod(page, self._segmentation.pages) for page in (source, target)
        )
        for place, size in enumerate(self._page_bytes):
            cl.enqueue_copy(
                queue,
                self._segments[to_segment][place],
                self._segments[from_segment][place],
                byte_count=size,
                src_offset=source * size,
                dst_offset=target * size,
            )


class StatePool:
    """Slots of a gated DeltaNet layer's recurrent state, float32; ``decoder_delta.cl`` has the shapes.

    Attributes
    ----------
    conv, states : pyopencl.Buffer
    """

    def __init__(self, runtime: Runtime, mixer: DeltaNetPlan, num_slots: int) -> None:
        channels = mixer.conv.shape[0]
        self._slot_bytes = slot_bytes(mixer)
        # A buffer has at least one byte, also for a convolution of width 1.
        sizes = [max(4, num_slots * nbytes) for nbytes in self._slot_bytes]
        self.conv, self.states = self._buffers = zeroed_buffers(runtime, sizes, "recurrent state")
        self.channels = channels

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return sum(int(buffer.size) for buffer in self._buffers)

    def clear(self, queue: cl.CommandQueue, slot: int) -> None:
        """Enqueue zeros for a slot."""
        for buffer, nbytes in self._parts():
            cl.enqueue_fill_buffer(queue, buffer, b"\0" * 4, slot * nbytes, nbytes)

    def copy(self, queue: cl.CommandQueue, source: int, target: int) -> None:
        """Enqueue the copy of a slot."""
        for buffer, nbytes in self._parts():
            cl.enqueue_copy(
                queue, buffer, buffer, byte_count=nbytes, src_offset=source * nbytes, dst_offset=target * nbytes
            )

    def save(self, queue: cl.CommandQueue, slot: int) -> list[Any]:
        """A slot's contents, on the host."""
        saved = []
        for buffer, nbytes in self._parts():
            saved.append(np.empty(nbytes, np.uint8))
            cl.enqueue_copy(queue, saved[-1], buffer, src_offset=slot * nbytes)
        return saved

    def restore(self, queue: cl.CommandQueue, slot: int, saved: Sequence[Any]) -> None:
        """Set a slot to what :meth:`save` returned."""
        for (buffer, nbytes), values in zip(self._parts(), saved, strict=True):
            cl.enqueue_copy(queue, buffer, values, dst_offset=slot * nbytes)

    def _parts(self) -> list[tuple[cl.Buffer, int]]:
        pairs = zip(self._buffers, self._slot_bytes, strict=True)
        return [(buffer, nbytes) for buffer, nbytes in pairs if nbytes]


def itemsize(dtype: str) -> int:
    """Bytes of a value in the cache."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).itemsize


def widths(mixer: AttentionPlan | LatentAttentionPlan) -> list[int]:
    """Values of a position in each buffer of a layer's pool."""
    if isinstance(mixer, AttentionPlan):
        return [mixer.num_kv_heads * mixer.head_dim] * 2
    return [mixer.latent_dim + mixer.rope_dim]


def page_bytes(mixer: MixerPlan, dtype: str) -> list[int]:
    """Bytes of a page in each buffer of a layer's pool; none for recurrent state."""
    if isinstance(mixer, DeltaNetPlan):
        return []
    return [PAGE_TOKENS * width * itemsize(dtype) for width in widths(mixer)]


def slot_bytes(mixer: DeltaNetPlan) -> list[int]:
    """Bytes of a slot in each buffer of a layer's pool."""
    conv = (mixer.conv_width - 1) * mixer.conv.shape[0]
    return [4 * conv, 4 * mixer.num_v_heads * mixer.key_dim * mixer.value_dim]


def new_pools(
    runtime: Runtime, mixers: Sequence[MixerPlan], num_pages: int, num_states: int, dtype: str
) -> list[KvPool | StatePool]:
    """The cache of all layers, each with its first segment."""
    sizes = [size for mixer in mixers for size in page_bytes(mixer, dtype)]
    segmentation = Segmentation.of(num_pages, sizes, runtime)
    pools: list[KvPool | StatePool] = []
    for mixer in mixers:
        if isinstance(mixer, DeltaNetPlan):
            pools.append(StatePool(runtime, mixer, num_states))
        else:
            check_widths(mixer)
            pools.append(KvPool(runtime, mixer, num_pages, dtype, segmentation))
    return pools


def provide_pages(pools: Sequence[KvPool], num_pages: int) -> bool:
    """Add segments until ``num_pages`` pages have memory in all layers. Returns whether any was added.

    Raises
    ------
    DeviceMemoryError
        The device has too little memory. No layer has more segments than another.
    """
    grown = False
    while any(pool.provided_pages < num_pages for pool in pools):
        added: list[KvPool] = []
        try:
            for pool in pools:
                pool.add_segment()
                added.append(pool)
        except BaseException:
            for pool in added:
                pool.drop_segment()
            raise
        grown = True
    return grown


def check_widths(mixer: AttentionPlan | LatentAttentionPlan) -> None:
    """Refuse heads that the kernels do not support."""
    named = (
        {"head_dim": mixer.head_dim}
        if isinstance(mixer, AttentionPlan)
        else {"kv_lora_rank + qk_rope_head_dim": mixer.latent_dim + mixer.rope_dim, "kv_lora_rank": mixer.latent_dim}
    )
    for name, width in named.items():
        if width % CHUNK or width > MAX_HEAD_DIM:
            raise UnsupportedError(
                f"decoder: got {name} {width}, the OpenCL backend supports multiples of {CHUNK} up to {MAX_HEAD_DIM}"
            )


def check_memory(
    runtime: Runtime, mixers: Sequence[MixerPlan], num_pages: int, num_states: int, dtype: str, dense_bytes: int
) -> None:
    """Refuse a cache that does not fit beside the weights, before anything is allocated.

    ``dense_bytes``: weights that are not quantised, and are still on the host.
    """
    found = runtime.capabilities
    pages = [size for mixer in mixers for size in page_bytes(mixer, dtype)]
    states = sum(sum(slot_bytes(mixer)) for mixer in mixers if isinstance(mixer, DeltaNetPlan)) * num_states
    weights = dense_bytes + live_stores.nbytes(runtime.device)
    left = max(0, found.global_memory - weights - states)
    per_page = sum(pages)
    most = num_pages
    if per_page:
        # The largest power of two of pages that fit into a buffer, times the segments.
        in_buffer = 1 << max(0, (runtime.max_alloc_bytes // max(pages)).bit_length() - 1)
        most = min(left // per_page, SEGMENTS * in_buffer)
    if num_pages <= most and states <= found.global_memory - weights:
        return
    raise MemoryError(
        f"cache: {num_pages * PAGE_TOKENS} tokens need {num_pages * per_page + states} bytes, which do not fit into "
        f"the memory of {found.name}: it has {found.global_memory} bytes, in buffers of at most "
        f"{runtime.max_alloc_bytes}, and the weights take {weights}; there is room for {most * PAGE_TOKENS} tokens; "
        "pass fewer cache_tokens, or a shorter context_length"
    )


def dense_bytes(plan: DecoderPlan) -> int:
    """Bytes of the embedding, and of a head that is not quantised and not the embedding itself.

    Other weights that are not quantised are small beside these.
    """
    nbytes = plan.embedding.nbytes
    if isinstance(plan.head, DenseLinear) and plan.head.weight is not plan.embedding:
        nbytes += plan.head.weight.nbytes
    return nbytes

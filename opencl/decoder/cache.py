"""The memory of a decoder's cache on the device: pages of keys and values, and recurrent state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pyopencl as cl

from marlin_cy.decoder.plan import AttentionPlan, DeltaNetPlan, LatentAttentionPlan, MixerPlan
from marlin_cy.decoder.program import PAGE_TOKENS
from marlin_cy.errors import UnsupportedError
from marlin_cy.opencl.memory import live_stores, zeroed_buffers

if TYPE_CHECKING:
    from marlin_cy.opencl.stack import Runtime

__all__ = ["KvPool", "StatePool", "check_memory", "new_pool"]

CACHE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
CHUNK = 8  # of decoder.cl
MAX_HEAD_DIM = 640  # of decoder_heads.cl


class KvPool:
    """Pages of keys and values of a layer; ``kernels/decoder.cl`` draws a page.

    Attributes
    ----------
    keys, values : pyopencl.Buffer
        ``[num_pages][heads][page of a head]``. Latent attention has no values of its own: ``values`` is ``keys``.
    type_code : int
        CACHE_TYPE of ``decoder.cl``.
    """

    def __init__(
        self, runtime: Runtime, mixer: AttentionPlan | LatentAttentionPlan, num_pages: int, dtype: str
    ) -> None:
        self.type_code = CACHE_TYPES[dtype]
        self._page_bytes = [PAGE_TOKENS * width * itemsize(dtype) for width in widths(mixer)]
        buffers = zeroed_buffers(runtime, [num_pages * nbytes for nbytes in self._page_bytes], "cache")
        self.keys, self.values = buffers[0], buffers[-1]
        self._buffers = buffers

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return sum(int(buffer.size) for buffer in self._buffers)

    def copy_page(self, queue: cl.CommandQueue, source: int, target: int) -> None:
        """Enqueue the copy of a page."""
        for buffer, nbytes in zip(self._buffers, self._page_bytes, strict=True):
            cl.enqueue_copy(
                queue, buffer, buffer, byte_count=nbytes, src_offset=source * nbytes, dst_offset=target * nbytes
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


def slot_bytes(mixer: DeltaNetPlan) -> list[int]:
    """Bytes of a slot in each buffer of a layer's pool."""
    conv = (mixer.conv_width - 1) * mixer.conv.shape[0]
    return [4 * conv, 4 * mixer.num_v_heads * mixer.key_dim * mixer.value_dim]


def new_pool(runtime: Runtime, mixer: MixerPlan, num_pages: int, num_states: int, dtype: str) -> KvPool | StatePool:
    """A layer's part of the cache."""
    if isinstance(mixer, DeltaNetPlan):
        return StatePool(runtime, mixer, num_states)
    check_widths(mixer)
    return KvPool(runtime, mixer, num_pages, dtype)


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
    pages = [
        PAGE_TOKENS * width * itemsize(dtype)
        for mixer in mixers
        if not isinstance(mixer, DeltaNetPlan)
        for width in widths(mixer)
    ]
    states = sum(sum(slot_bytes(mixer)) for mixer in mixers if isinstance(mixer, DeltaNetPlan)) * num_states
    weights = dense_bytes + live_stores.nbytes(runtime.device)
    left = max(0, found.global_memory - weights - states)
    per_page = sum(pages)
    most = num_pages
    if per_page:
        most = min(left // per_page, runtime.max_alloc_bytes // max(pages))
    if num_pages <= most and states <= found.global_memory - weights:
        return
    raise MemoryError(
        f"cache: {num_pages * PAGE_TOKENS} tokens need {num_pages * per_page + states} bytes, which do not fit into "
        f"the memory of {found.name}: it has {found.global_memory} bytes, in buffers of at most "
        f"{runtime.max_alloc_bytes}, and the weights take {weights}; there is room for {most * PAGE_TOKENS} tokens; "
        "pass fewer cache_tokens, or a shorter context_length"
    )

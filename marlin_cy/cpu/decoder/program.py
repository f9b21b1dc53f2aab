"""The CPU's program for a whole model."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_cy.cpu import fork
from marlin_cy.cpu.context import workspace_of
from marlin_cy.cpu.decoder._cache import KvPool, StatePool, page_bytes
from marlin_cy.cpu.decoder._step import CpuStep
from marlin_cy.decoder.plan import AttentionPlan, DecoderPlan, DeltaNetPlan, LatentAttentionPlan, MixerPlan
from marlin_cy.decoder.program import PAGE_TOKENS, Batch, DecoderProgram
from marlin_cy.distributed.group import checksum
from marlin_cy.interface import Context
from marlin_cy.memory import available_memory

__all__ = ["CpuDecoder"]

INCOMPLETE = -1
"""The length of a recurrent state while its layers are changed one after another."""


class CpuDecoder(DecoderProgram):
    """A plan whose step is one call without the GIL. The parameters are those of ``Backend.new_decoder``."""

    def __init__(self, ctx: Context, plan: DecoderPlan, num_pages: int, num_states: int, cache_dtype: str) -> None:
        workspace = workspace_of(ctx)
        self._group, self._planes = plan.group, workspace.planes
        per_page = sum(
            page_bytes(*cache_sizes(layer.mixer), cache_dtype)
            for layer in plan.layers
            if not isinstance(layer.mixer, DeltaNetPlan)
        )
        check_memory(num_pages, per_page)
        try:
            self._pools = [new_pool(layer.mixer, num_pages, num_states, cache_dtype) for layer in plan.layers]
        except MemoryError:
            raise MemoryError(does_not_fit(num_pages, per_page, None)) from None
        self._state_lengths = np.zeros(num_states, np.int64)
        self._step = CpuStep(workspace, plan, self._pools, self._state_lengths)

    def step(self, batch: Batch) -> npt.NDArray[np.float32]:
        if self._group is not None:
            self._group.agree(
                "step",
                {
                    "tokens": checksum(batch.tokens),
                    "sequences": checksum(batch.segments),
                    "pages": checksum(batch.pages),
                    "wanted rows": checksum(batch.wanted),
                    "compute_dtype": checksum(self._planes),
                },
            )
        return fork.run(self._step.run, batch.tokens, batch.segments, batch.pages, batch.wanted)

    def copy_page(self, source: int, target: int) -> None:
        for pool in self._pools:
            if isinstance(pool, KvPool):
                pool.copy_page(source, target)

    def state_length(self, slot: int) -> int:
        return int(self._state_lengths[slot])

    def clear_state(self, slot: int) -> None:
        self._state_lengths[slot] = INCOMPLETE
        for pool in self._states():
            pool.clear(slot)
        self._state_lengths[slot] = 0

    def copy_state(self, source: int, target: int) -> None:
        self._state_lengths[target] = INCOMPLETE
        for pool in self._states():
            pool.copy(source, target)
        self._state_lengths[target] = self._state_lengths[source]

    def save_state(self, slot: int) -> Any:
        return self.state_length(slot), [pool.save(slot) for pool in self._states()]

    def restore_state(self, slot: int, saved: Any) -> None:
        length, states = saved
        self._state_lengths[slot] = INCOMPLETE
        for pool, values in zip(self._states(), states, strict=True):
            pool.restore(slot, values)
        self._state_lengths[slot] = length

    def _states(self) -> list[StatePool]:
        return [pool for pool in self._pools if isinstance(pool, StatePool)]

    @property
    def cache_bytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools)


def check_memory(num_pages: int, page_bytes: int) -> None:
    """Refuse a cache that is larger than the memory that the system has left."""
    available = available_memory()
    if available is not None and num_pages * page_bytes > available:
        raise MemoryError(does_not_fit(num_pages, page_bytes, available))


def does_not_fit(num_pages: int, page_bytes: int, available: int | None) -> str:
    """The message for a cache that does not fit into memory."""
    tokens, nbytes = num_pages * PAGE_TOKENS, num_pages * page_bytes
    message = f"cache: {tokens} tokens need {nbytes} bytes, which do not fit into memory"
    if available is None:
        return f"{message}; pass fewer cache_tokens"
    return (
        f"{message}: {available} bytes are available, enough for {available // page_bytes * PAGE_TOKENS} tokens; pass "
        "fewer cache_tokens, or a shorter context_length"
    )


def new_pool(mixer: MixerPlan, num_pages: int, num_states: int, cache_dtype: str) -> KvPool | StatePool:
    """A layer's part of the cache."""
    if isinstance(mixer, DeltaNetPlan):
        return StatePool(
            num_states, mixer.conv_width, mixer.conv.shape[0], mixer.num_v_heads, mixer.key_dim, mixer.value_dim
        )
    return KvPool(num_pages, *cache_sizes(mixer), cache_dtype)


def cache_sizes(mixer: AttentionPlan | LatentAttentionPlan) -> tuple[int, int, int]:
    """``(heads, key width, value width)`` of a layer's keys and values."""
    if isinstance(mixer, AttentionPlan):
        return mixer.num_kv_heads, mixer.head_dim, mixer.head_dim
    return 1, mixer.latent_dim + mixer.rope_dim, mixer.latent_dim

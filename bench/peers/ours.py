"""This library behind the peers' interface, so that it gets the same checks, inputs and timing as they do.

Activations are float32 in and out, as with most peers. Products of single experts share one stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.common.shapes import stack_of
from bench.peers.interface import Array, Experts, Peer, Projection, RoutedProduct
from marlin_cy import MarlinExpertStack, MoeLayer, moe_align_block_size
from marlin_cy.cpu import CpuBackend, CpuContext
from marlin_cy.weights.canonical import CanonicalWeight

__all__ = ["OURS", "MarlinCyInt8", "MarlinCyInt16"]

BLOCK_SIZE = 16  # of the alignment. The CPU backend joins an expert's blocks, so it hardly matters


class _MarlinCy(Peer):
    """Base of both compute dtypes.

    Parameters
    ----------
    num_threads : int
    isa : str, optional
        Default: the best one here.
    """

    distribution = "marlin-cy"

    def __init__(self, num_threads: int, isa: str | None = None) -> None:
        super().__init__(num_threads)
        self._backend = CpuBackend()
        self._context = self._backend.new_context(num_threads=num_threads, compute_dtype=self.accuracy, isa=isa)

    @property
    def version(self) -> str | None:
        import marlin_cy

        return marlin_cy.__version__

    def available(self) -> str | None:
        return None

    def load(self, weight: CanonicalWeight) -> Projection:
        return self.load_all([weight])[0]

    def load_all(self, weights: Sequence[CanonicalWeight]) -> Sequence[Projection]:
        stack = stack_of(self._backend, weights)
        return [_Product(self._context, stack, expert) for expert in range(len(weights))]

    def available_routed(self) -> str | None:
        return None

    def load_routed(self, weights: Sequence[CanonicalWeight]) -> RoutedProduct:
        return _Routed(self._context, stack_of(self._backend, weights))

    def available_moe(self) -> str | None:
        return None

    def load_moe(self, gate_up: Sequence[CanonicalWeight], down: Sequence[CanonicalWeight]) -> Experts:
        return _Layer(self._context, stack_of(self._backend, gate_up), stack_of(self._backend, down))


class MarlinCyInt16(_MarlinCy):
    """Activations rounded to 16 bits."""

    name = accuracy = "int16"


class MarlinCyInt8(_MarlinCy):
    """Activations rounded to 8 bits."""

    name = accuracy = "int8"


OURS = (MarlinCyInt16, MarlinCyInt8)
"""Both sides of this library, named after their compute dtypes."""


class _Product(Projection):
    def __init__(self, context: CpuContext, stack: MarlinExpertStack, expert: int) -> None:
        self._context, self._stack, self._expert = context, stack, expert

    def prepare(self, x: Array) -> Any:
        plan = np.array([[self._expert, 0, 0, len(x)]])
        return np.ascontiguousarray(x), plan, np.empty((len(x), self._stack.n_per_expert), np.float32)

    def run(self, prepared: Any) -> Any:
        x, plan, out = prepared
        self._stack.gemm_phase_batched(self._context, x, plan, out, self._stack.k)
        return out

    def result(self, out: Array) -> Array:
        return out


class _Routed(RoutedProduct):
    """``gemm_phase_vllm``, which gathers the rows itself. Slots are sorted by expert beforehand."""

    def __init__(self, context: CpuContext, stack: MarlinExpertStack) -> None:
        self._context, self._stack = context, stack

    def prepare(self, x: Array, topk_ids: Array) -> Any:
        tokens, top_k = topk_ids.shape
        plan = moe_align_block_size(topk_ids, BLOCK_SIZE, self._stack.num_experts)
        out = np.empty((tokens, top_k, self._stack.n_per_expert), np.float32)
        return np.ascontiguousarray(x), plan, out, top_k

    def run(self, prepared: Any) -> Any:
        x, (ids, experts, past), out, top_k = prepared
        slots = out.reshape(-1, out.shape[2])
        self._stack.gemm_phase_vllm(self._context, x, ids, experts, past, slots, len(x), BLOCK_SIZE, top_k)
        return out

    def result(self, out: Array) -> Array:
        return out


class _Layer(Experts):
    def __init__(self, context: CpuContext, gate_up: MarlinExpertStack, down: MarlinExpertStack) -> None:
        self._context, self._gate_up, self._down = context, gate_up, down

    def prepare(self, x: Array, topk_ids: Array, topk_weights: Array) -> Any:
        layer = MoeLayer(self._gate_up, self._down, top_k=topk_ids.shape[1])
        return layer, np.ascontiguousarray(x), topk_ids, topk_weights, np.empty((len(x), layer.hidden_size), np.float32)

    def run(self, prepared: Any) -> Any:
        layer, x, ids, weights, out = prepared
        return layer.forward_routed(self._context, x, ids, weights, out=out)

    def result(self, out: Array) -> Array:
        return out

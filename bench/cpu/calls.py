"""Calls of this library that are timed on the CPU, and the memory bandwidth and peak that they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bench.common.machine import last_level_cache_bytes
from bench.common.timing import Call
from marlin_cy import Context, MarlinExpertStack, MoeLayer
from marlin_cy.cpu.measure._bandwidth import read_bandwidth
from marlin_cy.cpu.measure._peak import int8_peak

__all__ = ["experts_beyond_cache", "gemm_call", "gemm_flop", "layer_call", "layer_flop", "peak_side", "read_side"]

ACTIVATIONS = ml_dtypes.bfloat16  # the dtype of models, and of most peers
CACHE_MULTIPLE = 4  # weights have to be this many times the last-level cache, or part of them is read from it
LEAST_READ_BYTES = 256 << 20
CHOSEN_LOGIT = 20  # is added to the router logits of the experts that a routing names


def read_side(num_threads: int, quick: bool = False) -> Callable[[], float]:
    """A side: bytes per second at which ``num_threads`` threads read a buffer far larger than the caches."""
    size = max(LEAST_READ_BYTES, CACHE_MULTIPLE * last_level_cache_bytes(), num_threads * (16 << 20))
    if quick:
        size = num_threads * (8 << 20)
    return lambda: float(read_bandwidth(num_threads, size, repeats=3))


def peak_side(num_threads: int, isa: str) -> Callable[[], float] | None:
    """A side: operations per second of an ISA's 8-bit dot products on ``num_threads`` threads; None if not known."""
    if int8_peak(isa, num_threads, repeats=1) is None:
        return None

    def measure() -> float:
        peak = int8_peak(isa, num_threads)
        assert peak is not None  # as in the call above
        return peak

    return measure


def experts_beyond_cache(expert_bytes: int, least: int) -> int:
    """How many experts a stack needs so that no cache holds much of it: at least ``least``."""
    return max(least, -(-CACHE_MULTIPLE * last_level_cache_bytes() // expert_bytes))


def gemm_call(stack: MarlinExpertStack, context: Context, rows: int, experts_per_call: int, seed: int = 0) -> Call:
    """A call that multiplies ``rows`` rows by each of the next ``experts_per_call`` experts; bfloat16 in and out."""
    rng = np.random.default_rng(seed)
    total = experts_per_call * rows
    x = rng.standard_normal((total, stack.k), dtype=np.float32).astype(ACTIVATIONS)
    out = np.empty((total, stack.n_per_expert), ACTIVATIONS)
    turns = int(np.lcm(stack.num_experts, experts_per_call)) // experts_per_call
    plans = []
    for turn in range(turns):
        experts = (turn * experts_per_call + np.arange(experts_per_call)) % stack.num_experts
        begin = np.arange(experts_per_call) * rows
        plans.append(np.stack([experts, begin, begin, np.full(experts_per_call, rows)], axis=1))

    def call(i: int) -> None:
        stack.gemm_phase_batched(context, x, plans[i % turns], out, stack.k)

    return call


def gemm_flop(stack: MarlinExpertStack, rows: int, experts_per_call: int) -> int:
    """Floating-point operations of the products of one call of :func:`gemm_call`."""
    return 2 * experts_per_call * rows * stack.k * stack.n_per_expert


def layer_call(layer: MoeLayer, context: Context, routings: Sequence[npt.NDArray[np.int32]], seed: int = 0) -> Call:
    """A call of a whole layer, routing included. Call i has router logits that lead to ``routings[i]``."""
    rng = np.random.default_rng(seed)
    tokens = len(routings[0])
    x = rng.standard_normal((tokens, layer.hidden_size), dtype=np.float32).astype(ACTIVATIONS)
    out = np.empty_like(x)
    all_logits = []
    for ids in routings:
        logits = rng.standard_normal((tokens, layer.num_experts), dtype=np.float32)
        np.put_along_axis(logits, ids, np.take_along_axis(logits, ids, axis=1) + CHOSEN_LOGIT, axis=1)
        all_logits.append(logits)

    def call(i: int) -> None:
        layer(context, x, all_logits[i % len(all_logits)], out=out)

    return call


def layer_flop(layer: MoeLayer, tokens: int) -> int:
    """Floating-point operations of the layer's products."""
    per_row = 2 * layer.hidden_size * layer.gate_up.n_per_expert + 2 * layer.intermediate_size * layer.down.n_per_expert
    return int(tokens * layer.top_k * per_row)

"""marlin_cy's sides, and the memory bandwidth that they are held against."""

import ml_dtypes
import numpy as np

from bench.machine import last_level_cache_bytes
from marlin_cy.cpu.measure._bandwidth import read_bandwidth
from marlin_cy.cpu.measure._peak import int8_peak

__all__ = ["experts_that_outgrow_cache", "gemm_call", "gemm_flop", "layer_call", "layer_flop", "peak_side", "read_side"]

ACTIVATIONS = ml_dtypes.bfloat16  # as models have them, and as the peers take them
CACHE_MULTIPLE = 4  # what is streamed is so many times the last-level cache, or nothing of it is a stream
LEAST_READ_BYTES = 256 << 20


def read_side(num_threads, quick=False):
    """A side: bytes a second at which ``num_threads`` threads read memory, over a buffer far larger than caches."""
    size = max(LEAST_READ_BYTES, CACHE_MULTIPLE * last_level_cache_bytes(), num_threads * (16 << 20))
    if quick:
        size = num_threads * (8 << 20)
    return lambda: read_bandwidth(num_threads, size, repeats=3)


def peak_side(num_threads, isa):
    """A side: operations a second of an ISA's 8-bit dot products on ``num_threads`` threads; None where not known."""
    return None if int8_peak(isa, num_threads, repeats=1) is None else lambda: int8_peak(isa, num_threads)


def experts_that_outgrow_cache(expert_bytes, least):
    """Experts of a stack that no cache holds a fair part of: at least ``least``."""
    return max(least, -(-CACHE_MULTIPLE * last_level_cache_bytes() // expert_bytes))


def gemm_call(stack, context, rows, experts_per_call, seed=0):
    """``call(i)``: ``rows`` rows through each of the next ``experts_per_call`` experts; output is bfloat16 too."""
    rng = np.random.default_rng(seed)
    total = experts_per_call * rows
    x = rng.standard_normal((total, stack.k), dtype=np.float32).astype(ACTIVATIONS)
    out = np.empty((total, stack.n_per_expert), ACTIVATIONS)
    turns = np.lcm(stack.num_experts, experts_per_call) // experts_per_call
    plans = []
    for turn in range(turns):
        experts = (turn * experts_per_call + np.arange(experts_per_call)) % stack.num_experts
        begin = np.arange(experts_per_call) * rows
        plans.append(np.stack([experts, begin, begin, np.full(experts_per_call, rows)], axis=1))

    def call(i):
        stack.gemm_phase_batched(context, x, plans[i % turns], out, stack.k)

    return call


def gemm_flop(stack, rows, experts_per_call):
    """Floating-point operations that a call of :func:`gemm_call` stands for."""
    return 2 * experts_per_call * rows * stack.k * stack.n_per_expert


def layer_call(layer, context, routings, seed=0):
    """``call(i)``: the whole layer, routing included, over router logits that give ``routings[i]``."""
    rng = np.random.default_rng(seed)
    tokens = len(routings[0])
    x = rng.standard_normal((tokens, layer.hidden_size), dtype=np.float32).astype(ACTIVATIONS)
    out = np.empty_like(x)
    all_logits = []
    for ids in routings:
        logits = rng.standard_normal((tokens, layer.num_experts), dtype=np.float32)
        np.put_along_axis(logits, ids, np.take_along_axis(logits, ids, axis=1) + 20, axis=1)
        all_logits.append(logits)

    def call(i):
        layer(context, x, all_logits[i % len(all_logits)], out=out)

    return call


def layer_flop(layer, tokens):
    """Floating-point operations of the layer's products."""
    per_row = 2 * layer.hidden_size * layer.gate_up.n_per_expert + 2 * layer.intermediate_size * layer.down.n_per_expert
    return tokens * layer.top_k * per_row

"""Stacks of the shapes of real models, filled with random GPTQ weights."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from marlin_cy.weights.int4 import Int4Weight, pack_words

__all__ = [
    "MODELS",
    "TINY",
    "ModelShape",
    "build_stack",
    "gptq_bytes",
    "packed_bytes_estimate",
    "quantised_normal_weight",
    "random_weight",
    "routings",
    "stack_of",
]

# Packing reads a weight and writes another, so few different ones do: what must differ is where each
# expert lies, not what it holds.
DISTINCT_WEIGHTS = 4


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model's MoE layers."""

    name: str
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    group_size: int = 128

    @property
    def projections(self):
        """``(k, n)`` of each product of an expert."""
        return {"gate_up": (self.hidden, 2 * self.intermediate), "down": (self.intermediate, self.hidden)}


# Sources: config.json of Qwen3-30B-A3B, Mixtral-8x7B and DeepSeek-V3.
MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("qwen3", num_experts=128, top_k=8, hidden=2048, intermediate=768),
        ModelShape("mixtral", num_experts=8, top_k=2, hidden=4096, intermediate=14336),
        ModelShape("deepseek-v3", num_experts=256, top_k=8, hidden=7168, intermediate=2048),
    )
}

TINY = ModelShape("tiny", num_experts=16, top_k=4, hidden=256, intermediate=128, group_size=64)
"""A shape that takes no time, to see whether everything runs."""


def random_weight(rng, k, n, group_size):
    """An :class:`Int4Weight` of random codes, scales of 0.005 to 0.015 and zero points of 1 to 16."""
    groups = math.ceil(k / group_size)
    return Int4Weight(
        words=rng.integers(0, 1 << 32, (k // 8, n), dtype=np.uint32),
        scale=rng.uniform(0.005, 0.015, (groups, n)).astype(np.float16),
        zero=rng.integers(1, 17, (groups, n), dtype=np.uint8),
        group_size=group_size,
    )


def quantised_normal_weight(rng, k, n, group_size, deviation=1.0):
    """Normal numbers rounded to symmetric 4 bits: an :class:`Int4Weight`, and the float64 ``[k, n]`` it stands for."""
    normal = deviation * rng.standard_normal((k // group_size, group_size, n))
    scale = (np.abs(normal).max(axis=1) / 7).astype(np.float16)
    q = np.clip(np.rint(normal / scale[:, None, :]) + 8, 0, 15).astype(np.uint8)
    dense = (scale.astype(np.float64)[:, None, :] * (q.astype(np.float64) - 8)).reshape(k, n)
    weight = Int4Weight(
        words=pack_words(q.reshape(k, n)), scale=scale, zero=np.full(scale.shape, 8, np.uint8), group_size=group_size
    )
    return weight, dense


def build_stack(backend, num_experts, k, n, group_size, seed=0):
    """A stack of experts, each with memory of its own, made of a few random weights in turn."""
    rng = np.random.default_rng(seed)
    weights = [random_weight(rng, k, n, group_size) for _ in range(min(DISTINCT_WEIGHTS, num_experts))]
    return stack_of(backend, [weights[expert % len(weights)] for expert in range(num_experts)])


def stack_of(backend, weights):
    """A stack of experts, one for each weight, all of one shape and group size."""
    k, n, group_size = weights[0].k, weights[0].n, weights[0].group_size
    builder = backend.new_stack_builder(len(weights), k, n, group_size=group_size)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [pool.submit(builder.add, expert, 0, weight) for expert, weight in enumerate(weights)]
        for job in jobs:
            job.result()
    return builder.finish()


def packed_bytes_estimate(k, n):
    """Bytes that one packed expert takes at most, headers and padding included, for planning memory."""
    return k * n * 54 // 100


def gptq_bytes(k, n, group_size):
    """Bytes of one linear layer in a GPTQ checkpoint: qweight, scales, qzeros and g_idx."""
    groups = math.ceil(k / group_size)
    return k // 8 * n * 4 + groups * n * 2 + groups * (n // 8) * 4 + k * 4


def routings(num_experts, top_k, tokens, seed=0):
    """Several random routings of ``tokens`` tokens, int64 ``[tokens, top_k]`` each.

    Each token's experts are drawn alike, so the load is as uneven as chance makes it. The experts of
    a routing are then renamed, so that one routing after another uses the experts that were left
    alone the longest: a cache helps as little as in a model, where other layers come between.
    """
    rng = np.random.default_rng(seed)
    result, first = [], 0
    while first < num_experts or len(result) < 4:
        ids = np.argsort(rng.random((tokens, num_experts)), axis=1)[:, :top_k]
        hit, inverse = np.unique(ids, return_inverse=True)
        renamed = (first + rng.permutation(len(hit))) % num_experts
        result.append(renamed[inverse].reshape(ids.shape))
        first += len(hit)
    return result

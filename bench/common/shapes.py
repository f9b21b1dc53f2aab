"""Shapes of real models' MoE layers, random weights and routings for them, and stacks of such weights."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from marlin_cy import Backend, MarlinExpertStack
from marlin_cy.weights.canonical import CanonicalWeight, pack_words
from marlin_cy.weights.code_types import code_type

__all__ = [
    "DISTINCT_WEIGHTS",
    "MODELS",
    "TINY",
    "ModelShape",
    "build_stack",
    "experts_in_memory",
    "gptq_bytes",
    "in_turn",
    "packed_bytes_estimate",
    "quantised_normal_weight",
    "random_ids",
    "random_weight",
    "routings",
    "stack_of",
]

# Experts take turns with so many different weights. Packing copies each of them, so every expert has memory of its
# own: speed depends on the addresses of weights, not on their values.
DISTINCT_WEIGHTS = 4

T = TypeVar("T")


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
    def projections(self) -> dict[str, tuple[int, int]]:
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
"""A shape that takes next to no time, for ``--quick``."""


def build_stack(
    backend: Backend, num_experts: int, k: int, n: int, group_size: int, seed: int = 0, bits: int = 4
) -> MarlinExpertStack:
    """A stack of experts with random weights, each with memory of its own."""
    rng = np.random.default_rng(seed)
    weights = [random_weight(rng, k, n, group_size, bits=bits) for _ in range(min(DISTINCT_WEIGHTS, num_experts))]
    return stack_of(backend, in_turn(weights, num_experts))


def stack_of(backend: Backend, weights: Sequence[CanonicalWeight]) -> MarlinExpertStack:
    """A stack with one expert per weight. All weights have the same shape and group size."""
    k, n, group_size = weights[0].k, weights[0].n, weights[0].group_size
    builder = backend.new_stack_builder(len(weights), k, n, group_size=group_size, codes=weights[0].codes)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = [pool.submit(builder.add, expert, 0, weight) for expert, weight in enumerate(weights)]
        for job in jobs:
            job.result()
    return builder.finish()


def in_turn(distinct: Sequence[T], count: int) -> list[T]:
    """``count`` items: the distinct items in turn, repeated."""
    return [distinct[index % len(distinct)] for index in range(count)]


def random_weight(
    rng: np.random.Generator, k: int, n: int, group_size: int, symmetric: bool = False, bits: int = 4
) -> CanonicalWeight:
    """A weight of random codes, scales of 0.005 to 0.015, and zero points of 1 to 16 (256) or, symmetric, 8 (128)."""
    groups, row = math.ceil(k / group_size), code_type(f"uint{bits}")
    middle, dtype = row.symmetric_zero, row.zero_dtype
    return CanonicalWeight(
        words=rng.integers(0, 1 << 32, (k // row.codes_per_word, n), dtype=np.uint32),
        scale=rng.uniform(0.005, 0.015, (groups, n)).astype(np.float16),
        zero=np.full((groups, n), middle, dtype) if symmetric else rng.integers(1, 2 * middle + 1, (groups, n), dtype),
        group_size=group_size,
        codes=row.name,
    )


def quantised_normal_weight(
    rng: np.random.Generator, k: int, n: int, group_size: int, deviation: float = 1.0
) -> tuple[CanonicalWeight, npt.NDArray[np.float64]]:
    """Normal numbers rounded to symmetric 4 bits: the weight, and the float64 ``[k, n]`` that it represents."""
    normal = deviation * rng.standard_normal((k // group_size, group_size, n))
    scale = (np.abs(normal).max(axis=1) / 7).astype(np.float16)
    q = np.clip(np.rint(normal / scale[:, None, :]) + 8, 0, 15).astype(np.uint8)
    dense = (scale.astype(np.float64)[:, None, :] * (q.astype(np.float64) - 8)).reshape(k, n)
    weight = CanonicalWeight(
        words=pack_words(q.reshape(k, n)), scale=scale, zero=np.full(scale.shape, 8, np.uint8), group_size=group_size
    )
    return weight, dense


def packed_bytes_estimate(k: int, n: int) -> int:
    """An upper bound of the bytes of one packed expert, headers and padding included."""
    return k * n * 54 // 100


def gptq_bytes(k: int, n: int, group_size: int) -> int:
    """Bytes of one linear layer in a GPTQ checkpoint: qweight, scales, qzeros and g_idx."""
    groups = math.ceil(k / group_size)
    return k // 8 * n * 4 + groups * n * 2 + groups * (n // 8) * 4 + k * 4


def experts_in_memory(model: ModelShape, available: int, total: int) -> int:
    """How many of a model's experts fit into ``available`` bytes, at most all of them.

    Parameters
    ----------
    model : ModelShape
    available : int
        Bytes for this library's weights.
    total : int
        Bytes that ``--memory`` allows for the weights of all sides.

    Raises
    ------
    ValueError
        Fewer experts fit than a token is routed to.
    """
    expert_bytes = sum(packed_bytes_estimate(k, n) for k, n in model.projections.values())
    experts = min(model.num_experts, available // expert_bytes)
    if experts < model.top_k:
        raise ValueError(
            f"--memory: {total / 1e9:.3g} GB hold {experts} experts of {model.name}, of which {model.top_k} are "
            f"needed: expected at least {total / available * model.top_k * expert_bytes / 1e9:.3g} GB"
        )
    return experts


def random_ids(rng: np.random.Generator, tokens: int, num_experts: int, top_k: int) -> npt.NDArray[np.int32]:
    """int32 ``[tokens, top_k]``: different experts for each token, all equally likely."""
    drawn = rng.random((tokens, num_experts), np.float32)
    return np.argpartition(drawn, top_k - 1, axis=1)[:, :top_k].astype(np.int32)


def routings(num_experts: int, top_k: int, tokens: int, seed: int = 0) -> list[npt.NDArray[np.int32]]:
    """Several random routings, int32 ``[tokens, top_k]`` each.

    All experts are equally likely, so the load is as uneven as chance makes it. The experts of a routing are then
    renumbered, so that successive routings use the experts that were unused for the longest time. Caches then help as
    little as in a model, where other layers run between two calls of a layer.
    """
    rng = np.random.default_rng(seed)
    result: list[npt.NDArray[Any]] = []
    first = 0
    while first < num_experts or len(result) < 4:
        ids = random_ids(rng, tokens, num_experts, top_k)
        hit, inverse = np.unique(ids, return_inverse=True)
        renamed = (first + rng.permutation(len(hit))) % num_experts
        result.append(renamed[inverse].reshape(ids.shape).astype(np.int32))
        first += len(hit)
    return result

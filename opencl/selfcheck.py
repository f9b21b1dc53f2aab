"""A tier's kernels against NumPy, at the first use of a device: which tier it can run.

The configurations of later products are checked when each is first used (:mod:`marlin_cy.opencl.checks`).
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy import reference
from marlin_cy.errors import BuildError, DeviceError
from marlin_cy.moe.align import moe_align_block_size
from marlin_cy.opencl.checks.verdicts import confirmed, unchecked_backend
from marlin_cy.opencl.checks.zero_points import random_zeros
from marlin_cy.opencl.gemm.codes import SUPPORTED_CODES
from marlin_cy.opencl.tiers.configuration import FLOAT16_ROWS, Configuration
from marlin_cy.weights.canonical import CanonicalWeight, pack_words
from marlin_cy.weights.code_types import CODE_TYPES

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend

__all__ = ["TOLERANCE", "reason_wrong"]

EXPERTS, K, N, GROUP_SIZE = 3, 320, 40, 64  # a last block of K that is half full, a last strip that is half empty
TOKENS, TOP_K = 20, 2
# The first code type is checked with both, the others with one, because all block sizes decode codes the same way.
BLOCK_SIZES = (4, 32)
TOLERANCE = 2e-3  # of the norm: float16 products give 3e-4, a kernel with a single wrong number 1e-2 and more

_known: dict[tuple[int, str], str | None] = {}
_lock = threading.Lock()


def reason_wrong(backend: OpenClBackend) -> str | None:
    """None if a backend's tier gives correct results on its device, else a description of the error.

    The check runs once in a process for each device and tier.
    """
    key = backend.device.int_ptr, backend.tier.name
    with _lock:
        if key not in _known:
            try:
                _known[key] = confirmed(lambda: reason_wrong_now(backend))
            except BuildError as problem:
                _known[key] = f"its program does not compile: {problem}"
        return _known[key]


def reason_wrong_now(backend: OpenClBackend) -> str | None:
    """One run of the check: None or a description of the error; a :class:`BuildError` if a program does not compile."""
    try:
        error = relative_error(backend)
    except BuildError:
        raise
    except (cl.Error, DeviceError) as problem:
        return f"its kernels do not run: {problem}"
    if not error <= TOLERANCE:  # a NaN is wrong, too
        return f"its results are wrong: relative error {error:.2g}, expected at most {TOLERANCE:g}"
    return None


def relative_error(backend: OpenClBackend) -> float:
    """The largest relative error (norm of the error over norm of the result) of products with all code types."""
    backend = unchecked_backend(backend)
    rng = np.random.default_rng(0)
    # The type that the tier's products read most often: then later calls need these programs, too.
    halves = backend.tier.inputs(backend.runtime.capabilities).prepared_type == FLOAT16_ROWS
    x = rng.standard_normal((TOKENS, K)).astype(np.float16 if halves else np.float32)
    ids = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :TOP_K]
    errors = []
    for number, codes in enumerate(SUPPORTED_CODES):
        stack, weights = random_stack(backend, rng, codes)
        expected = np.stack([x[i].astype(np.float64) @ weights[e] for i, chosen in enumerate(ids) for e in chosen])
        for configuration in backend.tier.checked:
            ctx = with_configuration(backend, configuration).new_context()
            for block_size in BLOCK_SIZES if number == 0 else BLOCK_SIZES[:1]:
                routing = map(backend.from_host, moe_align_block_size(ids, block_size, EXPERTS))
                out = backend.from_host(np.full((TOKENS * TOP_K, N), np.nan, x.dtype))
                stack.gemm_phase_vllm(ctx, backend.from_host(x), *routing, out, TOKENS, block_size, TOP_K)
                actual = backend.to_host(out).astype(np.float64)
                errors.append(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    return float(np.max(errors))  # NaN if one of them is


def random_stack(
    backend: OpenClBackend, rng: np.random.Generator, codes: str
) -> tuple[Any, list[npt.NDArray[np.float64]]]:
    """A stack and its experts' weights, float64 ``[K, N]`` each."""
    q = rng.integers(0, 1 << CODE_TYPES[codes].bits, (EXPERTS, K, N)).astype(np.uint8)
    scale = rng.uniform(0.5, 2, (EXPERTS, K // GROUP_SIZE, N)).astype(np.float16)
    zeros = random_zeros(rng, codes, scale.shape, symmetric=False)
    zero: Any = [None] * EXPERTS if zeros is None else zeros
    builder = backend.new_stack_builder(EXPERTS, K, N, group_size=GROUP_SIZE, codes=codes)
    for expert in range(EXPERTS):
        weight = CanonicalWeight(pack_words(q[expert]), scale[expert], zero[expert], GROUP_SIZE, None, codes)
        builder.add(expert, 0, weight)
    parts = zip(q, scale, zero, strict=True)
    return builder.finish(), [reference.dequantize(*expert, GROUP_SIZE, codes=codes) for expert in parts]


def with_configuration(backend: OpenClBackend, configuration: Configuration | None) -> OpenClBackend:
    """A backend whose products all use one configuration; the backend itself for None."""
    if configuration is None:
        return backend
    other = copy.copy(backend)
    other._tier = dataclasses.replace(backend.tier, configurations=lambda problem: [configuration])
    return other

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
from marlin_cy.opencl.checks.random_weights import random_weight
from marlin_cy.opencl.checks.verdicts import confirmed, unchecked_backend
from marlin_cy.opencl.tiers.configuration import FLOAT16_ROWS, Configuration

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend

__all__ = ["TOLERANCE", "reason_wrong"]

EXPERTS, K, N, GROUP_SIZE = 3, 320, 40, 64  # a last block of K that is half full, a last strip that is half empty
TOKENS, TOP_K = 20, 2
CODES = ("uint4", "e2m1")  # with and without zero points; products with other weights are checked at their first use
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
    """The largest relative error (norm of the error over norm of the result) of products with some code types."""
    backend = unchecked_backend(backend)
    rng = np.random.default_rng(0)
    # The type that the tier's products read most often: then later calls need these programs, too.
    halves = backend.tier.inputs(backend.runtime.capabilities).prepared_type == FLOAT16_ROWS
    x = rng.standard_normal((TOKENS, K)).astype(np.float16 if halves else np.float32)
    ids = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :TOP_K]
    errors = []
    for number, codes in enumerate(CODES):
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
    builder = backend.new_stack_builder(EXPERTS, K, N, group_size=GROUP_SIZE, codes=codes)
    weights = [random_weight(rng, K, N, GROUP_SIZE, codes, "float16", symmetric=False) for _ in range(EXPERTS)]
    for expert, weight in enumerate(weights):
        builder.add(expert, 0, weight)
    return builder.finish(), [reference.dequantize_weight(weight) for weight in weights]


def with_configuration(backend: OpenClBackend, configuration: Configuration | None) -> OpenClBackend:
    """A backend whose products all use one configuration; the backend itself for None."""
    if configuration is None:
        return backend
    other = copy.copy(backend)
    other._tier = dataclasses.replace(backend.tier, configurations=lambda problem: [configuration])
    return other

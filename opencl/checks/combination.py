"""The first use of the kernels around a layer's products (``moe.cl``): checked on a few tokens.

No other kernel can replace one of these: if a kernel is wrong, the call fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.opencl.buffers import TYPES, Rows, memory_of
from marlin_cy.opencl.checks.routing import device_rows, wrong
from marlin_cy.opencl.checks.verdicts import unchecked_backend

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.context import OpenClContext

__all__ = ["check_moe_kernel"]

TOKENS, TOP_K, WIDTH = 3, 5, 1032  # more than one work-group for a token's columns, and the last is not full
NUM_EXPERTS = 4  # ids up to 4: a row of expert 4 is left out
TOLERANCE = 2e-3  # of the norm: rounding to float16 gives 3e-4, one wrong number of all 1e-2
BFLOAT16_TOLERANCE = 4e-3  # rounding to bfloat16 gives 1e-3 by itself
WHAT = {
    "combine": "the sum of the experts' rows",
    "weigh_tokens": "the product of tokens and weights",
    "shared_factor": "the factor of the shared expert",
}


def check_moe_kernel(ctx: OpenClContext, name: str, macros: Mapping[str, int]) -> None:
    """Check a kernel of ``moe.cl``, before the first use of its program.

    Raises
    ------
    DeviceError
        The kernel gives incorrect results on the device.
    """
    verdicts = ctx.backend.runtime.verdicts
    if verdicts is None:
        return
    backend, kind = ctx.backend, f"{name}: {sorted(macros.items())}"
    if reason := verdicts.reason_wrong(kind, lambda: reason_wrong(backend, name, macros)):
        raise wrong(backend, WHAT[name], reason)


def reason_wrong(backend: OpenClBackend, name: str, macros: Mapping[str, int]) -> str | None:
    """None if a kernel gives correct results for a few tokens, else a description of the error."""
    checked = unchecked_backend(backend)
    ctx, rng = checked.new_context(), np.random.default_rng(0)
    actual, expected = CHECKS[name](ctx, macros, rng)
    error = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    bfloat16 = name == "combine" and TYPES[macros["OUTPUT_TYPE"]] == ml_dtypes.bfloat16
    tolerance = BFLOAT16_TOLERANCE if bfloat16 else TOLERANCE
    if not error <= tolerance:  # a NaN is wrong, too
        return f"its results are wrong: relative error {error:.2g}, expected at most {tolerance:g}"
    return None


Results = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""A kernel's result, and the expected result."""


def combined(ctx: OpenClContext, macros: Mapping[str, int], rng: np.random.Generator) -> Results:
    """Results of ``combine``."""
    from marlin_cy.opencl.layer.forward import Shared, enqueue_combine  # it imports this module

    backend, dtype = ctx.backend, TYPES[macros["INPUT_TYPE"]]
    chosen, ids, weights = random_choices(backend, rng)
    products = rng.standard_normal((TOKENS * TOP_K, WIDTH), np.float32).astype(dtype)
    factor = weights if macros["WEIGHTED"] else np.ones_like(weights)
    used = np.where(ids < NUM_EXPERTS, factor, 0).astype(np.float64)
    expected = np.einsum("tj,tjn->tn", used, products.reshape(TOKENS, TOP_K, WIDTH).astype(np.float64))
    products[(ids >= NUM_EXPERTS).reshape(-1)] = np.nan
    shared = None
    if macros["SHARED"]:
        rows = rng.standard_normal((TOKENS, WIDTH), np.float32).astype(dtype)
        factors = rng.uniform(0.5, 2, (TOKENS, 1)).astype(np.float32) if macros["SHARED"] == 2 else None
        expected += rows.astype(np.float64) * (1 if factors is None else factors)
        buffer: Any = None if factors is None else backend.from_host(factors).base_data
        shared = Shared(device_rows(backend, rows), buffer)
    out = backend.from_host(np.full((TOKENS, WIDTH), np.nan, TYPES[macros["OUTPUT_TYPE"]]))
    data: Any = out.base_data
    result = Rows(data, 0, macros["OUTPUT_TYPE"], TOKENS, WIDTH)
    weighted = bool(macros["WEIGHTED"])
    enqueue_combine(ctx, device_rows(backend, products), chosen, NUM_EXPERTS, shared, result, weighted=weighted)
    ctx.finish()
    return backend.to_host(out).astype(np.float64), expected


def weighed(ctx: OpenClContext, macros: Mapping[str, int], rng: np.random.Generator) -> Results:
    """Results of ``weigh_tokens``: tokens have one expert each."""
    from marlin_cy.opencl.layer.forward import enqueue_weigh
    from marlin_cy.opencl.layer.routing import Chosen

    backend = ctx.backend
    x = random_tokens(macros, rng)
    weights = rng.uniform(0.5, 2, (TOKENS, 1)).astype(np.float32)
    chosen = Chosen(None, 0, memory_of(backend.from_host(weights)), 0, 1)
    rows = enqueue_weigh(ctx, device_rows(backend, x), chosen)
    ctx.finish()
    return read(ctx, rows.data, (TOKENS, WIDTH)), x.astype(np.float64) * weights


def shared_factors(ctx: OpenClContext, macros: Mapping[str, int], rng: np.random.Generator) -> Results:
    """Results of ``shared_factor``."""
    from marlin_cy.opencl.layer.forward import enqueue_shared_factor

    x = random_tokens(macros, rng)
    gate = (rng.standard_normal(WIDTH) / np.sqrt(WIDTH)).astype(np.float32)
    buffer: Any = ctx.backend.from_host(gate).base_data
    factors = enqueue_shared_factor(ctx, buffer, device_rows(ctx.backend, x))
    ctx.finish()
    return read(ctx, factors, (TOKENS,)), 1 / (1 + np.exp(-(x.astype(np.float64) @ gate)))


CHECKS = {"combine": combined, "weigh_tokens": weighed, "shared_factor": shared_factors}


def random_choices(
    backend: OpenClBackend, rng: np.random.Generator
) -> tuple[Any, npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """``(chosen, ids, weights)`` on the device and on the host; the last token's last id is not an expert's."""
    from marlin_cy.opencl.layer.routing import Chosen

    ids = rng.integers(0, NUM_EXPERTS, (TOKENS, TOP_K)).astype(np.int32)
    ids[-1, -1] = NUM_EXPERTS
    weights = rng.uniform(0.5, 2, (TOKENS, TOP_K)).astype(np.float32)
    on_device = Chosen(memory_of(backend.from_host(ids)), 0, memory_of(backend.from_host(weights)), 0, TOP_K)
    return on_device, ids, weights


def random_tokens(macros: Mapping[str, int], rng: np.random.Generator) -> npt.NDArray[Any]:
    """Tokens of the program's input type."""
    return rng.standard_normal((TOKENS, WIDTH), np.float32).astype(TYPES[macros["INPUT_TYPE"]])


def read(ctx: OpenClContext, buffer: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """The first float32 numbers of a buffer."""
    host = np.empty(shape, np.float32)
    cl.enqueue_copy(ctx.queue, host, buffer)
    return host.astype(np.float64)

"""The first use of a configuration for a kind of product: checked on a tiny product, with the very same programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from marlin_cy import reference
from marlin_cy.activations import ACTIVATIONS
from marlin_cy.errors import BuildError, DeviceError
from marlin_cy.moe.align import moe_align_block_size
from marlin_cy.opencl.buffers import TYPES, Rows, int32_vector, memory_of
from marlin_cy.opencl.checks.random_weights import random_weight
from marlin_cy.opencl.checks.verdicts import unchecked_backend
from marlin_cy.opencl.gemm.work import RoutedBlocks, TileList
from marlin_cy.opencl.memory import uploaded
from marlin_cy.opencl.store import OpenClGptqStore, OpenClStackBuilder
from marlin_cy.opencl.tiers.configuration import Configuration
from marlin_cy.stacks.builder import checked_stack_sizes
from marlin_cy.weights.scale_records import SCALE_RECORDS

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend
    from marlin_cy.opencl.context import OpenClContext

__all__ = ["ProductKind", "right_configuration"]

# 16 blocks of K and a half, so that 8 waves along K have 2 blocks each and some 3; 2 strips of columns and a half.
# With two levels, K has to be a multiple of 256.
K, BLOCK_K, N = 1056, 1280, 40
TOLERANCE = 2e-3  # of the norm: float16 products give 3e-4; one wrong number of a thousand gives 3e-2
BFLOAT16_TOLERANCE = 4e-3  # rounding to bfloat16 gives 1e-3 by itself
NO_BIAS, OUTPUT_BIAS, EXPERT_BIAS = range(3)  # BIAS of common.cl


class ProductKind(NamedTuple):
    """The programs of a product and how they are launched: products that agree in these are checked once.

    Attributes
    ----------
    tier : str
    configuration : Configuration
    input_type, output_type : int
        Type codes of common.cl.
    aligned : bool
        Whether input rows begin at a multiple of 8 elements.
    activation : str or None
    bias_kind : int
    block_size : int or None
        Of routed products, at most ``2 * configuration.rows + 1``. Larger blocks only add full tiles.
    several_choices : bool
        Of routed products: whether several of the ids read the same input row.
    one_order : bool
        Of products by a list of tiles: whether the product is a view's.
    codes, scales : str
        The scale record is the one that is stored.
    symmetric : bool
    group_shift : int
    order : {"own", "common", "each"}
        The order of K: its own, another that is common to all experts, or one for each expert.
    parts : int
        Buffers of the weights.
    """

    tier: str
    configuration: Configuration
    input_type: int
    output_type: int
    aligned: bool
    activation: str | None
    bias_kind: int
    block_size: int | None
    several_choices: bool
    one_order: bool
    codes: str
    scales: str
    symmetric: bool
    group_shift: int
    order: str
    parts: int

    @property
    def k(self) -> int:
        """Rows of K of the tiny product."""
        return BLOCK_K if SCALE_RECORDS[self.scales].has_blocks else K


def right_configuration(
    ctx: OpenClContext,
    configurations: Sequence[Configuration],
    store: OpenClGptqStore,
    rows: Rows,
    out: Rows,
    work: RoutedBlocks | TileList,
    bias_kind: int,
    activation: str | None,
) -> Configuration:
    """The first configuration that computes this kind of product correctly on the context's device.

    Parameters
    ----------
    ctx, store, rows, out, work, bias_kind, activation
        As in :func:`marlin_cy.opencl.gemm.multiply.multiply`.
    configurations : sequence of Configuration
        Best first. One that is wrong, or does not compile, is left out with a warning.

    Raises
    ------
    DeviceError
        All of them compute wrong numbers.
    BuildError
        The last of them does not compile.
    """
    backend = ctx.backend
    verdicts = backend.runtime.verdicts
    if verdicts is None:
        return configurations[0]
    failure: DeviceError | BuildError | None = None
    for configuration in configurations:
        kind = kind_of(ctx, configuration, store, rows, out, work, bias_kind, activation)
        name = f"{backend.runtime.capabilities.name}, tier {kind.tier!r}: {configuration}"
        try:
            reason = verdicts.reason_wrong(f"product: {kind}", partial(reason_wrong, backend, kind))
        except BuildError as error:
            failure, reason = error, f"its program does not compile: {error}"
        else:
            if reason is None:
                return configuration
            failure = DeviceError(f"{name}: {reason}")
        if configuration != configurations[-1]:
            verdicts.warn(name, reason, stacklevel=6)
    assert failure is not None
    raise failure


def kind_of(
    ctx: OpenClContext,
    configuration: Configuration,
    store: OpenClGptqStore,
    rows: Rows,
    out: Rows,
    work: RoutedBlocks | TileList,
    bias_kind: int,
    activation: str | None,
) -> ProductKind:
    """The kind of a product."""
    block_size = min(work.block_size, 2 * configuration.rows + 1) if isinstance(work, RoutedBlocks) else None
    return ProductKind(
        tier=ctx.backend.tier.name,
        configuration=configuration,
        input_type=rows.type_code,
        output_type=out.type_code,
        aligned=rows.offset % 8 == 0,
        activation=activation,
        bias_kind=bias_kind,
        block_size=block_size,
        several_choices=isinstance(work, RoutedBlocks) and work.top_k > 1,
        one_order=isinstance(work, TileList) and work.one_order,
        codes=store.codes,
        scales=store.scales,
        symmetric=store.symmetric,
        group_shift=store.layout.group_shift,
        order="own" if store.order is None else "common" if len(store.group_orders) == 1 else "each",
        parts=len(store.parts),
    )


def reason_wrong(backend: OpenClBackend, kind: ProductKind) -> str | None:
    """None if a tiny product of a kind is correct, else a description of the error."""
    rng = np.random.default_rng(0)
    checked = unchecked_backend(backend, kind.configuration)
    ctx = checked.new_context()
    stack, weights = small_stack(checked, kind, rng)
    try:
        error = relative_error(ctx, kind, stack.store, weights, rng)
    finally:
        stack.store.release()
    tolerance = BFLOAT16_TOLERANCE if TYPES[kind.output_type] == ml_dtypes.bfloat16 else TOLERANCE
    if not error <= tolerance:  # a NaN is wrong, too
        return f"its results are wrong: relative error {error:.2g}, expected at most {tolerance:g}"
    return None


def relative_error(
    ctx: OpenClContext, kind: ProductKind, store: OpenClGptqStore, weights: npt.NDArray[np.float64], rng: Any
) -> float:
    """The norm of a product's error over the norm of the product; NaN if an output was left unwritten."""
    from marlin_cy.opencl.gemm.multiply import multiply  # it imports this module

    backend = ctx.backend
    work, pairs, input_rows = small_work(backend, kind, len(weights), rng)
    gated = kind.activation is not None and ACTIVATIONS[kind.activation].gated
    x = rng.standard_normal((input_rows, 2 * kind.k if gated else kind.k)).astype(TYPES[kind.input_type])
    values = x.astype(np.float64)
    if kind.activation is not None:
        values = ACTIVATIONS[kind.activation].reference(values[:, : kind.k], values[:, -kind.k :])
    bias, bias_buffer = None, None
    if kind.bias_kind != NO_BIAS:
        bias = rng.standard_normal(weights.shape[::2]).astype(np.float32)
        # A view has one row of bias. The view here (see small_work) begins at column 8 of expert 1.
        given = bias if kind.bias_kind == EXPERT_BIAS else np.ascontiguousarray(bias[1, 8:])
        bias_buffer = uploaded(backend.runtime, given, "bias")
    before = 0 if kind.aligned else 1
    flat = backend.from_host(np.concatenate([np.zeros(before, x.dtype), x.reshape(-1)]))
    first = 8 if kind.one_order else 0
    width = N - first
    out = backend.from_host(np.full((len(pairs) + 1, width), np.nan, TYPES[kind.output_type]))  # a row more, as a guard
    multiply(
        ctx,
        SimpleNamespace(store=store, bias_kind=kind.bias_kind, bias_buffer=bias_buffer),
        Rows(memory_of(flat), before, kind.input_type, input_rows, x.shape[1]),
        Rows(memory_of(out), 0, kind.output_type, len(pairs), width),
        work,
        activation=kind.activation,
        label="check",
    )
    ctx.finish()
    actual = backend.to_host(out).astype(np.float64)
    expected = np.stack([values[row] @ weights[expert] for row, expert in pairs])[:, first:]
    if bias is not None:
        expected += bias[[expert for _, expert in pairs], first:]
    if not np.isnan(actual[-1]).all():
        return np.inf  # written out of bounds
    return float(np.linalg.norm(actual[:-1] - expected) / np.linalg.norm(expected))


def small_work(
    backend: OpenClBackend, kind: ProductKind, experts: int, rng: Any
) -> tuple[RoutedBlocks | TileList, list[tuple[int, int]], int]:
    """``(work, [(input row, expert) of each output row], input rows)``: full tiles, and one that is not."""
    rows = kind.configuration.rows + 1
    if kind.block_size is None:
        if kind.one_order:
            # Expert, first column, columns, first output column, first input row, first output row, rows.
            runs = [(1, 8, N - 8, 0, 0, 0, rows)]
            pairs = [(row, 1) for row in range(rows)]
        else:
            runs = [(0, 0, N, 0, 2, 0, rows), (experts - 1, 0, N, 0, 0, rows, 2)]
            pairs = [(row + 2, 0) for row in range(rows)] + [(row, experts - 1) for row in range(2)]
        return TileList(np.array(runs, np.int32), kind.one_order), pairs, rows + 2
    top_k = 2 if kind.several_choices else 1
    tokens = max(4, -(-experts * kind.block_size // top_k)) + 1
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    arrays = [backend.from_host(array) for array in moe_align_block_size(ids, kind.block_size, experts)]
    sorted_ids, expert_ids, past = (int32_vector(array, "routing", backend.context) for array in arrays)
    limit = min(sorted_ids.length // kind.block_size, expert_ids.length) * kind.block_size
    work = RoutedBlocks(sorted_ids, expert_ids, past, limit, tokens * top_k, kind.block_size, top_k)
    return work, [(token, int(expert)) for token, chosen in enumerate(ids) for expert in chosen], tokens


def small_stack(backend: OpenClBackend, kind: ProductKind, rng: Any) -> tuple[Any, npt.NDArray[np.float64]]:
    """A stack that suits a kind, and its weights, float64 ``[experts, K, N]``."""
    group_size, k = 1 << kind.group_shift, kind.k
    experts = max(4, kind.parts)
    g_idx = [None] * experts
    if kind.order != "own":
        orders = [rng.permutation(np.arange(k, dtype=np.int32) // group_size) for _ in range(experts)]
        g_idx = orders if kind.order == "each" else orders[:1] * experts
    sizes = checked_stack_sizes(
        experts, k, N, group_size, None if kind.order == "own" else g_idx, kind.codes, kind.scales
    )
    # Not limited by a caller's max_alloc_bytes, which decides about parts alone.
    runtime = dataclasses.replace(backend.runtime, max_alloc_bytes=backend.runtime.capabilities.max_allocation)
    if kind.parts > 1:  # buffers so small that the experts need as many as there are parts
        store = OpenClGptqStore(runtime, sizes)
        store.release()
        runtime = dataclasses.replace(runtime, max_alloc_bytes=store.nbytes // kind.parts)
    builder = OpenClStackBuilder(runtime, sizes)
    weights = []
    for expert in range(experts):
        weight = random_weight(
            rng, k, N, group_size, kind.codes, kind.scales, symmetric=kind.symmetric, g_idx=g_idx[expert]
        )
        builder.add(expert, 0, weight)
        weights.append(reference.dequantize_weight(weight))
    return builder.finish(), np.stack(weights)

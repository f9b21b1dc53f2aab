"""Stacks and linear layers over packed weights in device memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyopencl as cl
from pyopencl.array import Array

from marlin_cy.arguments import integer
from marlin_cy.interface import Context, Dispatches
from marlin_cy.opencl.buffers import Vector, float_rows, int32_vector, refuse_overlap, wait_list
from marlin_cy.opencl.checks.verdicts import Verdicts
from marlin_cy.opencl.context import OpenClContext
from marlin_cy.opencl.device import Capabilities
from marlin_cy.opencl.gemm.multiply import EXPERT_BIAS, NO_BIAS, OUTPUT_BIAS, multiply
from marlin_cy.opencl.gemm.work import RoutedBlocks, TileList
from marlin_cy.opencl.memory import uploaded
from marlin_cy.opencl.program import ProgramCache
from marlin_cy.opencl.store import OpenClGptqStore
from marlin_cy.opencl.tuned import Tuned
from marlin_cy.stacks.base import PackedLinear, PackedStack
from marlin_cy.stacks.builder import as_bias
from marlin_cy.stacks.dispatches import as_dispatches, check_disjoint, check_dispatches

__all__ = ["OpenClLinear", "OpenClMarlinExpertStack", "Runtime"]

MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Runtime:
    """The objects that the contexts, stacks and builders of a backend share.

    Attributes
    ----------
    context : pyopencl.Context
    device : pyopencl.Device
    capabilities : Capabilities
    programs : ProgramCache
    loading_queue : pyopencl.CommandQueue
        An in-order queue for copies to and from the host, and for packing weights.
    loading_lock : threading.Lock
        Held while a group of commands that belong together is enqueued there.
    max_alloc_bytes : int
        The largest single buffer.
    tuned : Tuned
        The configurations that were the fastest in measurements on the device.
    verdicts : Verdicts or None
        Which kernels compute correctly on the device; None for a backend that uses its kernels without checks.
    """

    context: cl.Context
    device: cl.Device
    capabilities: Capabilities
    programs: ProgramCache
    loading_queue: cl.CommandQueue
    loading_lock: threading.Lock
    max_alloc_bytes: int
    tuned: Tuned
    verdicts: Verdicts | None = None

    def make_stack(self, store: OpenClGptqStore, bias: npt.NDArray[Any] | None) -> OpenClMarlinExpertStack:
        """The stack over a filled store, with a bias or None."""
        return OpenClMarlinExpertStack(store, store.num_experts, store.n, store.k, bias)


def opencl_context(ctx: Any) -> OpenClContext:
    """``ctx``, if it is an OpenCL context."""
    if not isinstance(ctx, OpenClContext):
        raise TypeError(f"ctx: got {type(ctx).__name__}, expected an OpenClContext from OpenClBackend.new_context")
    return ctx


class OpenClMarlinExpertStack(PackedStack):
    """Experts in packed int4 strips, in device memory.

    Routing arrays of :meth:`gemm_phase_vllm` stay on the device and are never read back, so their contents are not
    checked as on the CPU. Blocks of an expert that does not exist are skipped, and so are ids below 0; a
    ``num_tokens_past_padded`` on the device is limited to the whole blocks that both arrays have. Nothing is read or
    written out of bounds. A duplicate id is computed twice.

    Parameters
    ----------
    store : OpenClGptqStore
    num_experts, n_per_expert, k : int
        Sizes of the store.
    bias : float array ``[num_experts, n_per_expert]``, optional
        Copied to the device.
    """

    store_type = OpenClGptqStore
    store: OpenClGptqStore

    def __init__(
        self,
        store: OpenClGptqStore,
        num_experts: int,
        n_per_expert: int,
        k: int,
        bias: npt.ArrayLike | None = None,
    ) -> None:
        super().__init__(store, num_experts, n_per_expert, k)
        self.bias_kind = NO_BIAS
        self.bias_buffer: cl.Buffer | None = None
        if bias is not None:
            self._bias = as_bias(bias, (num_experts, n_per_expert))
            self.bias_kind, self.bias_buffer = EXPERT_BIAS, uploaded(store.runtime, self._bias, "bias")

    def zero_workspace(self, ctx: Context) -> None:
        """Zero the split-K sums of the context. Optional: a call writes each sum before it reads it."""
        with opencl_context(ctx) as ctx:
            ctx.zero(["partial sums"])

    def gemm_phase_batched(self, ctx: Context, input: Array, dispatches: Dispatches, output: Array, k: int) -> None:
        ctx = opencl_context(ctx)
        store = self.store
        if integer("k", k) != store.k:
            raise ValueError(f"k: got {k}, expected {store.k}, the stack's")
        dispatches = as_dispatches(dispatches)
        rows = float_rows(input, "input", store.k, ctx.cl_context)
        out = float_rows(output, "output", store.n, ctx.cl_context, True)
        refuse_overlap(output, input, "output")
        check_dispatches(dispatches, store.num_experts, rows.rows, out.rows)
        with ctx:
            dispatches = dispatches[dispatches[:, 3] > 0]
            check_disjoint(dispatches)
            if len(dispatches):
                runs = np.zeros((len(dispatches), 7), np.int32)
                runs[:, 0] = dispatches[:, 0]
                runs[:, 2] = store.n
                runs[:, 4:7] = dispatches[:, 1:4]
                waits = wait_list(ctx.queue, (input, output))
                event = multiply(ctx, self, rows, out, TileList(runs), waits=waits, label="gemm_phase_batched")
                ctx.written(output, event)

    def gemm_phase_vllm(
        self,
        ctx: Context,
        input: Array,
        sorted_token_ids: Array,
        expert_ids: Array,
        num_tokens_past_padded: Array | npt.NDArray[np.int32] | int,
        output: Array,
        prob_m: int,
        moe_block_size: int,
        top_k: int,
    ) -> None:
        ctx = opencl_context(ctx)
        store, cl_context = self.store, ctx.cl_context
        past, on_host = past_padded(num_tokens_past_padded, cl_context)
        prob_m, top_k = integer("prob_m", prob_m), integer("top_k", top_k)
        block_size = integer("moe_block_size", moe_block_size)
        rows = float_rows(input, "input", store.k, cl_context)
        out = float_rows(output, "output", store.n, cl_context, True)
        sorted_ids = int32_vector(sorted_token_ids, "sorted_token_ids", cl_context)
        experts = int32_vector(expert_ids, "expert_ids", cl_context)
        refuse_overlap(output, input, "output")
        if block_size < 1:
            raise ValueError(f"moe_block_size: got {block_size}, expected at least 1")
        if top_k < 1:
            raise ValueError(f"top_k: got {top_k}, expected at least 1")
        if not 0 <= prob_m <= rows.rows:
            raise ValueError(f"prob_m: got {prob_m}, expected 0 to {rows.rows}, the rows of input")
        if prob_m > out.rows // top_k:
            raise ValueError(f"prob_m * top_k: got {prob_m} * {top_k}, expected at most {out.rows}, the rows of output")
        limit = min(min(sorted_ids.length, MAX_INT32) // block_size, experts.length) * block_size
        if on_host is not None:
            if not 0 <= on_host <= limit or on_host % block_size:
                raise ValueError(
                    f"num_tokens_past_padded: got {on_host}, expected a multiple of moe_block_size {block_size}, "
                    f"within the {sorted_ids.length} sorted_token_ids and the {experts.length} blocks of expert_ids"
                )
            limit = on_host
        with ctx:
            if limit and prob_m:
                used = [input, output, sorted_token_ids, expert_ids]
                if isinstance(num_tokens_past_padded, Array):
                    used.append(num_tokens_past_padded)
                work = RoutedBlocks(sorted_ids, experts, past, limit, prob_m * top_k, block_size, top_k)
                event = multiply(ctx, self, rows, out, work, waits=wait_list(ctx.queue, used), label="gemm_phase_vllm")
                ctx.written(output, event)

    def make_expert_linear(
        self, expert_offset: int, expert_n: int, bias_host: npt.ArrayLike | None = None
    ) -> OpenClLinear:
        return OpenClLinear(self, integer("expert_offset", expert_offset), integer("expert_n", expert_n), bias_host)


def past_padded(value: Any, cl_context: cl.Context) -> tuple[Vector | None, int | None]:
    """``num_tokens_past_padded`` as ``(Vector, None)`` if it is on the device, ``(None, int)`` if on the host."""
    if isinstance(value, Array):
        if value.size != 1:
            raise ValueError(f"num_tokens_past_padded: got shape {value.shape}, expected one int32")
        return int32_vector(value, "num_tokens_past_padded", cl_context), None
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise ValueError(f"num_tokens_past_padded: got shape {value.shape}, expected one int32")
        value = value.item()
    return None, integer("num_tokens_past_padded", value)


class OpenClLinear(PackedLinear):
    """A view of columns of an :class:`OpenClMarlinExpertStack`. The parameters are those of the base class."""

    def __init__(
        self, stack: OpenClMarlinExpertStack, offset: int, width: int, bias: npt.ArrayLike | None = None
    ) -> None:
        super().__init__(stack, offset, width, bias)
        self.store, self.bias_buffer = stack.store, self._bias
        self.bias_kind = NO_BIAS if bias is None else OUTPUT_BIAS
        self._experts = expert_columns(stack.store.n, offset, width)

    def _placed(self, bias: npt.NDArray[Any]) -> cl.Buffer:
        return uploaded(self.stack.store.runtime, bias, "bias")

    def forward(self, ctx: Context, input: Array, out: Array, m: int) -> None:
        ctx, m = opencl_context(ctx), integer("m", m)
        rows = float_rows(input, "input", self.stack.k, ctx.cl_context)
        output = float_rows(out, "out", self._width, ctx.cl_context, True)
        refuse_overlap(out, input, "out")
        most = min(rows.rows, output.rows)
        if not 0 <= m <= most:
            raise ValueError(f"m: got {m}, expected 0 to {most}, the rows of input and out")
        with ctx:
            if m:
                runs = np.zeros((len(self._experts), 7), np.int32)
                runs[:, :4] = self._experts
                runs[:, 6] = m
                event = multiply(
                    ctx,
                    self,
                    rows,
                    output,
                    TileList(runs, one_order=True),
                    waits=wait_list(ctx.queue, (input, out)),
                    label="forward",
                )
                ctx.written(out, event)


def expert_columns(n: int, offset: int, width: int) -> npt.NDArray[np.int32]:
    """The parts of a view of stacked N, int32 ``[experts, 4]``: expert, first column in it, columns, first output
    column."""
    rows: list[Sequence[int]] = []
    done = 0
    while done < width:
        expert, column = divmod(offset + done, n)
        columns = min(n - column, width - done)
        rows.append((expert, column, columns, done))
        done += columns
    return np.array(rows, np.int32)

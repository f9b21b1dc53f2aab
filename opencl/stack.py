"""The OpenCL backend: stacks and linear layers over packed weights in device memory."""

import copy
import threading
import warnings
from dataclasses import dataclass

import numpy as np
import pyopencl as cl
from pyopencl.array import Array

from marlin_cy.arguments import integer
from marlin_cy.builder import as_bias, checked_stack_sizes
from marlin_cy.errors import BackendUnavailable
from marlin_cy.interface import Backend
from marlin_cy.moe.chosen import as_topk
from marlin_cy.opencl import moe, tiers
from marlin_cy.opencl.buffers import (
    as_bytes,
    check_contiguous,
    examined,
    float_rows,
    int32_vector,
    refuse_overlap,
    wait_list,
)
from marlin_cy.opencl.context import OpenClContext
from marlin_cy.opencl.device import Capabilities, capabilities, describe, open_device
from marlin_cy.opencl.gemm import EXPERT_BIAS, NO_BIAS, OUTPUT_BIAS, multiply
from marlin_cy.opencl.program import ProgramCache
from marlin_cy.opencl.routing import device_topk, route
from marlin_cy.opencl.selfcheck import reason_wrong
from marlin_cy.opencl.store import OpenClGptqStore, OpenClStackBuilder, driver_errors, memory_errors, uploaded
from marlin_cy.opencl.tuning import Tuned
from marlin_cy.opencl.work import Listed, Routed
from marlin_cy.packed import PackedLinear, PackedStack, as_dispatches

__all__ = ["OpenClBackend", "OpenClLinear", "OpenClMarlinExpertStack", "Runtime"]

MAX_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Runtime:
    """What all that a backend makes has in common.

    Attributes
    ----------
    context : pyopencl.Context
    device : pyopencl.Device
    capabilities : Capabilities
    programs : ProgramCache
    loading_queue : pyopencl.CommandQueue
        In order; for copies to and from the host, and for packing weights.
    loading_lock : threading.Lock
        Held while commands that belong together are enqueued there.
    max_alloc_bytes : int
        The largest single buffer.
    tuned : Tuned
        Which configurations were found to be fastest on the device.
    """

    context: cl.Context
    device: cl.Device
    capabilities: Capabilities
    programs: ProgramCache
    loading_queue: cl.CommandQueue
    loading_lock: threading.Lock
    max_alloc_bytes: int
    tuned: Tuned

    def make_stack(self, store, bias):
        """The stack over a filled store, with a bias or None."""
        return OpenClMarlinExpertStack(store, store.num_experts, store.n, store.k, bias)


def opencl_context(ctx):
    """``ctx``, if it is an OpenCL context."""
    if not isinstance(ctx, OpenClContext):
        raise TypeError(f"ctx: got {type(ctx).__name__}, expected an OpenClContext from OpenClBackend.new_context")
    return ctx


class OpenClMarlinExpertStack(PackedStack):
    """Experts in packed int4 strips, in device memory.

    Routing arrays of :meth:`gemm_phase_vllm` stay on the device and are never read back. So what they
    hold is not checked beforehand as on the CPU: blocks of an expert that does not exist are skipped, and
    so are ids below 0; a ``num_tokens_past_padded`` on the device counts as far as both arrays reach, in
    whole blocks. Nothing is read or written out of bounds. An id that occurs twice is computed twice.

    Parameters
    ----------
    store : OpenClGptqStore
    num_experts, n_per_expert, k : int
        Of the store.
    bias : float array ``[num_experts, n_per_expert]``, optional
        Copied to the device.
    """

    store_type = OpenClGptqStore

    def __init__(self, store, num_experts, n_per_expert, k, bias=None):
        super().__init__(store, num_experts, n_per_expert, k, bias)
        self.bias_kind, self.bias_buffer = NO_BIAS, None
        if bias is not None:
            self._bias = as_bias(bias, (num_experts, n_per_expert))
            self.bias_kind, self.bias_buffer = EXPERT_BIAS, uploaded(store.runtime, self._bias, "bias")

    def zero_workspace(self, ctx):
        """Zero the split-K sums of the context. Calls write each before they read it, so this is optional."""
        with opencl_context(ctx) as ctx:
            ctx.zero(["partial sums"])

    def gemm_phase_batched(self, ctx, input, dispatches, output, k):
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
                event = multiply(ctx, self, rows, out, Listed(runs), waits=waits, label="gemm_phase_batched")
                ctx.written(output, event)

    def gemm_phase_vllm(
        self,
        ctx,
        input,
        sorted_token_ids,
        expert_ids,
        num_tokens_past_padded,
        output,
        prob_m,
        moe_block_size,
        top_k,
    ):
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
                if past is not None:
                    used.append(num_tokens_past_padded)
                work = Routed(sorted_ids, experts, past, limit, prob_m * top_k, block_size, top_k)
                event = multiply(ctx, self, rows, out, work, waits=wait_list(ctx.queue, used), label="gemm_phase_vllm")
                ctx.written(output, event)

    def make_expert_linear(self, expert_offset, expert_n, bias_host=None):
        return OpenClLinear(self, integer("expert_offset", expert_offset), integer("expert_n", expert_n), bias_host)


def past_padded(value, cl_context):
    """``num_tokens_past_padded`` as ``(Vector or None, int or None)``: on the device, or on the host."""
    if isinstance(value, Array):
        if value.size != 1:
            raise ValueError(f"num_tokens_past_padded: got shape {value.shape}, expected one int32")
        return int32_vector(value, "num_tokens_past_padded", cl_context), None
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise ValueError(f"num_tokens_past_padded: got shape {value.shape}, expected one int32")
        value = value.item()
    return None, integer("num_tokens_past_padded", value)


def check_dispatches(dispatches, num_experts, input_rows, output_rows):
    """Refuse dispatches (int64 ``[D, 4]``) that reach outside."""
    if not len(dispatches):
        return
    experts, in_rows, out_rows, m = dispatches.T
    wrong = (experts < 0) | (experts >= num_experts) | (m < 0)
    wrong |= (in_rows < 0) | (in_rows > input_rows - m) | (out_rows < 0) | (out_rows > output_rows - m)
    if not wrong.any():
        return
    position = int(np.flatnonzero(wrong)[0])
    expert, in_row, out_row, m = map(int, dispatches[position])
    if not 0 <= expert < num_experts:
        raise IndexError(f"dispatches[{position}]: got expert_idx {expert}, expected 0 to {num_experts - 1}")
    if m < 0:
        raise ValueError(f"dispatches[{position}]: got m {m}, expected 0 or more")
    if not 0 <= in_row <= input_rows - m:
        raise IndexError(
            f"dispatches[{position}]: got {m} input rows from {in_row} on, expected them within the input's "
            f"{input_rows}"
        )
    raise IndexError(
        f"dispatches[{position}]: got {m} output rows from {out_row} on, expected them within the output's "
        f"{output_rows}"
    )


def check_disjoint(dispatches):
    """Refuse output rows that two dispatches write."""
    if len(dispatches) < 2:
        return
    ordered = dispatches[np.argsort(dispatches[:, 2], kind="stable")]
    begins, ends = ordered[:, 2], ordered[:, 2] + ordered[:, 3]
    wrong = np.flatnonzero(ends[:-1] > begins[1:])
    if len(wrong):
        i = wrong[0]
        raise ValueError(
            f"dispatches: got overlapping output rows {begins[i]} to {ends[i]} and {begins[i + 1]} to {ends[i + 1]}, "
            "expected separate ones"
        )


class OpenClLinear(PackedLinear):
    """A view on columns of an :class:`OpenClMarlinExpertStack`; parameters as for the base class."""

    def __init__(self, stack, offset, width, bias=None):
        super().__init__(stack, offset, width, bias)
        self.store, self.bias_buffer = stack.store, self._bias
        self.bias_kind = NO_BIAS if bias is None else OUTPUT_BIAS
        self._experts = expert_columns(stack.store.n, offset, width)

    def _placed(self, bias):
        return uploaded(self.stack.store.runtime, bias, "bias")

    def forward(self, ctx, input, out, m):
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
                    Listed(runs, one_order=True),
                    waits=wait_list(ctx.queue, (input, out)),
                    label="forward",
                )
                ctx.written(out, event)


def expert_columns(n, offset, width):
    """int32 ``[experts, 4]``: expert, first column in it, columns, first output column, of a view of stacked N."""
    rows = []
    done = 0
    while done < width:
        expert, column = divmod(offset + done, n)
        columns = min(n - column, width - done)
        rows.append((expert, column, columns, done))
        done += columns
    return np.array(rows, np.int32)


class OpenClBackend(Backend):
    """An OpenCL device. A buffer is a :class:`pyopencl.array.Array` on the backend's context.

    Gemm and layer calls take device arrays only; an ``ndarray`` is refused with a ``TypeError`` that
    names :meth:`from_host`, which copies. (What a caller chose for ``MoeLayer.forward_routed`` may be on either side.)

    A device or driver that fails raises :class:`~marlin_cy.errors.DeviceError`, whatever the call; one that has too
    little memory, :class:`~marlin_cy.errors.DeviceMemoryError`. Contexts stay usable as far as the device is.

    Parameters
    ----------
    device : pyopencl.Device, int or str, optional
        As :func:`~marlin_cy.opencl.device.choose_device` takes it.
    context : pyopencl.Context, optional
        Used as it is.
    queue : pyopencl.CommandQueue, optional
        Its context and device are used, and contexts made by :meth:`new_context` enqueue there unless
        they are given another.
    tier : str, optional
        ``"mma"``, ``"subgroup"`` or ``"portable"``: the kernels to use. The best that works unless given.
    max_alloc_bytes : int, optional
        The largest single buffer, when it is to be smaller than the device's.

    Raises
    ------
    TypeError, ValueError, IndexError
        An option that is not one of these.
    BackendUnavailable
        The device cannot be used, or not with this tier; the message says why.
    """

    def __init__(self, device=None, context=None, queue=None, tier=None, max_alloc_bytes=None):
        opened = open_device(device, context, queue)
        found = capabilities(opened.device)
        largest = found.max_allocation
        if max_alloc_bytes is not None:
            max_alloc_bytes = integer("max_alloc_bytes", max_alloc_bytes)
            if max_alloc_bytes < 1:
                raise ValueError(f"max_alloc_bytes: got {max_alloc_bytes}, expected at least 1")
            largest = min(largest, max_alloc_bytes)
        if tier is not None:
            if not isinstance(tier, str):
                raise TypeError(f"tier: got {type(tier).__name__}, expected str")
            tier = tiers.tier_named(tier)
            if reason := tier.missing(found):
                raise BackendUnavailable(
                    f"backend 'opencl': tier {tier.name!r} cannot run on {describe(opened.device)}: {reason}"
                )
        try:
            loading_queue = cl.CommandQueue(opened.context, opened.device)
        except cl.Error as error:
            raise BackendUnavailable(
                f"backend 'opencl': {describe(opened.device)} takes no command queue ({error}); choose another device"
            ) from error
        self.device_reason = opened.reason
        self.runtime = Runtime(
            context=opened.context,
            device=opened.device,
            capabilities=found,
            programs=ProgramCache(opened.context, opened.device),
            loading_queue=loading_queue,
            loading_lock=threading.Lock(),
            max_alloc_bytes=largest,
            tuned=Tuned(found),
        )
        self._queue, self._forced, self._tier = queue, tier, None
        self._tier_lock = threading.Lock()

    def __repr__(self):
        return f"OpenClBackend({describe(self.runtime.device)})"

    @property
    def name(self):
        return "opencl"

    @property
    def context(self):
        """The ``pyopencl.Context``."""
        return self.runtime.context

    @property
    def device(self):
        """The ``pyopencl.Device``."""
        return self.runtime.device

    @property
    def tier(self):
        """The :class:`~marlin_cy.opencl.configuration.Tier` in use; chosen, and checked, when first asked for.

        Raises
        ------
        BackendUnavailable
            The tier that was asked for, or every one, fails its check.
        """
        if self._tier is None:
            with self._tier_lock:
                if self._tier is None:
                    self._tier = self._choose_tier()
        return self._tier

    def _choose_tier(self):
        runtime = self.runtime
        candidates = tiers.TIERS if self._forced is None else (self._forced,)
        candidates = [tier for tier in candidates if tier.missing(runtime.capabilities) is None]
        reasons = []
        for tier in candidates:
            reason = reason_wrong(self._unchecked(tier))
            if reason is None:
                return tier
            reasons.append(f"tier {tier.name!r} is not used on {describe(runtime.device)}: {reason}")
            if tier is not candidates[-1]:
                warnings.warn(reasons[-1], RuntimeWarning, stacklevel=5)
        raise BackendUnavailable(f"backend 'opencl': {'; '.join(reasons)}")

    def _unchecked(self, tier):
        """This backend with a tier that is taken on trust."""
        other = copy.copy(self)
        other._tier = other._forced = tier
        return other

    def new_context(self, *, queue=None, profiling=False):
        """An :class:`~marlin_cy.opencl.context.OpenClContext`; the options are documented there."""
        return OpenClContext(self, self._queue if queue is None else queue, profiling)

    def from_host(self, array):
        """A device array holding a copy of ``array``; the copy has been made on return."""
        array = np.ascontiguousarray(array)
        buffer = self.empty(array.shape, array.dtype)
        if array.size:
            with memory_errors(self.runtime, array.nbytes, f"array of shape {array.shape}"):
                cl.enqueue_copy(self.runtime.loading_queue, buffer.base_data, as_bytes(array))
        return buffer

    def to_host(self, buffer):
        """A copy of a device array, after the work enqueued on it has finished."""
        examined(buffer, "buffer", self.runtime.context)
        check_contiguous(buffer, "buffer")
        host = np.empty(buffer.shape, buffer.dtype)
        if host.size:
            with driver_errors(self.runtime):
                cl.enqueue_copy(
                    self.runtime.loading_queue,
                    as_bytes(host),
                    buffer.base_data,
                    src_offset=buffer.offset,
                    wait_for=buffer.events or None,
                )
        return host

    def empty(self, shape, dtype):
        nbytes = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        with memory_errors(self.runtime, nbytes, f"array of shape {shape}"):
            return Array(self.runtime.loading_queue, shape, dtype)

    def new_stack_builder(
        self, num_experts, k, n_per_expert, *, group_size, g_idx=None, codes="uint4", scale_dtype=np.float16
    ):
        return OpenClStackBuilder(
            self.runtime, *checked_stack_sizes(num_experts, k, n_per_expert, group_size, g_idx, codes, scale_dtype)
        )

    def _linear(self, stack, bias):
        return OpenClLinear(stack, 0, stack.n_per_expert, bias)

    def _route(self, ctx, router_logits, routing):
        return route(opencl_context(ctx), router_logits, routing)

    def _topk(self, topk_ids, topk_weights, num_experts):
        if not isinstance(topk_ids, Array) and not isinstance(topk_weights, Array):
            return as_topk(topk_ids, topk_weights, num_experts)
        return device_topk(topk_ids, topk_weights, self.runtime.context)

    def _moe_forward(self, ctx, layer, hidden_states, out, router_logits, topk_ids, topk_weights):
        for name, stack in layer._stacks():
            if not isinstance(stack, OpenClMarlinExpertStack):
                raise TypeError(f"ctx: got an OpenCL context, but the layer's {name} is a {type(stack).__name__}")
        moe.forward(opencl_context(ctx), layer, hidden_states, out, router_logits, topk_ids, topk_weights)

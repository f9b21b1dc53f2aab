"""The OpenCL backend: opens a device, chooses a tier, and makes contexts, buffers, stacks and linear layers."""

from __future__ import annotations

import argparse
import copy
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyopencl as cl
from pyopencl.array import Array

from marlin_cy.arguments import integer
from marlin_cy.errors import BackendUnavailable
from marlin_cy.interface import Backend, Context, MoePlan, StackBuilder
from marlin_cy.opencl import tiers
from marlin_cy.opencl.buffers import array_info, as_bytes, check_contiguous, flush_queues, memory_of
from marlin_cy.opencl.checks.verdicts import Verdicts
from marlin_cy.opencl.command_line import OpenClCommandLine
from marlin_cy.opencl.context import OpenClContext
from marlin_cy.opencl.device import capabilities, describe, open_device
from marlin_cy.opencl.gemm.codes import SUPPORTED_CODES, SUPPORTED_SCALES
from marlin_cy.opencl.layer import forward
from marlin_cy.opencl.layer.routing import device_topk, route
from marlin_cy.opencl.memory import driver_errors, memory_errors
from marlin_cy.opencl.program import ProgramCache
from marlin_cy.opencl.selfcheck import reason_wrong
from marlin_cy.opencl.stack import OpenClMarlinExpertStack, Runtime, opencl_context
from marlin_cy.opencl.store import OpenClStackBuilder
from marlin_cy.opencl.tiers.configuration import Tier
from marlin_cy.opencl.tuned import Tuned
from marlin_cy.stacks.builder import checked_stack_sizes, refuse_unsupported

if TYPE_CHECKING:
    from marlin_cy.decoder.plan import DecoderPlan
    from marlin_cy.moe.routing import Routing
    from marlin_cy.opencl.decoder.program import OpenClDecoder
    from marlin_cy.opencl.layer_measurement import OpenClLayerMeasurement

__all__ = ["OpenClBackend"]


class OpenClBackend(OpenClCommandLine, Backend):
    """An OpenCL device. A buffer is a :class:`pyopencl.array.Array` on the backend's context.

    Products and layers take device arrays only: an ``ndarray`` is a ``TypeError`` whose message names
    :meth:`from_host`, which copies. The expert ids and weights of ``MoeLayer.forward_routed`` may be on the host or
    on the device.

    In every call, a device or driver that fails raises :class:`~marlin_cy.errors.DeviceError`, and a device with too
    little memory raises :class:`~marlin_cy.errors.DeviceMemoryError`. Contexts stay usable unless the device is lost.

    Parameters
    ----------
    device : pyopencl.Device, int or str, optional
        As for :func:`~marlin_cy.opencl.device.choose_device`.
    context : pyopencl.Context, optional
        The context to use.
    queue : pyopencl.CommandQueue, optional
        Its context and device are used. Contexts from :meth:`new_context` enqueue on it unless they get another
        queue.
    tier : str, optional
        The kernels to use: ``"mma"``, ``"subgroup"`` or ``"portable"``; by default the best one that passes its check.
    max_alloc_bytes : int, optional
        A limit on the size of one buffer, below the device's own.

    Raises
    ------
    TypeError, ValueError, IndexError
        An invalid option.
    BackendUnavailable
        The device or the tier cannot be used. The message says why.
    """

    def __init__(
        self,
        device: cl.Device | int | str | None = None,
        context: cl.Context | None = None,
        queue: cl.CommandQueue | None = None,
        tier: str | None = None,
        max_alloc_bytes: int | None = None,
    ) -> None:
        opened = open_device(device, context, queue)
        found = capabilities(opened.device)
        largest = found.max_allocation
        if max_alloc_bytes is not None:
            max_alloc_bytes = integer("max_alloc_bytes", max_alloc_bytes)
            if max_alloc_bytes < 1:
                raise ValueError(f"max_alloc_bytes: got {max_alloc_bytes}, expected at least 1")
            largest = min(largest, max_alloc_bytes)
        forced: Tier | None = None
        if tier is not None:
            if not isinstance(tier, str):
                raise TypeError(f"tier: got {type(tier).__name__}, expected str")
            forced = tiers.tier_named(tier)
            if reason := forced.missing(found):
                raise BackendUnavailable(
                    f"backend 'opencl': tier {tier!r} cannot run on {describe(opened.device)}: {reason}"
                )
        try:
            loading_queue = cl.CommandQueue(opened.context, opened.device)
        except cl.Error as error:
            raise BackendUnavailable(
                f"backend 'opencl': {describe(opened.device)} has no command queue ({error}); choose another device"
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
            verdicts=Verdicts(opened.device),
        )
        self._queue, self._forced = queue, forced
        self._tier: Tier | None = None
        self._tier_lock = threading.Lock()

    def __repr__(self) -> str:
        return f"OpenClBackend({describe(self.runtime.device)})"

    @property
    def name(self) -> str:
        return "opencl"

    @property
    def context(self) -> cl.Context:
        """The ``pyopencl.Context``."""
        return self.runtime.context

    @property
    def device(self) -> cl.Device:
        """The ``pyopencl.Device``."""
        return self.runtime.device

    @property
    def tier(self) -> Tier:
        """The :class:`~marlin_cy.opencl.tiers.configuration.Tier` in use; chosen and checked on first access.

        Raises
        ------
        BackendUnavailable
            The requested tier fails its check, or no tier was requested and all tiers fail.
        """
        if self._tier is None:
            with self._tier_lock:
                if self._tier is None:
                    self._tier = self._choose_tier()
        return self._tier

    def _choose_tier(self) -> Tier:
        runtime = self.runtime
        offered = tiers.TIERS if self._forced is None else (self._forced,)
        candidates = [tier for tier in offered if tier.missing(runtime.capabilities) is None]
        reasons = []
        for tier in candidates:
            reason = reason_wrong(self._unchecked(tier))
            if reason is None:
                return tier
            reasons.append(f"tier {tier.name!r} is not used on {describe(runtime.device)}: {reason}")
            if tier is not candidates[-1]:
                warnings.warn(reasons[-1], RuntimeWarning, stacklevel=5)
        raise BackendUnavailable(f"backend 'opencl': {'; '.join(reasons)}")

    def _unchecked(self, tier: Tier) -> OpenClBackend:
        """A copy of this backend that uses a tier without a check."""
        other = copy.copy(self)
        other._tier = other._forced = tier
        return other

    def new_context(self, *, queue: cl.CommandQueue | None = None, profiling: bool = False) -> OpenClContext:
        """An :class:`~marlin_cy.opencl.context.OpenClContext`, which documents the options."""
        return OpenClContext(self, self._queue if queue is None else queue, profiling)

    def from_host(self, array: npt.NDArray[Any]) -> Array:
        """A device array with a copy of ``array``. The copy is complete on return."""
        array = np.ascontiguousarray(array)
        buffer = self.empty(array.shape, array.dtype)
        data = memory_of(buffer)
        if array.size and data is not None:
            with memory_errors(self.runtime, array.nbytes, f"array of shape {array.shape}"):
                cl.enqueue_copy(self.runtime.loading_queue, data, as_bytes(array))
        return buffer

    def to_host(self, buffer: Array) -> npt.NDArray[Any]:
        """A copy of a device array, after the work enqueued on it has finished."""
        array_info(buffer, "buffer", self.runtime.context)
        check_contiguous(buffer, "buffer")
        host = np.empty(buffer.shape, buffer.dtype)
        data = memory_of(buffer)
        if host.size and data is not None:
            with driver_errors(self.runtime):
                flush_queues(buffer.events)
                cl.enqueue_copy(
                    self.runtime.loading_queue,
                    as_bytes(host),
                    data,
                    src_offset=buffer.offset,
                    wait_for=buffer.events or None,
                )
        return host

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        nbytes = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        with memory_errors(self.runtime, nbytes, f"array of shape {shape}"):
            return Array(self.runtime.loading_queue, shape, dtype)

    def new_stack_builder(
        self,
        num_experts: int,
        k: int,
        n_per_expert: int,
        *,
        group_size: int,
        g_idx: npt.NDArray[Any] | Sequence[npt.NDArray[Any] | None] | None = None,
        codes: str = "uint4",
        scales: str | npt.DTypeLike = "float16",
    ) -> StackBuilder:
        sizes = checked_stack_sizes(num_experts, k, n_per_expert, group_size, g_idx, codes, scales)
        refuse_unsupported("OpenCL", sizes, SUPPORTED_CODES, SUPPORTED_SCALES)
        return OpenClStackBuilder(self.runtime, sizes)

    def route(self, ctx: Context, router_logits: Array, routing: Routing) -> tuple[Array, Array]:
        ids, weights = route(opencl_context(ctx), router_logits, routing)
        return ids, weights

    def topk_arguments(self, topk_ids: Any, topk_weights: Any, num_experts: int) -> tuple[Any, Any]:
        """Arrays on the host are checked and copied. Of arrays on the device only type and shape are checked."""
        if not isinstance(topk_ids, Array) and not isinstance(topk_weights, Array):
            return super().topk_arguments(topk_ids, topk_weights, num_experts)
        ids, weights = device_topk(topk_ids, topk_weights, self.runtime.context)
        return ids, weights

    def moe_forward(
        self,
        ctx: Context,
        plan: MoePlan,
        hidden_states: Array,
        out: Array,
        router_logits: Array | None,
        topk_ids: Array | npt.NDArray[np.int32] | None,
        topk_weights: Array | npt.NDArray[np.float32] | None,
    ) -> None:
        for name, stack in plan.stacks():
            if not isinstance(stack, OpenClMarlinExpertStack):
                raise TypeError(f"ctx: got an OpenCL context, but the layer's {name} is a {type(stack).__name__}")
        forward.forward(opencl_context(ctx), plan, hidden_states, out, router_logits, topk_ids, topk_weights)

    def new_decoder(
        self, ctx: Context, plan: DecoderPlan, num_pages: int, num_states: int, cache_dtype: str
    ) -> OpenClDecoder:
        from marlin_cy.opencl.decoder.program import OpenClDecoder

        return OpenClDecoder(ctx, plan, num_pages, num_states, cache_dtype)

    def describe(self, ctx: Context) -> str:
        return f"{self.runtime.capabilities.name}, tier {self.tier.name}"

    def layer_measurement(self, arguments: argparse.Namespace) -> OpenClLayerMeasurement:
        from marlin_cy.opencl.layer_measurement import OpenClLayerMeasurement

        return OpenClLayerMeasurement(self)

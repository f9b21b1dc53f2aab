"""The OpenCL backend: opens a device, chooses a tier, and makes contexts, buffers, stacks and linear layers."""

import copy
import threading
import warnings

import numpy as np
import pyopencl as cl
from pyopencl.array import Array

from marlin_cy.arguments import integer
from marlin_cy.errors import BackendUnavailable
from marlin_cy.interface import Backend
from marlin_cy.moe.topk_arguments import as_topk
from marlin_cy.opencl import tiers
from marlin_cy.opencl.buffers import array_info, as_bytes, check_contiguous, flush_queues
from marlin_cy.opencl.checks.verdicts import Verdicts
from marlin_cy.opencl.context import OpenClContext
from marlin_cy.opencl.device import capabilities, describe, open_device
from marlin_cy.opencl.layer import forward
from marlin_cy.opencl.layer.routing import device_topk, route
from marlin_cy.opencl.memory import driver_errors, memory_errors
from marlin_cy.opencl.program import ProgramCache
from marlin_cy.opencl.selfcheck import reason_wrong
from marlin_cy.opencl.stack import OpenClLinear, OpenClMarlinExpertStack, Runtime, opencl_context
from marlin_cy.opencl.store import OpenClStackBuilder
from marlin_cy.opencl.tuned import Tuned
from marlin_cy.stacks.builder import checked_stack_sizes

__all__ = ["OpenClBackend"]


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
            verdicts=Verdicts(opened.device),
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
        """The :class:`~marlin_cy.opencl.tiers.configuration.Tier` in use; chosen, and checked, when first asked for.

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
        array_info(buffer, "buffer", self.runtime.context)
        check_contiguous(buffer, "buffer")
        host = np.empty(buffer.shape, buffer.dtype)
        if host.size:
            with driver_errors(self.runtime):
                flush_queues(buffer.events)
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
        forward.forward(opencl_context(ctx), layer, hidden_states, out, router_logits, topk_ids, topk_weights)

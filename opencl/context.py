"""Where OpenCL calls run: a command queue, the workspace they reuse, and the kernels made for it."""

import threading
from collections import deque
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import pyopencl as cl

from marlin_cy.errors import ContextInUse
from marlin_cy.interface import Context
from marlin_cy.opencl.arguments import arguments_of
from marlin_cy.opencl.buffers import mark_written
from marlin_cy.opencl.launch import Launch
from marlin_cy.opencl.memory import device_error, driver_errors, uploaded, zeroed_buffers

__all__ = ["OpenClContext"]

MAX_UPLOADS = 64  # host arrays that are kept until they were copied; a call waits for the oldest beyond that
MAX_INT32 = 2**31 - 1
ARRIVED = "arrived work-groups"
ARRIVAL_BITS = 18  # of the counter of work-groups: a launch that uses it has fewer than 2**18, the rest is its number
MAX_ARRIVAL_LAUNCH = (1 << (32 - ARRIVAL_BITS)) - 1


class OpenClContext(Context):
    """An in-order command queue and the workspace of what is enqueued there.

    Calls check their arguments, enqueue their kernels and return; ``Backend.to_host`` (or
    :meth:`finish`) waits. A device that fails does so in the call itself, in a later one, or where it is
    waited for: always by :class:`~marlin_cy.errors.DeviceError`, after which the context is as usable as the
    device. Buffers that other queues write must be finished, or say so by their ``events``, as
    :class:`pyopencl.array.Array` does.

    Parameters
    ----------
    backend : OpenClBackend
    queue : pyopencl.CommandQueue, optional
        On the backend's context and device, in order; one of its own unless given.
    profiling : bool
        Events keep times, as :mod:`~marlin_cy.opencl.timing` needs. A call then costs the host more (6 µs with
        NVIDIA's driver).

    Raises
    ------
    TypeError, ValueError
        A queue that is not one of these, or that has no profiling where that is asked for.
    """

    def __init__(self, backend, queue=None, profiling=False):
        runtime = backend.runtime
        if queue is None:
            properties = cl.command_queue_properties.PROFILING_ENABLE if profiling else 0
            with driver_errors(runtime):
                queue = cl.CommandQueue(runtime.context, runtime.device, properties=properties)
        check_queue(queue, runtime)
        if profiling and not queue.properties & cl.command_queue_properties.PROFILING_ENABLE:
            raise ValueError("profiling: the queue was made without PROFILING_ENABLE; give one that has it, or none")
        self._backend, self._queue = backend, queue
        self._lock = threading.Lock()
        self._workspace = {}
        self._uploads = deque()
        self._profile = None
        self._plans = WeakKeyDictionary()
        self._kept = WeakKeyDictionary()
        self._launches = {}
        self._arrival_launch = 0

    def __repr__(self):
        return f"OpenClContext({self._backend!r})"

    @property
    def backend(self):
        return self._backend

    @property
    def queue(self):
        """The ``pyopencl.CommandQueue`` that calls are enqueued on."""
        return self._queue

    @property
    def cl_context(self):
        """The ``pyopencl.Context``."""
        return self._backend.runtime.context

    @property
    def workspace_bytes(self):
        """Bytes of device memory that the workspace holds."""
        return sum(buffer.size for buffer in self._workspace.values())

    def finish(self):
        """Wait until everything that was enqueued has been done; a :class:`DeviceError` says that it was not."""
        with driver_errors(self._backend.runtime):
            self._queue.finish()

    @contextmanager
    def profile(self):
        """Collect the events of the calls made inside; they have times if the context was made with profiling.

        Yields
        ------
        list of (str, pyopencl.Event)
            What each command did, and its event, in order; filled as calls are made.
        """
        outer, self._profile = self._profile, []
        try:
            yield self._profile
        finally:
            self._profile = outer

    # What the backend's own modules use -----------------------------------------------------

    def __enter__(self):
        """Claim the context for a call."""
        if not self._lock.acquire(blocking=False):
            raise ContextInUse(
                "ctx: in use by another thread; a context serves one thread at a time, so make one for each thread"
            )
        return self

    def __exit__(self, kind, error, traceback):
        self._lock.release()
        if isinstance(error, cl.Error):
            raise device_error(self._backend.runtime, error) from error

    def reserve(self, purpose, nbytes):
        """The workspace buffer of a purpose, of at least ``nbytes``, with whatever it held."""
        buffer = self._workspace.get(purpose)
        if buffer is None or buffer.size < nbytes:
            # What was enqueued may use the old one. It is given up before a larger one is asked for.
            self._queue.finish()
            self._workspace.pop(purpose, None)
            size = -(-max(nbytes, 4096) // 4) * 4
            (buffer,) = zeroed_buffers(self._backend.runtime, [size], f"workspace ({purpose})")
            self._workspace[purpose] = buffer
        return buffer

    def zero(self, purposes):
        """Zero the workspace buffers of some purposes, as far as they exist."""
        for purpose in purposes:
            buffer = self._workspace.get(purpose)
            if buffer is not None:
                self.log(f"zero {purpose}", cl.enqueue_fill(self._queue, buffer, b"\0" * 4, buffer.size // 4 * 4))

    def upload(self, purpose, array):
        """A workspace buffer that will hold ``array`` when the queue gets there; ``array`` must not change."""
        buffer = self.reserve(purpose, array.nbytes)
        event = cl.enqueue_copy(self._queue, buffer, array, is_blocking=False)
        # The event keeps the array, and dropping it would wait for it.
        while self._uploads and self._uploads[0].command_execution_status <= cl.command_execution_status.COMPLETE:
            self._uploads.popleft()
        if len(self._uploads) >= MAX_UPLOADS:
            self._uploads.popleft().wait()
        self._uploads.append(event)
        self.log(f"upload {purpose}", event)
        return buffer

    def unlimited(self):
        """A buffer of the largest int32: a count on the device that the host's limit alone decides."""
        buffer = self._workspace.get("unlimited")
        if buffer is None:
            (buffer,) = zeroed_buffers(self._backend.runtime, [4], "workspace (unlimited)")
            cl.enqueue_fill(self._queue, buffer, MAX_INT32.to_bytes(4, "little"), 4)
            self._workspace["unlimited"] = buffer  # not before it holds what it should
        return buffer

    def counting(self, count):
        """A buffer of at least ``count`` int32: 0, 1, 2, ..."""
        buffer = self._workspace.get("counting")
        if buffer is None or buffer.size < 4 * count:
            self._queue.finish()  # as for reserve
            self._workspace.pop("counting", None)
            numbers = np.arange(1 << max(10, (count - 1).bit_length()), dtype=np.int32)
            self._workspace["counting"] = buffer = uploaded(self._backend.runtime, numbers, "workspace (counting)")
        return buffer

    def arrival_counter(self) -> tuple[cl.Buffer, int]:
        """``(buffer, launch_base)``: uint32 ``[1]`` in which the work-groups of one launch count themselves, and the
        value of the counter for none of them.

        Each launch has a larger ``launch_base`` than all before, up to which it raises the counter. So a launch that
        failed midway does not matter to later ones.
        """
        if self._arrival_launch == MAX_ARRIVAL_LAUNCH:
            self.zero([ARRIVED])
            self._arrival_launch = 0
        self._arrival_launch += 1
        return self.reserve(ARRIVED, 4), self._arrival_launch << ARRIVAL_BITS

    def kept(self, owner, array, what):
        """A buffer that holds an array of ``owner``'s, the same in each call: made once, and kept while both live."""
        buffer = self._kept.get(owner)
        if buffer is None:
            buffer = self._kept[owner] = uploaded(self._backend.runtime, array, what)
        return buffer

    def log(self, label, event):
        """Remember an event if a caller collects them."""
        if self._profile is not None:
            self._profile.append((label, event))
        return event

    def written(self, array, event):
        """Whoever uses ``array`` in another queue has to wait for ``event``, which comes after all before it."""
        array.events[:] = (event,)
        mark_written(array, event, self._queue)

    def plans_of(self, store):
        """What was decided for the products with a store: a dict."""
        plans = self._plans.get(store)
        if plans is None:
            plans = self._plans[store] = {}
        return plans

    def launch(
        self,
        file: str,
        name: str,
        macros: dict[str, int],
        options: tuple[str, ...] = (),
        changing: tuple[str, ...] = (),
    ) -> Launch:
        """This context's own :class:`Launch` of a kernel; made once.

        Parameters
        ----------
        file, name : str
            A ``.cl`` file without its suffix, and a kernel in it.
        macros : dict of str to int
        options : tuple of str
            Of the compiler.
        changing : tuple of str
            As for :class:`Launch`.
        """
        key = file, name, tuple(macros.items()), options  # unsorted: each place that launches has an order of its own
        launch = self._launches.get(key)
        if launch is None:
            kernel = self._backend.runtime.programs.kernel(file, name, macros, options)
            launch = self._launches[key] = Launch(kernel, arguments_of(name, macros), changing=changing)
        return launch


def check_queue(queue, runtime):
    """Refuse a queue that calls cannot be enqueued on."""
    if not isinstance(queue, cl.CommandQueue):
        raise TypeError(f"queue: got {type(queue).__name__}, expected a pyopencl.CommandQueue")
    if queue.context != runtime.context:
        raise ValueError("queue: got one of another OpenCL context, expected one of the backend's")
    if queue.device != runtime.device:
        raise ValueError(f"queue: got one of {queue.device.name}, expected one of {runtime.device.name}")
    if queue.properties & cl.command_queue_properties.OUT_OF_ORDER_EXEC_MODE_ENABLE:
        raise ValueError("queue: got one that runs out of order, expected an in-order queue")

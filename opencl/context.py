"""The context of OpenCL calls: a command queue, the workspace of the calls, and the kernels made for the queue."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import pyopencl as cl
from pyopencl.array import Array

from marlin_cy.errors import ContextInUse
from marlin_cy.interface import Context
from marlin_cy.opencl.arguments import arguments_of
from marlin_cy.opencl.buffers import mark_written
from marlin_cy.opencl.fork import refuse_forked
from marlin_cy.opencl.launch import Launch
from marlin_cy.opencl.memory import device_error, driver_errors, uploaded, zeroed_buffers

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend

__all__ = ["OpenClContext"]

MAX_UPLOADS = 64  # uploads in flight whose host arrays are kept; with more, a call waits for the oldest one
MAX_INT32 = 2**31 - 1
ARRIVED = "arrived work-groups"
ARRIVAL_BITS = 18  # a launch counts fewer than 2**18 work-groups; the upper bits are the launch's number
MAX_ARRIVAL_LAUNCH = (1 << (32 - ARRIVAL_BITS)) - 1


class OpenClContext(Context):
    """An in-order command queue and the workspace of the calls enqueued there.

    Calls check their arguments, enqueue their kernels, flush the queue and return; ``Backend.to_host`` (or
    :meth:`finish`) waits. A device failure raises :class:`~marlin_cy.errors.DeviceError` in the call itself, in a
    later call, or in a wait. The context then stays usable unless the device is lost. If another queue writes a buffer,
    that queue must be finished first, or the buffer must carry the events of its writers, as a
    :class:`pyopencl.array.Array` does.

    Parameters
    ----------
    backend : OpenClBackend
    queue : pyopencl.CommandQueue, optional
        An in-order queue on the backend's context and device; a new one unless given.
    profiling : bool
        Events keep times, as :mod:`~marlin_cy.opencl.timing` needs. A call then costs the host more (6 µs with
        NVIDIA's driver).

    Raises
    ------
    TypeError, ValueError
        The queue does not meet these conditions, or ``profiling`` is set and the queue has no profiling.
    """

    def __init__(self, backend: OpenClBackend, queue: cl.CommandQueue | None = None, profiling: bool = False) -> None:
        runtime = backend.runtime
        refuse_forked()
        if queue is None:
            options = {"properties": cl.command_queue_properties.PROFILING_ENABLE} if profiling else {}
            with driver_errors(runtime):
                queue = cl.CommandQueue(runtime.context, runtime.device, **options)
        check_queue(queue, runtime)
        if profiling and not queue.properties & cl.command_queue_properties.PROFILING_ENABLE:
            raise ValueError(
                "profiling: the queue was made without PROFILING_ENABLE; pass a queue that has it, or no queue"
            )
        self._backend, self._queue = backend, queue
        self._lock = threading.Lock()
        self._workspace: dict[str, cl.Buffer] = {}
        self._uploads: deque[cl.Event] = deque()
        self._profile: list[tuple[str, cl.Event]] | None = None
        self._plans: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
        self._kept: WeakKeyDictionary[Any, dict[str, cl.Buffer]] = WeakKeyDictionary()
        self._launches: dict[Any, Launch] = {}
        self._arrival_launch = 0

    def __repr__(self) -> str:
        return f"OpenClContext({self._backend!r})"

    @property
    def backend(self) -> OpenClBackend:
        return self._backend

    @property
    def queue(self) -> cl.CommandQueue:
        """The ``pyopencl.CommandQueue`` on which calls are enqueued."""
        return self._queue

    @property
    def cl_context(self) -> cl.Context:
        """The ``pyopencl.Context``."""
        return self._backend.runtime.context

    @property
    def workspace_bytes(self) -> int:
        """Bytes of device memory that the workspace holds."""
        return sum(int(buffer.size) for buffer in self._workspace.values())

    def finish(self) -> None:
        """Wait until all enqueued commands have finished; raises :class:`DeviceError` if one of them failed."""
        with driver_errors(self._backend.runtime):
            self._queue.finish()

    @contextmanager
    def profile(self) -> Iterator[list[tuple[str, cl.Event]]]:
        """Collect the events of the calls made inside; they have times if the context was made with profiling.

        Yields
        ------
        list of (str, pyopencl.Event)
            Each command's label and event, in order; the list grows as calls are made.
        """
        outer = self._profile
        events: list[tuple[str, cl.Event]] = []
        self._profile = events
        try:
            yield events
        finally:
            self._profile = outer

    # For the modules of this package ----------------------------------------------------------

    def __enter__(self) -> OpenClContext:
        """Claim the context for a call."""
        refuse_forked()
        if not self._lock.acquire(blocking=False):
            raise ContextInUse(
                "ctx: in use by another thread; a context serves one thread at a time, so make one for each thread"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End a call: submit its commands, and release the context."""
        try:
            self._submit(failed=error is not None)
        except cl.Error as submit_error:
            raise device_error(self._backend.runtime, submit_error) from submit_error
        finally:
            self._lock.release()
        if isinstance(error, cl.Error):
            raise device_error(self._backend.runtime, error) from error

    def _submit(self, failed: bool) -> None:
        """Flush the queue. The commands of a call are flushed nowhere else.

        OpenCL lets a queue hold commands back until it is flushed, and requires a flush before another queue waits for
        their events (clFlush). Mesa's rusticl holds commands back, and then such a wait never ends. The other queue may
        belong to ``Backend.to_host``, to another context, or to the caller, who finds the events in an array's
        ``events``. So each call flushes once before it returns, however many kernels it launches.

        After a failed call, the enqueued commands are flushed too, because releasing the event of an upload waits for
        the upload. An error of this flush is ignored: it would hide the error of the call.
        """
        if not failed:
            self._queue.flush()
            return
        with contextlib.suppress(cl.Error):
            self._queue.flush()

    def reserve(self, purpose: str, nbytes: int) -> cl.Buffer:
        """The workspace buffer for a purpose, of at least ``nbytes``. It keeps the contents of its last use."""
        buffer = self._workspace.get(purpose)
        if buffer is None or buffer.size < nbytes:
            # Commands in the queue may use the old buffer. It is released before a larger one is allocated.
            self._queue.finish()
            self._workspace.pop(purpose, None)
            size = -(-max(nbytes, 4096) // 4) * 4
            (buffer,) = zeroed_buffers(self._backend.runtime, [size], f"workspace ({purpose})")
            self._workspace[purpose] = buffer
        return buffer

    def zero(self, purposes: Iterable[str]) -> None:
        """Zero the existing workspace buffers of some purposes."""
        for purpose in purposes:
            buffer = self._workspace.get(purpose)
            if buffer is not None:
                self.log(f"zero {purpose}", cl.enqueue_fill(self._queue, buffer, b"\0" * 4, buffer.size // 4 * 4))

    def upload(self, purpose: str, array: npt.NDArray[Any]) -> cl.Buffer:
        """A workspace buffer into which the queue copies ``array``, which must not change until then."""
        buffer = self.reserve(purpose, array.nbytes)
        event = cl.enqueue_copy(self._queue, buffer, array, is_blocking=False)
        # The event keeps the array alive, and dropping the event would wait for the copy.
        while self._uploads and self._uploads[0].command_execution_status <= cl.command_execution_status.COMPLETE:
            self._uploads.popleft()
        if len(self._uploads) >= MAX_UPLOADS:
            self._uploads.popleft().wait()  # its call has flushed it
        self._uploads.append(event)
        self.log(f"upload {purpose}", event)
        return buffer

    def unlimited(self) -> cl.Buffer:
        """A buffer that holds the largest int32: a count on the device that imposes no limit."""
        buffer = self._workspace.get("unlimited")
        if buffer is None:
            (buffer,) = zeroed_buffers(self._backend.runtime, [4], "workspace (unlimited)")
            cl.enqueue_fill(self._queue, buffer, MAX_INT32.to_bytes(4, "little"), 4)
            self._workspace["unlimited"] = buffer  # only once it holds the number
        return buffer

    def counting(self, count: int) -> cl.Buffer:
        """A buffer of at least ``count`` int32: 0, 1, 2, ..."""
        buffer = self._workspace.get("counting")
        if buffer is None or buffer.size < 4 * count:
            self._queue.finish()  # as in reserve
            self._workspace.pop("counting", None)
            numbers = np.arange(1 << max(10, (count - 1).bit_length()), dtype=np.int32)
            self._workspace["counting"] = buffer = uploaded(self._backend.runtime, numbers, "workspace (counting)")
        return buffer

    def arrival_counter(self) -> tuple[cl.Buffer, int]:
        """``(buffer, launch_base)``: a counter uint32 ``[1]`` for the work-groups of one launch, and the value at which
        it starts.

        Each launch has a larger ``launch_base`` than all earlier launches, and first raises the counter to it. So a
        launch that failed midway does not affect later launches.
        """
        if self._arrival_launch == MAX_ARRIVAL_LAUNCH:
            self.zero([ARRIVED])
            self._arrival_launch = 0
        self._arrival_launch += 1
        return self.reserve(ARRIVED, 4), self._arrival_launch << ARRIVAL_BITS

    def kept(self, owner: Any, array: npt.NDArray[Any], what: str) -> cl.Buffer:
        """A buffer with a constant array of ``owner``: made once, and kept while the context and the owner live.

        ``what`` tells the arrays of an owner apart.
        """
        buffers = self._kept.setdefault(owner, {})
        if what not in buffers:
            buffers[what] = uploaded(self._backend.runtime, array, what)
        return buffers[what]

    @property
    def is_profiled(self) -> bool:
        """Whether :meth:`profile` is collecting events."""
        return self._profile is not None

    def log(self, label: str, event: cl.Event) -> cl.Event:
        """Append an event to the list of :meth:`profile`, if one is being filled; returns the event."""
        if self._profile is not None:
            self._profile.append((label, event))
        return event

    def written(self, array: Array, event: cl.Event) -> None:
        """Note that other queues must wait for ``event``, the last event that writes ``array``, before they use it."""
        array.events[:] = (event,)
        mark_written(array, event, self._queue)

    def plans_of(self, store: Any) -> dict[Any, Any]:
        """The plans of the products with a store, by kind of call."""
        plans = self._plans.get(store)
        if plans is None:
            plans = self._plans[store] = {}
        return plans

    def launch(
        self,
        file: str,
        name: str,
        macros: Mapping[str, int],
        options: tuple[str, ...] = (),
        changing: tuple[str, ...] = (),
        check: Callable[[OpenClContext, str, Mapping[str, int]], None] | None = None,
    ) -> Launch:
        """This context's own :class:`Launch` of a kernel; made once.

        Parameters
        ----------
        file, name : str
            A ``.cl`` file without its suffix, and a kernel in it.
        macros : dict of str to int
        options : tuple of str
            The compiler's options.
        changing : tuple of str
            As for :class:`Launch`.
        check : callable, optional
            Called as ``check(self, name, macros)`` before the launch is made; raises an error if the kernel is wrong.
        """
        key = file, name, tuple(macros.items()), options  # not sorted: each calling place always passes the same order
        launch = self._launches.get(key)
        if launch is None:
            if check is not None:
                check(self, name, macros)
            kernel = self._backend.runtime.programs.kernel(file, name, macros, options)
            launch = self._launches[key] = Launch(kernel, arguments_of(name, macros), changing=changing)
        return launch


def check_queue(queue: Any, runtime: Any) -> None:
    """Refuse a queue on which calls cannot be enqueued."""
    if not isinstance(queue, cl.CommandQueue):
        raise TypeError(f"queue: got {type(queue).__name__}, expected a pyopencl.CommandQueue")
    if queue.context != runtime.context:
        raise ValueError("queue: got a queue of another OpenCL context, expected a queue of the backend's context")
    if queue.device != runtime.device:
        raise ValueError(f"queue: got a queue of {queue.device.name}, expected a queue of {runtime.device.name}")
    if queue.properties & cl.command_queue_properties.OUT_OF_ORDER_EXEC_MODE_ENABLE:
        raise ValueError("queue: got an out-of-order queue, expected an in-order queue")

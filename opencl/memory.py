"""Device memory: buffers, and conversion of the driver's errors to those of this library."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyopencl as cl

from marlin_cy.errors import DeviceError, DeviceMemoryError
from marlin_cy.opencl.device import capabilities
from marlin_cy.opencl.fork import refuse_forked

__all__ = [
    "Memory",
    "device_error",
    "driver_errors",
    "live_stores",
    "memory_errors",
    "too_little_memory",
    "uploaded",
    "zeroed_buffers",
]

OUT_OF_MEMORY = (
    cl.status_code.MEM_OBJECT_ALLOCATION_FAILURE,
    cl.status_code.OUT_OF_RESOURCES,
    cl.status_code.OUT_OF_HOST_MEMORY,
    cl.status_code.INVALID_BUFFER_SIZE,
)


class Memory(Protocol):
    """The attributes of a :class:`~marlin_cy.opencl.stack.Runtime` that allocation and loading use."""

    @property
    def context(self) -> cl.Context: ...
    @property
    def device(self) -> cl.Device: ...
    @property
    def loading_queue(self) -> cl.CommandQueue: ...
    @property
    def loading_lock(self) -> threading.Lock: ...
    @property
    def max_alloc_bytes(self) -> int: ...


def uploaded(runtime: Memory, array: npt.ArrayLike, what: str) -> cl.Buffer:
    """A buffer that holds a copy of an array; ``what`` names it in an error message."""
    array = np.ascontiguousarray(array)
    with memory_errors(runtime, array.nbytes, what):
        return cl.Buffer(runtime.context, cl.mem_flags.READ_ONLY | cl.mem_flags.COPY_HOST_PTR, hostbuf=array)


def zeroed_buffers(runtime: Memory, sizes: Sequence[int], what: str) -> list[cl.Buffer]:
    """Zeroed buffers of the given sizes in bytes. If one cannot be allocated, the others are released.

    They are written immediately, because some drivers allocate memory when a buffer is first used.
    """
    buffers: list[cl.Buffer] = []
    try:
        with memory_errors(runtime, sum(sizes), what):
            for size in sizes:
                buffers.append(cl.Buffer(runtime.context, cl.mem_flags.READ_WRITE, size))
                with runtime.loading_lock:
                    cl.enqueue_fill_buffer(runtime.loading_queue, buffers[-1], b"\0" * 4, 0, size)
                    runtime.loading_queue.finish()
    except BaseException:
        for buffer in buffers:
            buffer.release()
        raise
    return buffers


@contextmanager
def memory_errors(runtime: Memory, nbytes: int, what: str) -> Iterator[None]:
    """Raise OpenCL's errors while ``nbytes`` are allocated as :class:`~marlin_cy.errors.DeviceMemoryError`.

    A request that exceeds all of the device's memory is refused before it is made: some drivers notice only when a
    buffer is first used. Errors that do not concern memory become a :class:`~marlin_cy.errors.DeviceError`.
    """
    refuse_forked()
    if nbytes > capabilities(runtime.device).global_memory:
        raise too_little_memory(runtime, f"{what}: {nbytes} bytes do not fit")
    try:
        yield
    except cl.Error as error:
        if error.code not in OUT_OF_MEMORY:
            raise device_error(runtime, error) from error
        raise too_little_memory(runtime, f"{what}: {nbytes} bytes do not fit") from error


@contextmanager
def driver_errors(runtime: Memory) -> Iterator[None]:
    """Convert OpenCL's errors by :func:`device_error`."""
    refuse_forked()
    try:
        yield
    except cl.Error as error:
        raise device_error(runtime, error) from error


def device_error(runtime: Memory, error: cl.Error) -> DeviceError | DeviceMemoryError:
    """The exception to raise for an error of the driver: DeviceError, or DeviceMemoryError if memory is short."""
    # Drivers report many failures as OUT_OF_RESOURCES, whether they concern memory or not.
    if error.code in OUT_OF_MEMORY and error.code != cl.status_code.OUT_OF_RESOURCES:
        return too_little_memory(runtime, f"the buffers of a call do not fit ({error})")
    found = capabilities(runtime.device)  # read when the device was opened: a lost device may not answer
    return DeviceError(
        f"{found.name} ({found.platform}): the driver fails ({error}); if it goes on failing, the device is lost with "
        "all that it held: make a new backend and load the weights again"
    )


def too_little_memory(runtime: Memory, problem: str) -> DeviceMemoryError:
    """The error that says how much memory was requested, and how much the device has."""
    found = capabilities(runtime.device)
    there = f"{found.global_memory} bytes"
    if "cl_amd_device_attribute_query" in found.extensions:
        free: Any = runtime.device.global_free_memory_amd  # a list; PyOpenCL's annotation says int
        there += f", {1024 * free[0]} of them free"
    elif held := live_stores.nbytes(runtime.device):
        there += f", of which packed weights hold {held}"
    return DeviceMemoryError(f"{problem}; {found.name} has {there}, in buffers of at most {runtime.max_alloc_bytes}")


class LiveStores:
    """The stores that hold device memory."""

    def __init__(self) -> None:
        self._stores: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, store: Any) -> None:
        with self._lock:
            self._stores.add(store)

    def discard(self, store: Any) -> None:
        with self._lock:
            self._stores.discard(store)

    def nbytes(self, device: cl.Device) -> int:
        """Bytes held on a device, in all contexts."""
        with self._lock:
            return sum(int(store.nbytes) for store in self._stores if store.device == device)


live_stores = LiveStores()

"""Device memory: buffers, and the driver's errors as this library's."""

import threading
import weakref
from contextlib import contextmanager

import numpy as np
import pyopencl as cl

from marlin_cy.errors import DeviceError, DeviceMemoryError
from marlin_cy.opencl.device import capabilities

__all__ = ["device_error", "driver_errors", "live_stores", "memory_errors", "uploaded", "zeroed_buffers"]

OUT_OF_MEMORY = (
    cl.status_code.MEM_OBJECT_ALLOCATION_FAILURE,
    cl.status_code.OUT_OF_RESOURCES,
    cl.status_code.OUT_OF_HOST_MEMORY,
    cl.status_code.INVALID_BUFFER_SIZE,
)


def uploaded(runtime, array, what):
    """A buffer that holds an array."""
    array = np.ascontiguousarray(array)
    with memory_errors(runtime, array.nbytes, what):
        return cl.Buffer(runtime.context, cl.mem_flags.READ_ONLY | cl.mem_flags.COPY_HOST_PTR, hostbuf=array)


def zeroed_buffers(runtime, sizes, what):
    """Buffers of so many bytes, all or none. Written to at once, as drivers allocate when a buffer is first used."""
    buffers = []
    try:
        with memory_errors(runtime, sum(sizes), what):
            for size in sizes:
                buffers.append(cl.Buffer(runtime.context, cl.mem_flags.READ_WRITE, size))
                with runtime.loading_lock:
                    cl.enqueue_fill_buffer(runtime.loading_queue, buffers[-1], np.uint32(0), 0, size)
                    runtime.loading_queue.finish()
    except BaseException:
        for buffer in buffers:
            buffer.release()
        raise
    return buffers


@contextmanager
def memory_errors(runtime, nbytes, what):
    """What OpenCL raises when ``nbytes`` are allocated, as :class:`~marlin_cy.errors.DeviceMemoryError`.

    So is what exceeds all of the device's memory: some drivers find that out when a buffer is first used. What has
    nothing to do with memory becomes a :class:`~marlin_cy.errors.DeviceError`.
    """
    if nbytes > capabilities(runtime.device).global_memory:
        raise too_little_memory(runtime, f"{what}: {nbytes} bytes do not fit")
    try:
        yield
    except cl.Error as error:
        if error.code not in OUT_OF_MEMORY:
            raise device_error(runtime, error) from error
        raise too_little_memory(runtime, f"{what}: {nbytes} bytes do not fit") from error


@contextmanager
def driver_errors(runtime):
    """What OpenCL raises, as :func:`device_error`."""
    try:
        yield
    except cl.Error as error:
        raise device_error(runtime, error) from error


def device_error(runtime, error):
    """What an error of the driver's is raised as: DeviceError, or DeviceMemoryError where it says so."""
    if error.code in OUT_OF_MEMORY and error.code != cl.status_code.OUT_OF_RESOURCES:  # a word for any failure
        return too_little_memory(runtime, f"the buffers of a call do not fit ({error})")
    found = capabilities(runtime.device)  # asked before: what is lost may not answer
    return DeviceError(
        f"{found.name} ({found.platform}): the driver fails ({error}); if it goes on failing, the device is lost with "
        "all that it held: make the backend anew, and load the weights again"
    )


def too_little_memory(runtime, problem):
    """The error that says what was asked for, and what there is."""
    found = capabilities(runtime.device)
    there = f"{found.global_memory} bytes"
    if "cl_amd_device_attribute_query" in found.extensions:
        there += f", {1024 * runtime.device.global_free_memory_amd[0]} of them free"
    elif held := live_stores.nbytes(runtime.device):
        there += f", of which packed weights hold {held}"
    return DeviceMemoryError(f"{problem}; {found.name} has {there}, in buffers of at most {runtime.max_alloc_bytes}")


class LiveStores:
    """Which stores hold device memory."""

    def __init__(self):
        self._stores = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, store):
        with self._lock:
            self._stores.add(store)

    def discard(self, store):
        with self._lock:
            self._stores.discard(store)

    def nbytes(self, device):
        """Bytes held on a device, in all contexts."""
        with self._lock:
            return sum(store.nbytes for store in self._stores if store.device == device)


live_stores = LiveStores()

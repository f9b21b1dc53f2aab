"""The OpenCL devices to test on, and the least that loading weights needs of one."""

import copy
import threading
from contextlib import contextmanager
from functools import cache

import pyopencl as cl
import pytest

from marlin_cy.errors import DeviceError
from marlin_cy.opencl.device import list_devices, reason_unusable
from marlin_cy.opencl.program import ProgramCache

# Drivers that are known to compile some kernels wrongly.
KNOWN_WRONG = {"rusticl"}

DEVICES = [device for device in list_devices() if reason_unusable(device) is None]

each_device = pytest.mark.parametrize("device", DEVICES, ids=[device.platform.name.strip() for device in DEVICES])


class Runtime:
    """A context with its queues and programs; a stack is its store."""

    def __init__(self, device):
        self.device = device
        self.context = cl.Context([device])
        self.programs = ProgramCache(self.context, device)
        self.queue = cl.CommandQueue(self.context)
        self.loading_queue = cl.CommandQueue(self.context)
        self.loading_lock = threading.Lock()
        self.max_alloc_bytes = device.max_mem_alloc_size

    def make_stack(self, store, bias):
        return store

    def buffer(self, array):
        """A device copy of an ndarray."""
        return cl.Buffer(self.context, cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR, hostbuf=array)


@cache
def kept_runtime(device):
    return Runtime(device)


def runtime_of(device, **changes):
    """The device's runtime, with other attributes where given; programs and context are shared."""
    runtime = copy.copy(kept_runtime(device))
    vars(runtime).update(changes)
    return runtime


@contextmanager
def unless_the_driver_is_wrong(device):
    """Skip the rest of a test if the library refuses a kernel on a driver that is known to compile it wrongly."""
    try:
        yield
    except DeviceError as error:
        if device.platform.name.strip() not in KNOWN_WRONG or "wrong" not in str(error):
            raise
        pytest.skip(f"the driver's fault, which the check finds: {error}")

"""The OpenCL devices to test on, and the least that loading weights needs of one."""

import copy
import dataclasses
import threading
from contextlib import contextmanager
from functools import cache

import pyopencl as cl
import pytest

from marlin_cy.errors import DeviceError
from marlin_cy.opencl import tiers
from marlin_cy.opencl.backend import OpenClBackend
from marlin_cy.opencl.capabilities import capabilities
from marlin_cy.opencl.device import list_devices, reason_unusable
from marlin_cy.opencl.program import ProgramCache

# Drivers that are known to compile some kernels wrongly.
KNOWN_WRONG = {"rusticl"}


def is_known_wrong(device):
    """Whether a check of the library may find a kernel wrong on this device, by the driver's fault."""
    return device.platform.name.strip() in KNOWN_WRONG


DEVICES = [device for device in list_devices() if reason_unusable(device) is None]

each_device = pytest.mark.parametrize("device", DEVICES, ids=[device.platform.name.strip() for device in DEVICES])


# Devices that emulate the tensor-core kernels: see kernels/ptx.cl.
EMULATION_NEEDS = {"cl_intel_required_subgroup_size", "cl_khr_subgroup_shuffle", "cl_khr_subgroup_ballot"}
EMULATING = [device for device in DEVICES if capabilities(device).extensions >= EMULATION_NEEDS]


def emulating_backend(**changes):
    """A backend of tier "mma", with other attributes of the tier where given, on a device that emulates it."""
    backend = OpenClBackend(device=EMULATING[0], tier="portable")
    options = ("-cl-std=CL3.0", "-DEMULATE_PTX")
    backend._tier = dataclasses.replace(tiers.tier_named("mma"), options=lambda device: options, **changes)
    return backend


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
        if not is_known_wrong(device) or "wrong" not in str(error):
            raise
        pytest.skip(f"the driver's fault, which the check finds: {error}")

"""What the OpenCL device is."""

import os
import platform

import pyopencl

import marlin_cy
from marlin_cy.commands.doctor import cpu_model

__all__ = ["describe_device"]


def describe_device(backends):
    """The JSON object ``machine``.

    Parameters
    ----------
    backends : dict of str to OpenClBackend
        By tier, on one device.
    """
    has = next(iter(backends.values())).runtime.capabilities
    return {
        "device": has.name,
        "type": has.type,
        "platform": has.platform,
        "opencl": "{}.{}".format(*has.version),
        "driver": has.driver_version,
        "compute_units": has.compute_units,
        "global_memory": has.global_memory,
        "tiers": list(backends),
        "cpu": cpu_model(),
        "load_average": os.getloadavg()[0],
        "marlin_cy": marlin_cy.__version__,
        "pyopencl": pyopencl.VERSION_TEXT,
        "python": platform.python_version(),
    }

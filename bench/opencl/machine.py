"""Facts about the OpenCL device."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyopencl
from rich.console import Console

import marlin_cy
from marlin_cy.commands.doctor import cpu_model

if TYPE_CHECKING:
    from marlin_cy.opencl.backend import OpenClBackend

__all__ = ["describe_device", "document_of"]

SCHEMA_VERSION = 1


def document_of(mode: str, backends: Mapping[str, OpenClBackend], screen: Console) -> dict[str, Any]:
    """The JSON document without results; prints a description of the device."""
    machine = describe_device(backends)
    screen.print(
        f"{machine['device']} ({machine['platform']}, driver {machine['driver']}), tiers {', '.join(machine['tiers'])}"
    )
    return {"schema": SCHEMA_VERSION, "mode": mode, "command": sys.argv[1:], "machine": machine}


def describe_device(backends: Mapping[str, OpenClBackend]) -> dict[str, Any]:
    """The JSON object ``machine``.

    Parameters
    ----------
    backends : dict of str to OpenClBackend
        By tier, all on one device.
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

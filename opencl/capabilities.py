"""What an OpenCL device reports about itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyopencl as cl

__all__ = ["DEVICE_TYPES", "Capabilities", "capabilities", "device_type", "version_of"]

DEVICE_ATOMICS = {"__opencl_c_atomic_order_acq_rel", "__opencl_c_atomic_scope_device"}
# The best first. A device may have several of these bits.
DEVICE_TYPES = {
    "GPU": cl.device_type.GPU,
    "accelerator": cl.device_type.ACCELERATOR,
    "CPU": cl.device_type.CPU,
    "custom": cl.device_type.CUSTOM,
}


@dataclass(frozen=True)
class Capabilities:
    """The properties that a device reports, as plain values.

    Attributes
    ----------
    name, vendor, platform, platform_version, driver_version : str
    type : str
        ``"GPU"``, ``"accelerator"``, ``"CPU"`` or ``"custom"``.
    version, c_version : (int, int)
        Major and minor version of OpenCL, and of the newest OpenCL C that the device's compiler supports.
    extensions : frozenset of str
    features : frozenset of str
        OpenCL C's optional features (``"__opencl_c_subgroups"``); empty before OpenCL 3.0.
    local_memory, max_allocation, global_memory : int
        Bytes: the local memory of a work-group, the largest single buffer, all memory.
    alignment : int
        Bytes to which the origin of a sub-buffer must be aligned.
    max_work_group_size, compute_units : int
    fp16 : bool
        ``half`` arithmetic, not only storage.
    sub_groups : bool
        As an extension or as a feature of OpenCL C 3.0 (``-cl-std=CL3.0``).
    integer_dot_product : bool
        Of four bytes packed in a 32-bit word.
    compute_capability : (int, int) or None
        NVIDIA's; None for others.
    """

    name: str
    vendor: str
    platform: str
    platform_version: str
    driver_version: str
    type: str
    version: tuple[int, int]
    c_version: tuple[int, int]
    extensions: frozenset[str]
    features: frozenset[str]
    local_memory: int
    max_allocation: int
    global_memory: int
    alignment: int
    max_work_group_size: int
    compute_units: int
    fp16: bool
    sub_groups: bool
    integer_dot_product: bool
    compute_capability: tuple[int, int] | None

    @property
    def is_cpu(self) -> bool:
        """Whether the device is a CPU."""
        return self.type == "CPU"

    @property
    def device_atomics(self) -> str | None:
        """How work-groups of a launch can read each other's results: ``"PTX"``, ``"OpenCL C 3.0"``, or None."""
        if (self.compute_capability or (0, 0)) >= (7, 0):
            return "PTX"
        return "OpenCL C 3.0" if self.features >= DEVICE_ATOMICS else None


@cache
def capabilities(device: cl.Device) -> Capabilities:
    """The :class:`Capabilities` of a ``pyopencl.Device``, read once."""
    extensions = frozenset(device.extensions.split())
    features = _features(device)
    compute_capability = None
    if "cl_nv_device_attribute_query" in extensions:
        compute_capability = (device.compute_capability_major_nv, device.compute_capability_minor_nv)
    return Capabilities(
        name=device.name.strip(),
        vendor=device.vendor.strip(),
        platform=device.platform.name.strip(),
        platform_version=device.platform.version.strip(),
        driver_version=device.driver_version.strip(),
        type=device_type(device),
        version=version_of(device.version),
        c_version=max([version_of(device.opencl_c_version), *_c_versions(device)]),
        extensions=extensions,
        features=features,
        local_memory=device.local_mem_size,
        max_allocation=device.max_mem_alloc_size,
        global_memory=device.global_mem_size,
        alignment=device.mem_base_addr_align // 8,
        max_work_group_size=device.max_work_group_size,
        compute_units=device.max_compute_units,
        fp16="cl_khr_fp16" in extensions,
        sub_groups="cl_khr_subgroups" in extensions or "__opencl_c_subgroups" in features,
        # Both mean that the packed form is supported. Hardware acceleration affects only the speed.
        integer_dot_product="cl_khr_integer_dot_product" in extensions
        or "__opencl_c_integer_dot_product_input_4x8bit_packed" in features,
        compute_capability=compute_capability,
    )


def device_type(device: cl.Device) -> str:
    """The name of a device's type: the best of its bits."""
    return next((name for name, bit in DEVICE_TYPES.items() if device.type & bit), "custom")


def version_of(text: str) -> tuple[int, int]:
    """``(1, 2)`` for ``"OpenCL C 1.2 PoCL"``; (0, 0) if the text has no version number."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _c_versions(device: cl.Device) -> list[tuple[int, int]]:
    """The versions of OpenCL C that a device of OpenCL 3.0 lists."""
    # A cl_version has ten bits for the major number, ten for the minor, twelve for the patch.
    return [(entry.version >> 22, entry.version >> 12 & 1023) for entry in _listed(device, "OPENCL_C_ALL_VERSIONS")]


def _features(device: cl.Device) -> frozenset[str]:
    return frozenset(entry.name for entry in _listed(device, "OPENCL_C_FEATURES"))


def _listed(device: cl.Device, query: str) -> list[Any]:
    """The answer to a query that only devices of OpenCL 3.0 support; an empty list for other devices."""
    if version_of(device.version) < (3, 0):
        return []
    try:
        listed: Any = device.get_info(getattr(cl.device_info, query))  # typed `object`
        return list(listed)
    except cl.Error:
        return []

"""Which OpenCL platforms and devices there are, which one is taken, and what it can do."""

import ctypes
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyopencl as cl

from marlin_cy.errors import BackendUnavailable
from marlin_cy.opencl.fork import note_use, reason_forked

__all__ = [
    "DEVICE_VARIABLE",
    "Capabilities",
    "Choice",
    "Opened",
    "PlatformFound",
    "broken_drivers",
    "capabilities",
    "choose_device",
    "describe",
    "list_devices",
    "list_platforms",
    "open_device",
    "reason_unavailable",
    "reason_unusable",
]

DEVICE_VARIABLE = "MARLIN_CY_OPENCL_DEVICE"
PYOPENCL_VARIABLE = "PYOPENCL_CTX"
DEVICE_ATOMICS = {"__opencl_c_atomic_order_acq_rel", "__opencl_c_atomic_scope_device"}
INSTALL = (
    "install the driver of your GPU, or PoCL, which runs on the CPU and needs no root: pip install 'marlin-cy[opencl]'"
)
# The best first. A device may have several of these bits.
DEVICE_TYPES = {
    "GPU": cl.device_type.GPU,
    "accelerator": cl.device_type.ACCELERATOR,
    "CPU": cl.device_type.CPU,
    "custom": cl.device_type.CUSTOM,
}
# Not every PyOpenCL names the code that a loader without any driver answers with.
PLATFORM_NOT_FOUND = -1001


class PlatformFound(NamedTuple):
    """A platform.

    Attributes
    ----------
    name, version : str
    devices : list of pyopencl.Device
    error : str or None
        Why the driver did not list its devices.
    """

    name: str
    version: str
    devices: list
    error: str | None


class Choice(NamedTuple):
    """A device, and why this one (``"argument device=1"``, ``"the first GPU"``)."""

    device: cl.Device
    reason: str


class Opened(NamedTuple):
    """A device with a context on it, and why this device."""

    device: cl.Device
    context: cl.Context
    reason: str


@dataclass(frozen=True)
class Capabilities:
    """What a device reports about itself.

    Attributes
    ----------
    name, vendor, platform, platform_version, driver_version : str
    type : str
        ``"GPU"``, ``"accelerator"``, ``"CPU"`` or ``"custom"``.
    version, c_version : (int, int)
        Major and minor number of OpenCL, and of the newest OpenCL C that its compiler takes.
    extensions : frozenset of str
    features : frozenset of str
        OpenCL C's optional features (``"__opencl_c_subgroups"``); empty before OpenCL 3.0.
    local_memory, max_allocation, global_memory : int
        Bytes: of a work-group's memory, of the largest single buffer, of all memory.
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
    version: tuple
    c_version: tuple
    extensions: frozenset
    features: frozenset
    local_memory: int
    max_allocation: int
    global_memory: int
    alignment: int
    max_work_group_size: int
    compute_units: int
    fp16: bool
    sub_groups: bool
    integer_dot_product: bool
    compute_capability: tuple | None

    @property
    def is_cpu(self):
        return self.type == "CPU"

    @property
    def device_atomics(self):
        """By what a work-group sees what others of its launch wrote: ``"PTX"``, ``"OpenCL C 3.0"``, or None."""
        if (self.compute_capability or (0, 0)) >= (7, 0):
            return "PTX"
        return "OpenCL C 3.0" if self.features >= DEVICE_ATOMICS else None


@cache
def capabilities(device):
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
        type=_type(device),
        version=_version(device.version),
        c_version=max([_version(device.opencl_c_version), *_c_versions(device)]),
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
        # Both say that the packed form is there; the accelerated forms are a matter of speed alone.
        integer_dot_product="cl_khr_integer_dot_product" in extensions
        or "__opencl_c_integer_dot_product_input_4x8bit_packed" in features,
        compute_capability=compute_capability,
    )


def list_platforms():
    """The platforms, those included whose driver fails; none is an empty list.

    Returns
    -------
    list of PlatformFound

    Raises
    ------
    BackendUnavailable
        The OpenCL loader itself fails.
    """
    if reason := reason_forked():
        raise BackendUnavailable(reason)
    note_use()
    try:
        platforms = cl.get_platforms()
    except cl.Error as error:
        if error.code == PLATFORM_NOT_FOUND:
            return []
        raise BackendUnavailable(f"the OpenCL loader fails ({error})") from error
    return [_platform_found(platform) for platform in platforms]


def list_devices():
    """The devices of all platforms, in their drivers' order: what an index counts."""
    return [device for platform in list_platforms() for device in platform.devices]


def broken_drivers():
    """The drivers that are registered with the OpenCL loader but that it leaves out, without a word.

    Returns
    -------
    list of (str, str)
        The ``.icd`` file, and why the library that it names cannot be loaded.
    """
    place = Path(os.environ.get("OCL_ICD_VENDORS") or os.environ.get("OPENCL_VENDOR_PATH") or "/etc/OpenCL/vendors")
    files = sorted(place.glob("*.icd")) if place.is_dir() else [place] if place.suffix == ".icd" else []
    broken = []
    for file in files:
        try:
            library = file.read_text().strip()
            ctypes.CDLL(library)
        except (OSError, ValueError) as error:  # ValueError: not text
            broken.append((str(file), str(error)))
    return broken


def reason_unavailable():
    """None, or why no device can be used, and what to do."""
    try:
        platforms = list_platforms()
    except BackendUnavailable as error:
        return str(error)
    devices = [device for platform in platforms for device in platform.devices]
    reasons = [reason_unusable(device) for device in devices]
    if None in reasons:
        return None
    broken = "".join(f"; {file}: the driver cannot be loaded ({why})" for file, why in broken_drivers())
    if not platforms:
        vendors = os.environ.get("OCL_ICD_VENDORS")
        where = f" (OCL_ICD_VENDORS is {vendors})" if vendors else ""
        return f"no OpenCL platform: the loader finds no driver that works{where}{broken}; {INSTALL}"
    if not devices:
        listed = "; ".join(
            f"platform {platform.name!r} fails ({platform.error})"
            if platform.error
            else f"platform {platform.name!r} has no devices"
            for platform in platforms
        )
        return f"no OpenCL device: {listed}{broken}; {INSTALL}"
    listed = "; ".join(f"{describe(device)} {why}" for device, why in zip(devices, reasons, strict=True))
    return f"no OpenCL device that can be used: {listed}; {INSTALL}"


def reason_unusable(device):
    """None, or what keeps the backend from this device (``"is not available"``)."""
    try:
        if not device.available:
            return "is not available"
        if not device.compiler_available:
            return "has no compiler"
        if not device.endian_little:
            return "is big-endian"
        if _version(device.version) < (1, 2):
            return f"has {device.version.strip()}, and 1.2 is needed"
    except cl.Error as error:
        return f"does not answer ({error})"
    return None


def choose_device(device=None):
    """The device to use.

    Parameters
    ----------
    device : pyopencl.Device, int, str or None
        An int counts in :func:`list_devices`; so does a text that is a number. Other text is looked
        for in the names of devices and platforms, in whatever case; of several that have it the best
        type comes first. None: what ``MARLIN_CY_OPENCL_DEVICE`` says, in the same forms; else what
        ``PYOPENCL_CTX`` says, in PyOpenCL's; else a GPU before an accelerator before a CPU.

    Returns
    -------
    Choice

    Raises
    ------
    TypeError, IndexError, ValueError
        ``device``, or the variable, names none; the message lists the devices.
    BackendUnavailable
        There is no device, or the one named cannot be used.
    """
    if isinstance(device, cl.Device):
        return _usable(Choice(device, "argument device"))
    if device is not None and (isinstance(device, bool) or not isinstance(device, int | str)):
        raise TypeError(f"device: got {type(device).__name__}, expected pyopencl.Device, int or str")
    if reason := reason_unavailable():
        raise BackendUnavailable(f"backend 'opencl': {reason}")
    if device is not None:
        return _usable(Choice(_find(device, "device"), f"argument device={device!r}"))
    if text := os.environ.get(DEVICE_VARIABLE):
        found = _find(text, f"environment variable {DEVICE_VARIABLE}")
        return _usable(Choice(found, f"environment variable {DEVICE_VARIABLE}={text}"))
    if text := os.environ.get(PYOPENCL_VARIABLE):
        return _usable(Choice(_find_pyopencl(text), f"environment variable {PYOPENCL_VARIABLE}={text}"))
    best = min((device for device in list_devices() if reason_unusable(device) is None), key=_rank)
    return Choice(best, f"the first {_type(best)}, and there is no better type")


def open_device(device=None, context=None, queue=None):
    """A device and a context on it.

    Parameters
    ----------
    device
        As in :func:`choose_device`.
    context : pyopencl.Context, optional
        Used as it is; ``device`` must be one of its devices, the first when left out.
    queue : pyopencl.CommandQueue, optional
        Its device and its context are used; the other two arguments must agree.

    Returns
    -------
    Opened

    Raises
    ------
    TypeError, IndexError, ValueError, BackendUnavailable
        As :func:`choose_device`; also where the arguments contradict each other, and where the
        driver makes no context.
    """
    if reason := reason_forked():
        raise BackendUnavailable(f"backend 'opencl': {reason}")
    note_use()
    if context is not None and not isinstance(context, cl.Context):
        raise TypeError(f"context: got {type(context).__name__}, expected pyopencl.Context")
    if queue is not None:
        if not isinstance(queue, cl.CommandQueue):
            raise TypeError(f"queue: got {type(queue).__name__}, expected pyopencl.CommandQueue")
        if context is not None and context != queue.context:
            raise ValueError("context: got another one than the queue's; pass the queue alone")
        if device is not None and choose_device(device).device != queue.device:
            raise ValueError(f"device: got {device!r}, but the queue's is {describe(queue.device)}")
        chosen = _usable(Choice(queue.device, "the queue's device"))
        return Opened(chosen.device, queue.context, chosen.reason)
    if context is not None:
        chosen = _usable(
            Choice(context.devices[0], "the context's device") if device is None else choose_device(device)
        )
        if chosen.device not in context.devices:
            there = ", ".join(describe(device) for device in context.devices)
            raise ValueError(f"device: got {describe(chosen.device)}, expected one of the context's: {there}")
        return Opened(chosen.device, context, chosen.reason)
    chosen = choose_device(device)
    try:
        return Opened(chosen.device, cl.Context([chosen.device]), chosen.reason)
    except cl.Error as error:
        raise BackendUnavailable(
            f"backend 'opencl': the driver makes no context on {describe(chosen.device)} ({error})"
        ) from error


def describe(device):
    """``"NVIDIA H200 (NVIDIA CUDA)"``."""
    return f"{device.name.strip()} ({device.platform.name.strip()})"


def _platform_found(platform):
    name = version = "unknown"
    try:
        name, version = platform.name.strip(), platform.version.strip()
        return PlatformFound(name, version, platform.get_devices(), None)
    except cl.Error as error:
        return PlatformFound(name, version, [], str(error))


def _usable(choice):
    if reason := reason_unusable(choice.device):
        raise BackendUnavailable(f"backend 'opencl': {describe(choice.device)} {reason} ({choice.reason})")
    return choice


def _find(wanted, source):
    """The device with this index, or with this text in its name."""
    devices = list_devices()
    if isinstance(wanted, str) and re.fullmatch(r"-?\d+", wanted.strip()):
        wanted = int(wanted)
    if isinstance(wanted, int):
        if not 0 <= wanted < len(devices):
            raise IndexError(f"{source}: got {wanted}, {_expected(devices)}")
        return devices[wanted]
    text = wanted.strip().lower()
    found = [device for device in devices if text and text in describe(device).lower()]
    if not found:
        raise ValueError(f"{source}: got {wanted!r}, {_expected(devices)}")
    return min(found, key=_rank)


def _find_pyopencl(text):
    try:
        return cl.choose_devices(interactive=False, answers=text.split(":"))[0]
    except (RuntimeError, cl.Error) as error:
        raise ValueError(
            f"environment variable {PYOPENCL_VARIABLE}: got {text!r} ({error}), {_expected(list_devices())}"
        ) from error


def _expected(devices):
    listed = ", ".join(f"{index}: {describe(device)}" for index, device in enumerate(devices))
    return f"expected one of {listed}" if devices else "but there is no device"


def _rank(device):
    """Smaller is better; min() keeps the first of equals."""
    return list(DEVICE_TYPES).index(_type(device))


def _type(device):
    return next((name for name, bit in DEVICE_TYPES.items() if device.type & bit), "custom")


def _version(text):
    """``(1, 2)`` of ``"OpenCL C 1.2 PoCL"``; (0, 0) where there is no number."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _c_versions(device):
    """The versions of OpenCL C that a device of OpenCL 3.0 lists."""
    # A cl_version has ten bits for the major number, ten for the minor, twelve for the patch.
    return [(entry.version >> 22, entry.version >> 12 & 1023) for entry in _listed(device, "OPENCL_C_ALL_VERSIONS")]


def _features(device):
    return frozenset(entry.name for entry in _listed(device, "OPENCL_C_FEATURES"))


def _listed(device, query):
    """The answer to a query that only devices of OpenCL 3.0 know; others have nothing to list."""
    if _version(device.version) < (3, 0):
        return []
    try:
        return device.get_info(getattr(cl.device_info, query))
    except cl.Error:
        return []

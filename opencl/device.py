"""The OpenCL platforms and devices, and the choice of one."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import NamedTuple

import pyopencl as cl

from marlin_cy.errors import BackendUnavailable
from marlin_cy.opencl.capabilities import DEVICE_TYPES, Capabilities, capabilities, device_type, version_of
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
INSTALL = (
    "install the driver of your GPU, or PoCL, which runs on the CPU and needs no root: pip install 'marlin-cy[opencl]'"
)
# The error code of a loader that finds no driver; some versions of PyOpenCL have no name for it.
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
    devices: list[cl.Device]
    error: str | None


class Choice(NamedTuple):
    """A device, and the reason for its selection (``"argument device=1"``, ``"the first GPU"``)."""

    device: cl.Device
    reason: str


class Opened(NamedTuple):
    """A device with a context on it, and the reason for its selection."""

    device: cl.Device
    context: cl.Context
    reason: str


def list_platforms() -> list[PlatformFound]:
    """All platforms, including platforms whose driver fails; the list may be empty.

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


def list_devices() -> list[cl.Device]:
    """The devices of all platforms, in their drivers' order: a device's index is its place in this list."""
    return [device for platform in list_platforms() for device in platform.devices]


def broken_drivers() -> list[tuple[str, str]]:
    """The drivers that are registered with the OpenCL loader but cannot be loaded; the loader skips them silently.

    Returns
    -------
    list of (str, str)
        The ``.icd`` file, and why the library named in it cannot be loaded.
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


def reason_unavailable() -> str | None:
    """None, or the reason why no device can be used, with a remedy."""
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


def reason_unusable(device: cl.Device) -> str | None:
    """None, or the reason why the backend cannot use this device (``"is not available"``)."""
    try:
        if not device.available:
            return "is not available"
        if not device.compiler_available:
            return "has no compiler"
        if not device.endian_little:
            return "is big-endian"
        if version_of(device.version) < (1, 2):
            return f"has {device.version.strip()}, and 1.2 is needed"
    except cl.Error as error:
        return f"does not answer ({error})"
    return None


def choose_device(device: cl.Device | int | str | None = None) -> Choice:
    """The device to use.

    Parameters
    ----------
    device : pyopencl.Device, int, str or None
        An int, or a text that is a number, is an index into :func:`list_devices`. Another text is searched for in the
        names of devices and platforms, ignoring case; of several matches, a device of the best type is taken. None: the
        value of ``MARLIN_CY_OPENCL_DEVICE``, in the same forms; else the value of ``PYOPENCL_CTX``, in PyOpenCL's form;
        else the first GPU, accelerator or CPU, in this order.

    Returns
    -------
    Choice

    Raises
    ------
    TypeError, IndexError, ValueError
        ``device``, or the variable, names no device; the message lists the devices.
    BackendUnavailable
        There is no device, or the named device cannot be used.
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
    return Choice(best, f"the first {device_type(best)}, and there is no better type")


def open_device(
    device: cl.Device | int | str | None = None,
    context: cl.Context | None = None,
    queue: cl.CommandQueue | None = None,
) -> Opened:
    """A device and a context on it.

    Parameters
    ----------
    device
        As in :func:`choose_device`.
    context : pyopencl.Context, optional
        Used as it is; ``device`` must be one of its devices; by default the first.
    queue : pyopencl.CommandQueue, optional
        Its device and its context are used; the other two arguments must match them.

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
            raise ValueError("context: differs from the queue's context; pass only the queue")
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
            raise ValueError(f"device: got {describe(chosen.device)}, expected a device of the context: {there}")
        return Opened(chosen.device, context, chosen.reason)
    chosen = choose_device(device)
    try:
        return Opened(chosen.device, cl.Context([chosen.device]), chosen.reason)
    except cl.Error as error:
        raise BackendUnavailable(
            f"backend 'opencl': the driver cannot make a context on {describe(chosen.device)} ({error})"
        ) from error


def describe(device: cl.Device) -> str:
    """``"NVIDIA H200 (NVIDIA CUDA)"``."""
    return f"{device.name.strip()} ({device.platform.name.strip()})"


def _platform_found(platform: cl.Platform) -> PlatformFound:
    name = version = "unknown"
    try:
        name, version = platform.name.strip(), platform.version.strip()
        return PlatformFound(name, version, platform.get_devices(), None)
    except cl.Error as error:
        return PlatformFound(name, version, [], str(error))


def _usable(choice: Choice) -> Choice:
    if reason := reason_unusable(choice.device):
        raise BackendUnavailable(f"backend 'opencl': {describe(choice.device)} {reason} ({choice.reason})")
    return choice


def _find(wanted: int | str, source: str) -> cl.Device:
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


def _find_pyopencl(text: str) -> cl.Device:
    try:
        return cl.choose_devices(interactive=False, answers=text.split(":"))[0]
    except (RuntimeError, cl.Error) as error:
        raise ValueError(
            f"environment variable {PYOPENCL_VARIABLE}: got {text!r} ({error}), {_expected(list_devices())}"
        ) from error


def _expected(devices: list[cl.Device]) -> str:
    listed = ", ".join(f"{index}: {describe(device)}" for index, device in enumerate(devices))
    return f"expected one of {listed}" if devices else "but there is no device"


def _rank(device: cl.Device) -> int:
    """Smaller is better; min() keeps the first of equals."""
    return list(DEVICE_TYPES).index(device_type(device))

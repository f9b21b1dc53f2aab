"""The OpenCL backend's part of ``marlin-cy doctor``: platforms, devices, kernels.

The object has these keys; memory is in bytes:

``platforms``: a list of ``name``, ``version``, ``error`` (null, or the reason why the driver fails) and ``devices``, a
  list of ``index``, ``name``, ``type``, ``opencl``, ``driver``, ``compute_units``, ``global_memory``,
  ``max_allocation``, ``local_memory``, ``fp16``, ``sub_groups``, ``integer_dot_product``, ``compute_capability``
  (NVIDIA's, as text, or null), ``unusable`` (null, or the reason). A device that does not answer has only ``index``
  and ``unusable``
``broken_drivers``: a list of ``file``, ``reason``: drivers that the OpenCL loader leaves out silently
``chosen``: the index of the device that a backend would use, or null
``reason``: why that device is chosen, or why no device is
``tier``: the name of the kernels chosen for the device, or null
``tiers``: a list of ``name``, ``missing`` (null, or the capability that the device lacks), best first
``decoder``: how steps of few tokens of a whole model run, ``way``, and the ``reason``; null without a device
``cache``: the folder of compiled programs; null if programs are not kept
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from marlin_cy.command_line import DoctorReport
from marlin_cy.commands.output import mark, table
from marlin_cy.errors import BackendUnavailable

if TYPE_CHECKING:
    import pyopencl as cl
    from rich.console import Console
    from rich.table import Table

__all__ = ["report"]


def report() -> DoctorReport:
    """The key ``opencl``: null where PyOpenCL is missing or broken."""
    found = find()
    if found is None:
        return DoctorReport({"opencl": None}, False)
    return DoctorReport({"opencl": found}, found["chosen"] is not None, lambda screen: print_tables(screen, found))


def find() -> dict[str, Any] | None:
    """The object of the key ``opencl``."""
    try:
        from marlin_cy.opencl import device, program, tiers
    except ImportError:
        return None
    platforms, devices, chosen, suitable = [], [], None, []
    try:
        platforms = device.list_platforms()
        devices = [one for platform in platforms for one in platform.devices]
        chosen, reason = device.choose_device()
        suitable = [{"name": name, "missing": missing} for name, missing in tiers.explain(device.capabilities(chosen))]
    except (BackendUnavailable, ValueError, IndexError) as error:
        reason = str(error)
    cache = program.cache_folder()
    tier = next((tier["name"] for tier in suitable if tier["missing"] is None), None)
    return {
        "platforms": [
            {
                "name": platform.name,
                "version": platform.version,
                "error": platform.error,
                "devices": [_device(one, devices.index(one)) for one in platform.devices],
            }
            for platform in platforms
        ],
        "broken_drivers": [{"file": file, "reason": why} for file, why in device.broken_drivers()],
        "chosen": None if chosen is None else devices.index(chosen),
        "reason": reason,
        "tier": tier,
        "tiers": suitable,
        "decoder": None if tier is None else way_of_steps(tier),
        "cache": None if cache is None else str(cache),
    }


def way_of_steps(tier: str) -> dict[str, str]:
    """How the decoder runs a step of few tokens with a tier: ``way`` and ``reason``."""
    from marlin_cy.opencl.decoder.phased_step import MOST_TOKENS

    if tier == "mma":
        reason = "work-groups of an NVIDIA GPU that are resident together may wait for each other"
        return {"way": f"one launch for up to {MOST_TOKENS} sequences", "reason": f"{reason}; checked at the first use"}
    return {"way": "a launch for each kernel", "reason": f"one launch needs the tier mma, and this device has {tier}"}


def _device(found: cl.Device, index: int) -> dict[str, Any]:
    import pyopencl as cl

    from marlin_cy.opencl import device

    unusable = device.reason_unusable(found)
    try:
        has = device.capabilities(found)
    except cl.Error as error:
        return {"index": index, "unusable": unusable or f"does not answer ({error})"}
    return {
        "index": index,
        "name": has.name,
        "type": has.type,
        "opencl": "{}.{}".format(*has.version),
        "driver": has.driver_version,
        "compute_units": has.compute_units,
        "global_memory": has.global_memory,
        "max_allocation": has.max_allocation,
        "local_memory": has.local_memory,
        "fp16": has.fp16,
        "sub_groups": has.sub_groups,
        "integer_dot_product": has.integer_dot_product,
        "compute_capability": has.compute_capability and "{}.{}".format(*has.compute_capability),
        "unusable": unusable,
    }


def print_tables(screen: Console, found: dict[str, Any]) -> None:
    """Print what :func:`find` returned."""
    for number, platform in enumerate(found["platforms"]):
        if number:
            screen.print()
        screen.print(escape(f"OpenCL platform {platform['name']}, {platform['version']}"))
        if platform["error"]:
            screen.print(escape(f"The driver fails: {platform['error']}."))
        elif not platform["devices"]:
            screen.print("No devices.")
        else:
            screen.print(_devices_table(platform["devices"], found["chosen"]))
    if found["broken_drivers"]:
        screen.print()
        for broken in found["broken_drivers"]:
            screen.print(escape(f"OpenCL driver {broken['file']} cannot be loaded: {broken['reason']}."))
    if found["chosen"] is not None:
        screen.print()
        tiers = table("OpenCL kernels", "here", "what is missing")
        for tier in found["tiers"]:
            name = f"[bold]{tier['name']}[/bold] (chosen)" if tier["name"] == found["tier"] else tier["name"]
            tiers.add_row(name, mark(tier["missing"] is None), escape(tier["missing"] or ""))
        screen.print(tiers)
        if found["decoder"] is not None:
            screen.print(escape(f"Steps of a whole model: {found['decoder']['way']} ({found['decoder']['reason']})."))
    screen.print()
    if found["chosen"] is not None:
        screen.print(escape(f"OpenCL device {found['chosen']}: {found['reason']}."))
    elif found["platforms"]:
        screen.print(escape(f"No OpenCL device: {found['reason']}."))
    screen.print(escape(f"Compiled OpenCL programs: {found['cache'] or 'not kept'}"))


def _devices_table(devices: list[dict[str, Any]], chosen: int | None) -> Table:
    rows = table(
        ">", "device", "type", "OpenCL", "driver", ">memory", ">one buffer", "fp16", "sub-groups", "dot product"
    )
    for device in devices:
        index = str(device["index"])
        if device["unusable"]:
            rows.add_row(index, escape(f"{device.get('name', '')} {device['unusable']}".strip()))
            continue
        name = escape(device["name"])
        if device["compute_capability"]:
            name += f", compute capability {device['compute_capability']}"
        rows.add_row(
            index,
            f"[bold]{name}[/bold] (chosen)" if device["index"] == chosen else name,
            device["type"],
            device["opencl"],
            escape(device["driver"]),
            f"{device['global_memory'] / 1e9:#.3g} GB",
            f"{device['max_allocation'] / 1e9:#.3g} GB",
            *(mark(device[key]) for key in ("fp16", "sub_groups", "integer_dot_product")),
        )
    return rows

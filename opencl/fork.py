"""OpenCL in a child of ``fork``: refused, with a message.

An OpenCL driver has threads and a connection to its device, and ``fork`` copies neither. A call in the child would wait
for threads that do not exist, or disturb the parent's work. So once a process has queried OpenCL platforms, calls in
its forked children are refused, for the parent's objects and for new devices. A child whose parent has not used OpenCL
may use it, as may a process that was started by ``spawn`` or ``forkserver``.
"""

from __future__ import annotations

import os

from marlin_cy.errors import DeviceError

__all__ = ["FORKED", "note_use", "reason_forked", "refuse_forked"]

FORKED = (
    "OpenCL was in use when this process was forked, and drivers do not work in a forked child; use OpenCL in the "
    "parent or in the child alone, or start the process by multiprocessing's 'spawn' method"
)

_used = False  # by this process or by an ancestor that it was forked from
_forked = False  # from a process that had used OpenCL


def note_use() -> None:
    """Note that this process uses OpenCL drivers: from now on its forked children are refused."""
    global _used
    _used = True


def reason_forked() -> str | None:
    """None, or why this process cannot use OpenCL."""
    return FORKED if _forked else None


def refuse_forked() -> None:
    """Raise DeviceError in a child of ``fork`` whose parent had used OpenCL."""
    if _forked:
        raise DeviceError(FORKED)


def _in_child() -> None:
    global _forked
    _forked = _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)

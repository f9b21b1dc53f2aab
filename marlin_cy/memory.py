"""How much memory the system can still give to this process."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["available_memory"]


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can use without swapping; None if the system does not say.

    On Linux: ``MemAvailable`` of ``/proc/meminfo``, or less if a container's cgroup (v2 or v1) has less left.
    Elsewhere: the physical memory.

    Parameters
    ----------
    root : Path
        Directory to read ``proc`` and ``sys`` from, in place of ``/``; for tests.
    """
    limits = []
    if found := re.search(r"^MemAvailable: *([0-9]+) kB$", _read(root / "proc/meminfo"), re.MULTILINE):
        limits.append(1024 * int(found[1]))
    cgroup = root / "sys/fs/cgroup"
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        values = [_read(cgroup / name).strip() for name in (limit, usage)]
        if all(re.fullmatch("[0-9]{1,18}", value) for value in values):
            limits.append(max(0, int(values[0]) - int(values[1])))
    if not limits and hasattr(os, "sysconf"):
        try:
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, ValueError):
            return None
    return min(limits, default=None)


def _read(path: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""

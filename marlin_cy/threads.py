"""How many threads to use: the default, and the check of a number that a caller gives.

The default respects three limits: ``OMP_NUM_THREADS``, the affinity mask of the process, and the CPU quota of its
control groups (cgroups). Containers limit CPU time by such a quota. With more threads than the quota allows, all of
them are stopped for a part of each period, and the parallel loops wait.

Source of the file formats: the Linux kernel's documentation, "Control Group v2" (``cpu.max``) and "CFS Bandwidth
Control" (``cpu.cfs_quota_us``); proc(5) for ``mountinfo``.
"""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from marlin_cy.arguments import integer

__all__ = ["MAX_THREADS", "checked_num_threads", "cpu_quota", "default_num_threads"]

MAX_THREADS = 4096


def checked_num_threads(value: object) -> int:
    """A caller's ``num_threads`` as an int; :func:`default_num_threads` for None.

    Raises
    ------
    TypeError
        ``value`` is not an integer of Python or NumPy; floats and bools are rejected even if integral.
    ValueError
        ``value`` is not in 1 to 4096.
    """
    if value is None:
        return default_num_threads()
    threads = integer("num_threads", value)
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"num_threads: got {threads}, expected 1 to {MAX_THREADS}")
    return threads


def default_num_threads() -> int:
    """The first number of ``OMP_NUM_THREADS`` if it is valid, else the CPUs that this process may use, at least 1.

    These are the CPUs in its affinity mask, or its CPU quota, rounded up, if the quota is less.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if re.fullmatch(r"[0-9]{1,9}", wanted) and int(wanted) > 0:
        return min(int(wanted), MAX_THREADS)
    # Imported here: the CPU backend imports this module.
    from marlin_cy.cpu._workspace import available_cpus

    cpus = available_cpus()
    quota = cpu_quota()
    if quota is not None:
        cpus = min(cpus, math.ceil(quota))
    return min(max(cpus, 1), MAX_THREADS)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPU quota of this process, in CPUs; None if its cgroups set no limit.

    The limit is the lowest of the process's cgroup and its ancestors, of cgroup v2 and of the cpu controller of v1.
    Files that are missing, unreadable or malformed do not limit.

    Parameters
    ----------
    root : Path
        Directory to read ``proc`` and the mount points from, in place of ``/``; for tests.
    """
    mounts = _cgroup_mounts(_read(root / "proc/self/mountinfo"))
    quotas = []
    for version, cgroup in _cgroups(_read(root / "proc/self/cgroup")):
        for mount in mounts:
            if mount.version == version:
                quotas += [_quota_of(folder, version) for folder in _folders(root, mount, cgroup)]
    return min((quota for quota in quotas if quota is not None), default=None)


class _Mount(NamedTuple):
    """A mounted hierarchy: ``top`` is the cgroup that is visible at ``point``."""

    version: int
    top: PurePosixPath
    point: PurePosixPath


def _cgroup_mounts(mountinfo: str) -> list[_Mount]:
    """The mounts of cgroup v2, and of the cpu controller of v1.

    A line of ``mountinfo`` is::

        36 25 0:31 / /sys/fs/cgroup/cpu rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
                   ^ ^                                       ^             ^
                   top point                                 type          controllers, of v1
    """
    mounts = []
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if not separator or len(before) < 6 or len(after) < 3:
            continue
        top, point = (PurePosixPath(_unescaped(field)) for field in before[3:5])
        if after[0] == "cgroup2":
            mounts.append(_Mount(2, top, point))
        elif after[0] == "cgroup" and "cpu" in after[2].split(","):
            mounts.append(_Mount(1, top, point))
    return mounts


def _cgroups(lines: str) -> Iterator[tuple[int, PurePosixPath]]:
    """``(version, cgroup)`` of this process, from lines of ``number:controllers:cgroup``; v2 has no controllers."""
    for line in lines.splitlines():
        number, _, rest = line.partition(":")
        controllers, separator, cgroup = rest.partition(":")
        if not separator:
            continue
        if number == "0" and not controllers:
            yield 2, PurePosixPath(cgroup)
        elif "cpu" in controllers.split(","):
            yield 1, PurePosixPath(cgroup)


def _folders(root: Path, mount: _Mount, cgroup: PurePosixPath) -> Iterator[Path]:
    """The directories of a cgroup and its ancestors, as far as they are visible in a mount.

    A container may see its own cgroup as the top of the mount, while ``/proc`` names the cgroup as the host does. Then
    only the top itself is visible.
    """
    point = root / mount.point.relative_to(mount.point.anchor)
    below = PurePosixPath()
    if cgroup.is_relative_to(mount.top) and ".." not in cgroup.parts:
        below = cgroup.relative_to(mount.top)
    for folder in (below, *below.parents):
        yield point / folder


def _quota_of(folder: Path, version: int) -> float | None:
    """The limit of a single cgroup in CPUs; None if it has no valid limit."""
    if version == 2:
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    else:
        quota, period = (_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if not (re.fullmatch(r"[0-9]{1,18}", quota) and re.fullmatch(r"[0-9]{1,18}", period)):
        return None  # v2: "max"; v1: -1
    if int(quota) == 0 or int(period) == 0:
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    """The text of a file; empty if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except (OSError, ValueError):
        return ""


def _unescaped(field: str) -> str:
    """A field of ``mountinfo``, in which ``\\040`` is a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)

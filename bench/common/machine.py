"""Facts about the machine, and the choice of the CPUs that a benchmark runs on."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_cy import memory

if TYPE_CHECKING:
    from marlin_cy.cpu import CpuContext

__all__ = [
    "available_memory",
    "describe",
    "document_of",
    "last_level_cache_bytes",
    "openmp_runtimes",
    "restrict_to",
    "siblings_among",
    "spread_over_cores",
]

CPUS = Path("/sys/devices/system/cpu")
ENVIRONMENT = (
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MARLIN_CY_ISA",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "GOMP_CPU_AFFINITY",
    "KMP_BLOCKTIME",
    "THP_MEM_ALLOC_ENABLE",
)


def spread_over_cores(count: int) -> list[int]:
    """``count`` of the CPUs that this process may use, on different cores while there are unused cores.

    Raises
    ------
    ValueError
        This process may use fewer CPUs.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if count > len(allowed):
        raise ValueError(f"--threads: got {count}, but this process may use {len(allowed)} CPUs")
    first_of_core: dict[str, int] = {}
    for cpu in allowed:
        first_of_core.setdefault(_core_of(cpu), cpu)
    firsts = list(first_of_core.values())
    return sorted((firsts + [cpu for cpu in allowed if cpu not in firsts])[:count])


def restrict_to(cpus: Iterable[int]) -> None:
    """Restrict this process to some CPUs.

    Must be called before anything that uses OpenMP is imported: the runtime counts the CPUs when it is loaded, and
    lets idle threads spin only if there are no more threads than CPUs.

    Raises
    ------
    ValueError
        The system refuses these CPUs.
    """
    cpus = list(cpus)
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        raise ValueError(f"--cpus: got {','.join(map(str, cpus))}: {error.strerror}") from error


def siblings_among(cpus: Collection[int]) -> bool:
    """Whether some of these CPUs share a core. Two such CPUs compute little more than one."""
    return len({_core_of(cpu) for cpu in cpus}) < len(cpus)


def _core_of(cpu: int) -> str:
    """A name for the core of a CPU: the CPUs that share the core, or the CPU itself if the system does not tell."""
    return _text(CPUS / f"cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu)


def last_level_cache_bytes() -> int:
    """Bytes of the largest cache of the first CPU in use; 32 MiB if the system does not tell."""
    cpu = min(os.sched_getaffinity(0))
    sizes = []
    for file in (CPUS / f"cpu{cpu}/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
        if unit and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=32 << 20)


def available_memory() -> int:
    """:func:`marlin_cy.memory.available_memory`, on a system that says it."""
    found = memory.available_memory()
    if found is None:
        raise OSError("this system does not say how much memory is available; pass a number of bytes")
    return found


def _text(path: str | Path) -> str:
    """The content of a file; empty if it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes that are loaded. Each runtime has a thread pool of its own."""
    return sorted(set(re.findall(r"/((?:libgomp|libomp|libiomp)[^/\n]*)$", _text("/proc/self/maps"), re.MULTILINE)))


def document_of(mode: str, schema: int, context: CpuContext, timing: dict[str, Any]) -> dict[str, Any]:
    """The JSON document of a measurement on the CPU, without results."""
    return {
        "schema": schema,
        "mode": mode,
        "command": sys.argv[1:],
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe(context, None),
        "timing": timing,
    }


def describe(context: CpuContext, torch_report: dict[str, Any] | None) -> dict[str, Any]:
    """The JSON object ``machine``. To be called after all libraries that are measured have been imported."""
    import marlin_cy
    from marlin_cy.commands.doctor import cpu_model, huge_pages_state

    cpus = sorted(os.sched_getaffinity(0))
    return {
        "cpu": cpu_model(),
        "cpus": cpus,
        "hyperthreads_share_a_core": siblings_among(cpus),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "load_average": os.getloadavg()[0],
        "threads": context.num_threads,
        "isa": context.isa,
        "transparent_huge_pages": huge_pages_state(),
        "openmp_runtimes": openmp_runtimes(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "marlin_cy": marlin_cy.__version__,
        "python": platform.python_version(),
        "torch": torch_report,
    }

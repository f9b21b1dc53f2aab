"""Show this machine's hardware, the backends that work here, and why others do not work.

The object that ``--json`` prints has these keys. Bandwidths are in bytes per second; an unknown value is null.

``version``
``cpu``: ``model``, ``architecture``
``isa``: ``chosen``, ``reason``, ``isas`` (a list of ``name``, ``available``, ``reason``), or null; ``chosen`` is
  null where ``MARLIN_CY_ISA`` names an instruction set that cannot run
``threads``: ``default``, ``affinity``, ``cpu_quota``, ``omp_num_threads``
``openmp``: ``enabled``, ``version`` (the date in OpenMP's ``_OPENMP``, 0 without OpenMP), or null
``memory``: ``bandwidth_one_thread``, ``bandwidth_all_threads``, ``transparent_huge_pages``
``backends``: from each name to null, or to the reason why the backend does not work
``opencl``: null without PyOpenCL, else an object that the top of ``opencl/doctor.py`` documents
``versions``: ``python``, ``numpy``, ``ml_dtypes``, ``safetensors``, ``marlin_cy``
``ok``: whether at least one backend works, and every working backend accepts the environment variables

A backend of another package may add a key with its own name.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.markup import escape

from marlin_cy import __version__, available_backends
from marlin_cy.backends import BUILT_IN, backend_factory
from marlin_cy.command_line import DoctorReport
from marlin_cy.commands.output import console, gigabytes, mark, print_json, table
from marlin_cy.errors import BackendUnavailable

__all__ = ["HELP", "add_arguments", "execute", "report"]

HELP = "show CPU, instruction sets, threads, memory bandwidth, backends"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CPU_INFO = Path("/proc/cpuinfo")


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    found, parts = report()
    if arguments.json:
        print_json(found)
    else:
        _print_tables(found, parts)
    return 0 if found["ok"] else 1


def report() -> tuple[dict[str, Any], list[DoctorReport]]:
    """The object that ``--json`` prints, and the reports of the backends that it includes."""
    backends = available_backends()
    found: dict[str, Any] = {
        "version": __version__,
        "cpu": {"model": cpu_model(), "architecture": platform.machine()},
        "isa": None,
        "threads": {
            "default": None,
            "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "cpu_quota": None,
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "openmp": None,
        "memory": {
            "bandwidth_one_thread": None,
            "bandwidth_all_threads": None,
            "transparent_huge_pages": huge_pages_state(),
        },
        "backends": backends,
        "opencl": None,
        "versions": {
            "python": platform.python_version(),
            "numpy": version("numpy"),
            "ml_dtypes": version("ml_dtypes"),
            "safetensors": version("safetensors"),
            "marlin_cy": __version__,
        },
        "ok": None in backends.values(),
    }
    parts = []
    for name, reason in backends.items():
        part = _report_of(name)
        if part is None:
            continue
        parts.append(part)
        for key, value in (part.document if name in BUILT_IN else {name: part.document}).items():
            if name not in BUILT_IN and key in found:
                continue  # a package cannot replace the doctor's own keys
            found[key] = {**found[key], **value} if isinstance(found.get(key), dict) else value
        found["ok"] = found["ok"] and (reason is not None or part.works)
    # The last key stays the last one.
    found["ok"] = found.pop("ok")
    return found, parts


def _report_of(name: str) -> DoctorReport | None:
    """A backend's own report; None if the backend has no report or its package cannot be imported."""
    try:
        doctor = getattr(backend_factory(name), "doctor", None)
    except BackendUnavailable:
        return None
    if doctor is None:
        return None
    try:
        part = doctor()
    except Exception as error:  # the package's own, of any type
        if name in BUILT_IN:
            raise
        part = DoctorReport({"error": f"doctor() fails ({type(error).__name__}: {error})"}, works=False)
    return part if isinstance(part, DoctorReport) else None


def cpu_model() -> str | None:
    """The processor's name, or None where the system does not report it."""
    if CPU_INFO.exists():
        name = re.search(r"^(?:model name|Processor|cpu model)\s*:\s*(.+)$", CPU_INFO.read_text(), re.MULTILINE)
        if name:
            return name[1]
    return platform.processor() or None


def huge_pages_state() -> str | None:
    """``"always"``, ``"madvise"`` or ``"never"``; None where the kernel has no such setting."""
    if not HUGE_PAGES.exists():
        return None
    chosen = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text())
    return chosen[1] if chosen else None


def _print_tables(found: dict[str, Any], parts: list[DoctorReport]) -> None:
    def known(value: object) -> str:
        return "unknown" if value is None else str(value)

    screen = console()
    threads, memory, openmp = found["threads"], found["memory"], found["openmp"]

    facts = table("machine", "")
    facts.add_row("CPU", escape(f"{known(found['cpu']['model'])} ({found['cpu']['architecture']})"))
    facts.add_row(
        "threads",
        f"{known(threads['default'])} by default; {threads['affinity']} CPUs allowed; "
        f"CPU quota {'none' if threads['cpu_quota'] is None else format(threads['cpu_quota'], 'g')}; "
        f"OMP_NUM_THREADS {escape(threads['omp_num_threads'] or 'not set')}",
    )
    if openmp:
        facts.add_row(
            "OpenMP", f"{mark(openmp['enabled'])}" + (f", version {openmp['version']}" if openmp["enabled"] else "")
        )
    for label, key in (("one thread", "bandwidth_one_thread"), ("all threads", "bandwidth_all_threads")):
        if memory[key] is not None:
            facts.add_row(f"memory read, {label}", gigabytes(memory[key]))
    facts.add_row("transparent huge pages", known(memory["transparent_huge_pages"]))
    screen.print(facts)

    screen.print()
    backends = table("backend", "works", "why not")
    for name, reason in found["backends"].items():
        backends.add_row(name, mark(reason is None), escape(reason or ""))
    screen.print(backends)

    for part in parts:
        screen.print()
        part.print_tables(screen)

    screen.print()
    screen.print(", ".join(f"{name} {number}" for name, number in found["versions"].items()))

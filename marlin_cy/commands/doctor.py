"""Say what this machine has, what the library makes of it, and why.

The object that ``--json`` prints has these keys; bandwidths are in bytes per second, and what could
not be found out is null:

``version``
``cpu``: ``model``, ``architecture``
``isa``: ``chosen``, ``reason``, ``isas`` (a list of ``name``, ``available``, ``reason``), or null; ``chosen`` is
  null where ``MARLIN_CY_ISA`` asks for what cannot run
``threads``: ``default``, ``affinity``, ``cpu_quota``, ``omp_num_threads``
``openmp``: ``enabled``, ``version`` (the date that OpenMP's ``_OPENMP`` gives, 0 without it), or null
``memory``: ``bandwidth_one_thread``, ``bandwidth_all_threads``, ``transparent_huge_pages``
``backends``: from each name to null, or to the reason why it is missing
``opencl``: null without PyOpenCL, else what the top of ``doctor_opencl.py`` lists
``versions``: ``python``, ``numpy``, ``ml_dtypes``, ``safetensors``, ``marlin_cy``
``ok``: whether any backend works, with the instruction set and the device that the environment asks for
"""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

from rich.markup import escape

from marlin_cy import __version__, available_backends
from marlin_cy.commands import doctor_opencl
from marlin_cy.commands.output import console, gigabytes, mark, print_json, table

__all__ = ["HELP", "add_arguments", "execute", "report"]

HELP = "show CPU, instruction sets, threads, memory bandwidth, backends"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CPU_INFO = Path("/proc/cpuinfo")


def add_arguments(parser):
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")


def execute(arguments):
    """Run the command; returns the exit code."""
    found = report()
    if arguments.json:
        print_json(found)
    else:
        _print_tables(found)
    return 0 if found["ok"] else 1


def report():
    """What was found: the object that ``--json`` prints."""
    backends = available_backends()
    compiled = _compiled_report() if backends["cpu"] is None else _uncompiled_report()
    opencl = doctor_opencl.report()
    return {
        "version": __version__,
        "cpu": {"model": cpu_model(), "architecture": platform.machine()},
        **compiled,
        "backends": backends,
        "opencl": opencl,
        "versions": {
            "python": platform.python_version(),
            "numpy": version("numpy"),
            "ml_dtypes": version("ml_dtypes"),
            "safetensors": version("safetensors"),
            "marlin_cy": __version__,
        },
        "ok": None in backends.values()
        and (compiled["isa"] is None or compiled["isa"]["chosen"] is not None)
        and (backends["opencl"] is not None or opencl["chosen"] is not None),
    }


def _compiled_report():
    """What only the compiled CPU backend knows."""
    from marlin_cy.cpu import default_num_threads, dispatch_report, openmp_report
    from marlin_cy.cpu._dispatch import isas
    from marlin_cy.cpu.measure._bandwidth import read_bandwidth
    from marlin_cy.cpu.threads import cpu_quota

    try:
        isa = dispatch_report()
    except ValueError as error:
        isa = {"chosen": None, "reason": str(error), "isas": isas()}
    threads = default_num_threads()
    one_thread = read_bandwidth(1)
    return {
        "isa": isa,
        "threads": _threads(threads, cpu_quota()),
        "openmp": openmp_report(),
        "memory": _memory(one_thread, read_bandwidth(threads) if threads > 1 else one_thread),
    }


def _uncompiled_report():
    """The same when the extension modules cannot be imported: a doctor must still speak."""
    return {"isa": None, "threads": _threads(None, None), "openmp": None, "memory": _memory(None, None)}


def _threads(default, quota):
    return {
        "default": default,
        "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_quota": quota,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _memory(one_thread, all_threads):
    return {
        "bandwidth_one_thread": one_thread,
        "bandwidth_all_threads": all_threads,
        "transparent_huge_pages": huge_pages_state(),
    }


def cpu_model():
    """The processor's name, or None where the system does not tell."""
    if CPU_INFO.exists():
        name = re.search(r"^(?:model name|Processor|cpu model)\s*:\s*(.+)$", CPU_INFO.read_text(), re.MULTILINE)
        if name:
            return name[1]
    return platform.processor() or None


def huge_pages_state():
    """``"always"``, ``"madvise"`` or ``"never"``; None where the kernel has no such setting."""
    if not HUGE_PAGES.exists():
        return None
    chosen = re.search(r"\[(\w+)\]", HUGE_PAGES.read_text())
    return chosen[1] if chosen else None


def _print_tables(found):
    def known(value, suffix=""):
        return "unknown" if value is None else f"{value}{suffix}"

    screen = console()
    threads, memory, openmp, isa = found["threads"], found["memory"], found["openmp"], found["isa"]

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

    if isa:
        screen.print()
        isas = table("instruction set", "here", "why")
        for row in isa["isas"]:
            name = f"[bold]{row['name']}[/bold] (chosen)" if row["name"] == isa["chosen"] else row["name"]
            isas.add_row(name, mark(row["available"]), escape(row["reason"]))
        screen.print(isas)
        screen.print(escape(f"Chosen: {isa['chosen'] or 'none'}, {isa['reason']}."))

    screen.print()
    backends = table("backend", "works", "why not")
    for name, reason in found["backends"].items():
        backends.add_row(name, mark(reason is None), escape(reason or ""))
    screen.print(backends)

    if found["opencl"]:
        doctor_opencl.print_tables(screen, found["opencl"])

    screen.print()
    screen.print(", ".join(f"{name} {number}" for name, number in found["versions"].items()))

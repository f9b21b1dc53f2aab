"""Kernels that only the tests compile: AMX on an emulation, and tables that no ISA has."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import EMULATED

from marlin_cy.cpu import _dispatch
from marlin_cy.cpu._dispatch import KernelTable
from marlin_cy.cpu._workspace import Workspace

TESTS = Path(__file__).parent
UKERNELS = TESTS.parent / "marlin_cy" / "cpu" / "ukernels"
FLAGS = ["-O2", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Werror", "-fPIC", f"-I{UKERNELS}"]
COMPILER = shutil.which("cc")


def build_library(folder, *sources, emulated=()):
    """A shared library of some C files. Files in ``emulated`` are compiled with ``amx_emulation.h``.

    The kernels that the package compiled are not compiled again: descriptors of other ISAs, such as parents, are found
    in the module that holds them.
    """
    objects = []
    for source in [*sources, *emulated]:
        objects.append(folder / f"{source.stem}.o")
        emulation = ["-include", TESTS / "amx_emulation.h"] if source in emulated else []
        subprocess.run([COMPILER, *FLAGS, *emulation, "-c", source, "-o", objects[-1]], check=True)
    path = folder / "kernels.so"
    if sys.platform == "darwin":  # a module cannot be linked to there: its symbols are found at run time
        ctypes.CDLL(_dispatch.__file__, ctypes.RTLD_GLOBAL)
        package = ["-undefined", "dynamic_lookup"]
    else:
        package = [_dispatch.__file__]
    subprocess.run([COMPILER, "-shared", *objects, "-o", path, *package, "-lm"], check=True)
    return ctypes.CDLL(str(path))


def emulated_amx_library(folder):
    """The kernels of AMX on the emulation. They need AVX-512 VNNI, whose kernels AMX inherits: of the CPU, or emulated
    for all tests by ``emulated.sh``, which emulates AMX too.
    """
    return EMULATED or build_library(folder, emulated=[UKERNELS / "amx.c"])


def kernel_table(library, name):
    """The complete table of the descriptor ``isa_<name>`` of a library."""
    descriptor = ctypes.c_char.in_dll(library, f"isa_{name}")
    return KernelTable.from_descriptor(ctypes.addressof(descriptor), library)


def context_with(backend, kernels, *, num_threads, compute_dtype="int16"):
    """A CPU context that uses a table of kernels from elsewhere."""
    ctx = backend.new_context(num_threads=num_threads, compute_dtype=compute_dtype)
    ctx.workspace = Workspace(num_threads, compute_dtype, kernels)
    return ctx

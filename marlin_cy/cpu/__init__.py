"""The CPU backend.

``stack.py`` implements the interface; below it, in the order in which a call goes through them::

    _buffers.pyx    checks arrays
    _gemm.pyx       plans rows, cuts the work into items      _moe.pyx   routing, both products, combination
    _quantize.pyx   quantises activations
    _dispatch.pyx   the micro-kernels of the chosen ISA       ukernels/  their contract, and one C file an ISA
    _store.pyx      the packed weights                        layout.py  the same in plain NumPy
    _workspace.pyx  the memory that calls reuse
"""

from marlin_cy.cpu._dispatch import choose_isa, isas, openmp_report
from marlin_cy.cpu._store import CpuGptqStore
from marlin_cy.cpu.backend import CpuBackend
from marlin_cy.cpu.context import CpuContext
from marlin_cy.cpu.stack import CpuLinear, CpuMarlinExpertStack
from marlin_cy.threads import default_num_threads

__all__ = [
    "CpuBackend",
    "CpuContext",
    "CpuGptqStore",
    "CpuLinear",
    "CpuMarlinExpertStack",
    "default_num_threads",
    "dispatch_report",
    "openmp_report",
]


def dispatch_report():
    """``{"chosen": name, "reason": why, "isas": [{"name", "available", "reason"}]}``."""
    chosen, reason = choose_isa()
    return {"chosen": chosen, "reason": reason, "isas": isas()}

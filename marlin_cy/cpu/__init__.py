"""The CPU backend.

``backend.py`` and ``stack.py`` implement the interface. A row passes through the extensions from top to bottom.
Functions stand in the order of the calls in each file::

    _layer.pyx      a MoE layer: slices, passes             _products.pyx  products of stacks and views
    _routing.pyx    experts and weights of each token       _buffers.pyx   checks of arrays
       |                                                       |
       +-------------------------+-----------------------------+
                                 |
    _rows.pyx       plan: rows and experts, blocks, places of quantised rows (a drawing)
    _gemm.pyx       multiply: items, split-K, epilogues
    _quantize.pyx   quantised rows
    _dispatch.pyx   the micro-kernels of the chosen ISA; ``ukernels/`` has their contract, and one C file for each ISA
                                 |
    _combine.pyx    a layer's output: weighted sums of its products

Two files serve all of these: ``_store.pyx`` has the packed weights (``layout.py`` has the same layout in plain NumPy),
and ``_workspace.pyx`` has the memory that calls reuse (``_arena.pyx`` divides it among the arrays of a call).
"""

from __future__ import annotations

from typing import Any

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


def dispatch_report() -> dict[str, Any]:
    """``{"chosen": name, "reason": why, "isas": [{"name", "available", "reason"}]}``."""
    chosen, reason = choose_isa()
    return {"chosen": chosen, "reason": reason, "isas": isas()}

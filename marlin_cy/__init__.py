"""Mixture-of-Experts layers straight from 4-bit weights, on any CPU and any OpenCL GPU.

::

    checkpoint folder ── checkpoints/ ───┐
    tensors ──────────── formats/ ───────┴─ canonical form ── StackBuilder ── packed 4-bit tiles
                                                                                    │
    activations ── quantised per row and group of K ── integer tile GEMM ───────────┘
                                                              │
                     MoeLayer: route · gate_up · act·mul · down · combine ── outputs

``interface.py`` holds the abstract classes and their documentation. ``cpu/`` and ``opencl/`` implement them, and other
packages may add backends (``backends.py``). ``moe/`` builds layers on any backend, ``integrations/`` runs whole models
in transformers, ``reference.py`` defines the result of each operation in NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from marlin_cy.backends import available_backends, get_backend
from marlin_cy.errors import (
    BackendUnavailable,
    BatchError,
    BuildError,
    CheckpointError,
    ContextInUse,
    DeviceError,
    DeviceMemoryError,
    MarlinError,
    UnsupportedError,
)
from marlin_cy.interface import Backend, Context, Linear, MarlinExpertStack

if TYPE_CHECKING:
    from marlin_cy.checkpoints.checkpoint import open_checkpoint
    from marlin_cy.decoder.load import load_model
    from marlin_cy.moe import MoeLayer, Routing, SharedExpert, moe_align_block_size

__version__ = "0.1.0"

# Names that are imported on first use: importing the package needs neither the kernels nor the checkpoint reader.
_LAZY = {
    "MoeLayer": "marlin_cy.moe",
    "Routing": "marlin_cy.moe",
    "SharedExpert": "marlin_cy.moe",
    "moe_align_block_size": "marlin_cy.moe",
    "load_model": "marlin_cy.decoder.load",
    "open_checkpoint": "marlin_cy.checkpoints.checkpoint",
}

__all__ = [
    "Backend",
    "BackendUnavailable",
    "BatchError",
    "BuildError",
    "CheckpointError",
    "Context",
    "ContextInUse",
    "DeviceError",
    "DeviceMemoryError",
    "Linear",
    "MarlinError",
    "MarlinExpertStack",
    "MoeLayer",
    "Routing",
    "SharedExpert",
    "UnsupportedError",
    "available_backends",
    "get_backend",
    "load_model",
    "moe_align_block_size",
    "open_checkpoint",
]


if not TYPE_CHECKING:  # a type checker believes that a module with __getattr__ has every name

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            value = globals()[name] = getattr(import_module(_LAZY[name]), name)
            return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])

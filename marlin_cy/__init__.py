"""Mixture-of-Experts layers straight from 4-bit weights, on any CPU and any OpenCL GPU.

::

    checkpoint folder ── checkpoint.py ──┐
    tensors ──────────── formats/ ───────┴─ canonical form ── StackBuilder ── packed int4 tiles
                                                                                    │
    activations ── quantised per row and group of K ── integer tile GEMM ───────────┘
                                                              │
                     MoeLayer: route · gate_up · act·mul · down · combine ── outputs

``interface.py`` holds the abstract classes and their documentation, ``cpu/`` and ``opencl/`` implement
them, ``moe/`` builds layers on either, ``integrations/`` runs whole models in transformers, ``reference.py`` says
in NumPy what every operation computes.
"""

from importlib import import_module

from marlin_cy.backends import available_backends, get_backend
from marlin_cy.errors import (
    BackendUnavailable,
    BuildError,
    CheckpointError,
    ContextInUse,
    DeviceError,
    DeviceMemoryError,
    MarlinError,
    UnsupportedError,
)
from marlin_cy.interface import Backend, Context, Linear, MarlinExpertStack

__version__ = "0.1.0"

# What is found on first use: the kernels and the checkpoint reader are not needed to import the package.
_LAZY = {
    "MoeLayer": "marlin_cy.moe",
    "Routing": "marlin_cy.moe",
    "SharedExpert": "marlin_cy.moe",
    "moe_align_block_size": "marlin_cy.moe",
    "open_checkpoint": "marlin_cy.checkpoints.checkpoint",
}

__all__ = [
    "Backend",
    "BackendUnavailable",
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
    "moe_align_block_size",
    "open_checkpoint",
]


def __getattr__(name):
    if name in _LAZY:
        value = globals()[name] = getattr(import_module(_LAZY[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_LAZY])

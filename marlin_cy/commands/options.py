"""The arguments that commands have in common: which checkpoint, which backend."""

import argparse
from contextlib import nullcontext
from importlib.resources import as_file, files
from pathlib import Path

from marlin_cy.backends import BACKENDS
from marlin_cy.commands.measure import ERROR_BOUNDS
from marlin_cy.commands.opencl_options import add_opencl_options

__all__ = [
    "BUILT_IN",
    "add_backend_options",
    "add_checkpoint_argument",
    "check_backend_options",
    "checkpoint_folder",
    "positive",
]

BUILT_IN = "data/tiny-qwen3-moe-gptq-int4"
OPTIONS = {"cpu": ("threads", "compute_dtype"), "opencl": ("device", "tier")}


def add_checkpoint_argument(parser):
    """Declare the optional ``CHECKPOINT``."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint's folder (default: a small built-in model)",
    )


def checkpoint_folder(arguments):
    """A context manager that gives the folder that was named, or the built-in one."""
    if arguments.checkpoint is not None:
        return nullcontext(arguments.checkpoint)
    return as_file(files("marlin_cy") / BUILT_IN)


def add_backend_options(parser):
    """Declare ``--backend`` and the options of each."""
    parser.add_argument("--backend", default="cpu", choices=sorted(BACKENDS), help="default: cpu")
    parser.add_argument("--threads", type=positive, metavar="N", help="of the CPU; default: one for each core")
    parser.add_argument(
        "--compute-dtype", choices=sorted(ERROR_BOUNDS), help="of the CPU's activations; default: int16"
    )
    add_opencl_options(parser)


def check_backend_options(arguments):
    """End with a usage error where an option is not one of the chosen backend's."""
    for backend, names in OPTIONS.items():
        for name in names:
            if backend != arguments.backend and getattr(arguments, name) is not None:
                option = f"--{name.replace('_', '-')}"
                arguments.refuse(f"{option}: only with --backend {backend}, got --backend {arguments.backend}")


def positive(text):
    """A whole number of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return value

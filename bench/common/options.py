"""Command line options that several commands share, and types of options for argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from bench.common.machine import restrict_to, spread_over_cores
from bench.common.shapes import MODELS

__all__ = [
    "COMPUTE_DTYPES",
    "add_cpus",
    "add_model",
    "add_output",
    "add_quick",
    "add_sweep",
    "names",
    "positive",
    "restrict_cpus",
    "set_defaults",
    "values",
]

COMPUTE_DTYPES = ("int16", "int8")
SWEEP_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SWEEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

T = TypeVar("T")


def add_cpus(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads`` and ``--cpus``, which :func:`restrict_cpus` obeys."""
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="N threads on N CPUs, on different cores if possible"
    )
    parser.add_argument("--cpus", type=values(int), metavar="A,B", help="run on these CPUs only")


def restrict_cpus(arguments: argparse.Namespace) -> None:
    """Restrict this process to the CPUs that ``--threads`` and ``--cpus`` name.

    Must be called before anything that loads an OpenMP runtime is imported, see
    :func:`~bench.common.machine.restrict_to`.

    Raises
    ------
    ValueError
        The CPUs do not exist, may not be used, or are fewer than the threads.
    """
    if arguments.cpus and arguments.threads and len(set(arguments.cpus)) < arguments.threads:
        raise ValueError(f"--threads: got {arguments.threads}, expected at most the number of --cpus")
    if arguments.cpus:
        restrict_to(arguments.cpus)
    elif arguments.threads:
        restrict_to(spread_over_cores(arguments.threads))


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``."""
    parser.add_argument("--model", default="qwen3", choices=MODELS, help="use this model's shapes (default: qwen3)")


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Add the options about the cases of a sweep: ``--models``, ``--rows``, ``--tokens``, ``--memory``."""
    known = ",".join(MODELS)
    parser.add_argument("--models", type=names(MODELS), default=tuple(MODELS), metavar="A,B", help=f"default: {known}")
    parser.add_argument("--rows", type=values(positive), default=SWEEP_ROWS, metavar="A,B", help="rows per expert")
    parser.add_argument("--tokens", type=values(positive), default=SWEEP_TOKENS, metavar="A,B", help="tokens per layer")
    parser.add_argument("--memory", type=float, metavar="GB", help="memory for weights (default: half of what is free)")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--output``."""
    parser.add_argument("--output", "--json", type=Path, metavar="FILE", help="default: a new file in bench/results/")


def add_quick(parser: argparse.ArgumentParser) -> None:
    """Add ``--quick``."""
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few short rounds: only checks that it runs")


def set_defaults(arguments: argparse.Namespace, defaults: Mapping[str, Any], quick: Mapping[str, Any]) -> None:
    """Give options that the command line does not have their defaults: ``quick`` with ``--quick``."""
    for name, value in (quick if arguments.quick else defaults).items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return value


def values(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """A parser of values separated by commas."""

    def parse(text: str) -> tuple[T, ...]:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of names separated by commas, each of which must be known."""

    def parse(text: str) -> tuple[str, ...]:
        given = tuple(text.split(","))
        if unknown := sorted(set(given) - set(known)):
            raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, expected some of {', '.join(known)}")
        return given

    return parse

"""Find the fastest kernels of an OpenCL device for a model's products, and store them for later calls.

The object that ``--json`` prints has these keys: ``version``, ``device``, ``driver``, ``tier``, ``file`` (where
results are stored) and ``results``, a list of ``k``, ``n``, ``experts``, ``group_size``, ``top_k``, ``tokens``,
``rows`` (for each expert), ``default_us``, ``best_us``, ``configuration`` (an object), ``tried``, ``refused``
(a list of ``configuration``, ``reason``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from marlin_cy import __version__, open_checkpoint
from marlin_cy.commands.options import open_backend
from marlin_cy.commands.output import LoadProgress, console, print_json, table
from marlin_cy.errors import CheckpointError, MarlinError
from marlin_cy.opencl.command_line import OpenClCommandLine

if TYPE_CHECKING:
    from marlin_cy.interface import Backend
    from marlin_cy.opencl.tiers.configuration import Configuration
    from marlin_cy.opencl.tuning import Shape, Tuning

__all__ = ["HELP", "add_arguments", "execute"]

HELP = "find the fastest OpenCL kernels for a model's products on this device"
TOKENS = (1, 4, 16, 64, 256, 1024)
TOP_K = 8


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help="tune the products of a checkpoint's MoE layers",
    )
    parser.add_argument(
        "--shape", action="append", type=_sizes(4), metavar="K,N,E,GROUP", help="tune a product: E experts of [K, N]"
    )
    parser.add_argument("--backend", default="opencl", choices=["opencl"], help="the only backend with tuning")
    OpenClCommandLine.add_arguments(parser)
    parser.add_argument("--tokens", type=_sizes(), default=TOKENS, metavar="A,B", help="default: 1 to 1024")
    parser.add_argument("--top-k", type=int, default=TOP_K, metavar="N", help="with --shape: experts for each token")
    parser.add_argument("--asymmetric", action="store_true", help="with --shape: with zero points")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if (arguments.checkpoint is None) == (arguments.shape is None):
        arguments.refuse("expected either CHECKPOINT or --shape")
    if arguments.top_k < 1:
        arguments.refuse(f"--top-k: got {arguments.top_k}, expected at least 1")
    backend: Any = open_backend("opencl", arguments)
    # Imported here, as it needs PyOpenCL.
    from marlin_cy.opencl import tuned, tuning

    tier, device = backend.tier, backend.runtime.capabilities
    # Before the measurements: fail early where the results cannot be stored.
    file = tuned.keep(device, tier, [])
    results = []
    with LoadProgress("tuning") as progress:
        shapes = list(_shapes(arguments, backend))
        progress.parts = len(shapes)
        for progress.finished, shape in enumerate(shapes):
            try:
                measured = tuning.tune(backend, shape, arguments.tokens, progress)
            except (ValueError, TypeError) as error:
                raise MarlinError(f"--shape: {error}") from error
            tuned.keep(device, tier, measured)
            results += measured
    report = {
        "version": __version__,
        "device": device.name,
        "driver": device.driver_version,
        "tier": tier.name,
        "file": str(file),
    }
    if arguments.json:
        print_json(report | {"results": [_as_json(result, tuned) for result in results]})
    else:
        _print_table(report, results)
    return 0


def _shapes(arguments: argparse.Namespace, backend: Backend) -> Iterator[Shape]:
    from marlin_cy.opencl.tuning import Shape

    if arguments.shape is not None:
        for k, n, experts, group_size in arguments.shape:
            yield Shape(k, n, experts, group_size, min(arguments.top_k, experts), symmetric=not arguments.asymmetric)
        return
    with open_checkpoint(arguments.checkpoint, backend=backend) as checkpoint:
        if not checkpoint.moe_layers:
            raise CheckpointError("the checkpoint has no MoE layers", file=arguments.checkpoint)
        spec, group_sizes = checkpoint.moe_spec, checkpoint.expert_group_sizes(checkpoint.moe_layers[0])
        symmetry, codes = checkpoint.expert_symmetry(checkpoint.moe_layers[0]), checkpoint.codes
    hidden, inner = spec.hidden_size, spec.intermediate_size
    sizes = (hidden, 2 * inner), (inner, hidden)
    for (k, n), group_size, symmetric in zip(sizes, group_sizes, symmetry, strict=True):
        yield Shape(
            k, n, spec.num_experts, group_size, spec.top_k, gathered=k == inner, symmetric=symmetric, codes=codes
        )


def _as_json(result: Tuning, tuned: ModuleType) -> dict[str, Any]:
    shape = result.shape
    return {
        "k": shape.k,
        "n": shape.n,
        "experts": shape.experts,
        "group_size": shape.group_size,
        "top_k": shape.top_k,
        "tokens": result.tokens,
        "rows": result.rows,
        "default_us": result.default_seconds * 1e6,
        "best_us": result.best_seconds * 1e6,
        "configuration": tuned.as_entry(result.best),
        "tried": result.tried,
        "refused": [
            {"configuration": tuned.as_entry(configuration), "reason": reason}
            for configuration, reason in result.refused
        ],
    }


def _print_table(report: dict[str, Any], results: list[Tuning]) -> None:
    screen = console()
    screen.print(escape(f"{report['device']}, driver {report['driver']}, tier {report['tier']}"))
    screen.print()
    rows = table("K, N, experts", ">tokens", ">rows/\nexpert", ">default\nµs", ">best\nµs", ">tried", "configuration")
    for result in results:
        shape = result.shape
        rows.add_row(
            f"{shape.k}, {shape.n}, {shape.experts}",
            str(result.tokens),
            str(result.rows),
            f"{result.default_seconds * 1e6:.1f}",
            f"{result.best_seconds * 1e6:.1f}",
            str(result.tried),
            "the default" if result.best == result.default else escape(_words(result.best)),
        )
    screen.print(rows)
    screen.print()
    for result in results:
        for configuration, reason in result.refused:
            where = f"{result.shape.k}, {result.shape.n}, {result.tokens} tokens"
            screen.print(f"[yellow]Refused[/yellow] for {where}: {escape(_words(configuration))}: {escape(reason)}")
    screen.print(escape(f"Stored in {report['file']}. Backends that are made from now on use it."))


def _words(configuration: Configuration) -> str:
    """A configuration in a few words."""
    macros = " ".join(f"{name}={value}" for name, value in configuration.macros)
    kernel = f"{configuration.file}: " if configuration.file else ""
    return f"{kernel}{configuration.rows} × {configuration.columns}, splits {configuration.splits}, {macros}"


def _sizes(count: int | None = None) -> Callable[[str], tuple[int, ...]]:
    """A ``type`` of argparse: positive numbers, separated by commas."""

    def sizes(text: str) -> tuple[int, ...]:
        try:
            numbers = tuple(map(int, text.split(",")))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < 1 or count not in (None, len(numbers)):
            wanted = "numbers" if count is None else f"{count} numbers"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {wanted} of at least 1, separated by commas")
        return numbers

    return sizes

"""Find a device's fastest kernels for a model's products, and store them for later calls.

The object that ``--json`` prints has these keys: ``version``, the keys of :attr:`marlin_cy.tuning.Tuner.place` (such as
``device``, ``driver`` and ``tier``), ``file`` (where results are stored) and ``results``, a list of ``k``, ``n``,
``experts``, ``group_size``, ``top_k``, ``tokens``, ``rows`` (for each expert), ``default_us``, ``best_us``,
``configuration`` (an object), ``tried``, ``refused`` (a list of ``configuration``, ``reason``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from marlin_cy import __version__, open_checkpoint
from marlin_cy.activations import ACTIVATIONS
from marlin_cy.backends import backend_factory, backend_names
from marlin_cy.commands.options import add_backend_options, open_backend
from marlin_cy.commands.output import LoadProgress, console, print_json, table
from marlin_cy.errors import BackendUnavailable, CheckpointError, MarlinError
from marlin_cy.tuning import Shape, Tuner, TuningResult

if TYPE_CHECKING:
    from marlin_cy.interface import Backend

__all__ = ["HELP", "add_arguments", "execute"]

HELP = "find the fastest kernels for a model's products on a device, and store them"
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
    add_backend_options(parser, argv, default=_default_backend())
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
    make_tuner = _maker_of(arguments.backend)
    if make_tuner is None:
        arguments.refuse(f"--backend: {arguments.backend} has nothing to tune")
        raise AssertionError("refuse() ends the command")
    backend = open_backend(arguments.backend, arguments)
    tuner = make_tuner(backend)
    results: list[TuningResult] = []
    with LoadProgress("tuning") as progress:
        shapes = list(_shapes(arguments, backend))
        progress.parts = len(shapes)
        for progress.finished, shape in enumerate(shapes):
            try:
                results += tuner.tune(shape, arguments.tokens, progress)
            except (ValueError, TypeError) as error:
                raise MarlinError(f"--shape: {error}") from error
    if arguments.json:
        report = {"version": __version__, **tuner.place, "file": tuner.file}
        print_json(report | {"results": [_as_json(result) for result in results]})
    else:
        _print_table(tuner, results)
    return 0


def _default_backend() -> str:
    """The first backend that has a tuner."""
    names = backend_names()
    return next((name for name in names if _maker_of(name) is not None), names[0])


def _maker_of(name: str) -> Callable[[Any], Tuner] | None:
    """The function that makes the tuner of a backend, or None if the backend has none or cannot be imported."""
    try:
        tuner = getattr(backend_factory(name), "tuner", None)
    except BackendUnavailable:
        return None
    made: Callable[[Any], Tuner] | None = None if tuner is None else tuner()
    return made


def _shapes(arguments: argparse.Namespace, backend: Backend) -> Iterator[Shape]:
    if arguments.shape is not None:
        for k, n, experts, group_size in arguments.shape:
            yield Shape(k, n, experts, group_size, min(arguments.top_k, experts), symmetric=not arguments.asymmetric)
        return
    with open_checkpoint(arguments.checkpoint, backend=backend) as checkpoint:
        if not checkpoint.moe_layers:
            raise CheckpointError("the checkpoint has no MoE layers", file=arguments.checkpoint)
        spec = checkpoint.moe_spec
        layers = {checkpoint.expert_kinds(layer): layer for layer in reversed(checkpoint.moe_layers)}
        found = [(kinds, checkpoint.expert_symmetry(layer)) for kinds, layer in reversed(layers.items())]
    hidden, inner = spec.hidden_size, spec.intermediate_size
    width = 2 * inner if ACTIVATIONS[spec.activation].gated else inner
    shapes: dict[Shape, None] = {}  # in order; layers share some
    for kinds, symmetry in found:
        for is_down, (k, n) in enumerate([(hidden, width), (inner, hidden)]):
            kind = kinds[is_down]
            place = spec.top_k, bool(is_down), symmetry[is_down]
            shapes[Shape(k, n, spec.num_experts, kind.group_size, *place, kind.codes, kind.scales)] = None
    yield from shapes


def _as_json(result: TuningResult) -> dict[str, Any]:
    shape = result.shape
    return {
        "k": shape.k,
        "n": shape.n,
        "experts": shape.experts,
        "group_size": shape.group_size,
        "codes": shape.codes,
        "scales": shape.scales,
        "symmetric": shape.symmetric,
        "top_k": shape.top_k,
        "tokens": result.tokens,
        "rows": result.rows,
        "default_us": result.default_seconds * 1e6,
        "best_us": result.best_seconds * 1e6,
        "configuration": result.best.document,
        "tried": result.tried,
        "refused": [{"configuration": choice.document, "reason": reason} for choice, reason in result.refused],
    }


def _print_table(tuner: Tuner, results: list[TuningResult]) -> None:
    screen = console()
    screen.print(escape(", ".join(f"{name} {value}" for name, value in tuner.place.items())))
    screen.print()
    rows = table(
        "K, N, experts", "weights", ">tokens", ">rows/\nexpert", ">default\nµs", ">best\nµs", ">tried", "configuration"
    )
    for result in results:
        shape = result.shape
        rows.add_row(
            f"{shape.k}, {shape.n}, {shape.experts}",
            f"{shape.codes} / {shape.group_size}, {shape.scales}",
            str(result.tokens),
            str(result.rows),
            f"{result.default_seconds * 1e6:.1f}",
            f"{result.best_seconds * 1e6:.1f}",
            str(result.tried),
            "the default" if result.is_default else escape(result.best.words),
        )
    screen.print(rows)
    screen.print()
    for result in results:
        for choice, reason in result.refused:
            where = f"{result.shape.k}, {result.shape.n}, {result.tokens} tokens"
            screen.print(f"[yellow]Refused[/yellow] for {where}: {escape(choice.words)}: {escape(reason)}")
    screen.print(escape(f"Stored in {tuner.file}. Backends that are made from now on use it."))


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

"""Run every MoE layer of a checkpoint over recorded activations: is it right, and how fast is it?

The object that ``--json`` prints has these keys, and each of ``layers`` the fields of
`marlin_cy.commands.measure.LayerResult`:

``version``, ``checkpoint`` (its path), ``backend``, ``isa``, ``threads``, ``compute_dtype``,
``activations`` (what was fed, in words), ``load_seconds``,
``read_bandwidth_bytes_per_second``, ``error_bound``, ``layers``, ``failures`` (sentences), ``ok``.
"""

import argparse
import dataclasses
import sys
import time
from importlib.resources import as_file, files
from pathlib import Path

from rich.markup import escape

from marlin_cy import __version__, get_backend, open_checkpoint
from marlin_cy.backends import BACKENDS
from marlin_cy.commands.activations import RandomActivations, RecordedActivations
from marlin_cy.commands.measure import ERROR_BOUNDS, measure_layer
from marlin_cy.commands.output import LoadProgress, console, gigabytes, print_json, table
from marlin_cy.errors import MarlinError

__all__ = ["BUILT_IN", "HELP", "add_arguments", "execute"]

HELP = "run a checkpoint's MoE layers: errors, times, bandwidth"
BUILT_IN = "data/tiny-qwen3-moe-gptq-int4"
ACTIVATIONS_FILE = "activations.safetensors"


def add_arguments(parser):
    """Declare the command's arguments."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint's folder (default: a small built-in model)",
    )
    parser.add_argument("--backend", default="cpu", choices=sorted(BACKENDS), help="default: cpu")
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: one for each core")
    parser.add_argument("--compute-dtype", default="int16", choices=sorted(ERROR_BOUNDS), help="default: int16")
    parser.add_argument(
        "--activations", type=Path, metavar="FILE", help=f"default: {ACTIVATIONS_FILE} in the folder, else random ones"
    )
    parser.add_argument(
        "--tokens", type=_positive, metavar="N", help="the first N tokens alone (default: all; 128 random)"
    )
    parser.add_argument("--repeat", type=_positive, metavar="N", help="timed passes a layer (default: 0.2 seconds)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def execute(arguments):
    """Run the command; returns the exit code."""
    if arguments.checkpoint is not None:
        return _execute_on(arguments.checkpoint, arguments)
    with as_file(files("marlin_cy") / BUILT_IN) as folder:
        return _execute_on(folder, arguments)


def _execute_on(folder, arguments):
    report, results = _measure(folder, arguments)
    if arguments.json:
        print_json(report | {"layers": [dataclasses.asdict(result) for result in results]})
    else:
        _print_table(report, results)
    sys.stdout.flush()
    for failure in report["failures"]:
        print(f"marlin-cy: error: {failure}", file=sys.stderr)
    return 0 if report["ok"] else 1


def _measure(folder, arguments):
    """The report without its layers, and the layers' results."""
    backend = get_backend(arguments.backend)
    # Only here: where the extension modules are missing, get_backend says so better than an import.
    from marlin_cy.cpu._bandwidth import read_bandwidth

    context = _new_context(backend, arguments)
    recorded = arguments.activations or folder / ACTIVATIONS_FILE
    results = []
    load_seconds = 0.0
    with LoadProgress() as progress, open_checkpoint(folder, backend=backend, progress=progress) as checkpoint:
        if arguments.activations or recorded.exists():
            activations = RecordedActivations(recorded, arguments.tokens)
        else:
            activations = RandomActivations(arguments.tokens)
        bandwidth = read_bandwidth(context.num_threads)
        progress.parts = len(checkpoint.moe_layers)
        for position, index in enumerate(checkpoint.moe_layers):
            progress.finished = position
            start = time.perf_counter()
            layer = checkpoint.moe_layer(index)
            load_seconds += time.perf_counter() - start
            fed = activations.layer(index, layer.hidden_size, layer.num_experts)
            results.append(
                measure_layer(context, index, layer, fed, repeats=arguments.repeat, read_bandwidth=bandwidth)
            )
    bound = ERROR_BOUNDS[arguments.compute_dtype]
    failures = [failure for failure in (result.failure(bound) for result in results) if failure]
    if not results:
        failures.append("the checkpoint has no MoE layers")
    return {
        "version": __version__,
        "checkpoint": str(folder),
        "backend": backend.name,
        "isa": context.isa,
        "threads": context.num_threads,
        "compute_dtype": arguments.compute_dtype,
        "activations": activations.description,
        "load_seconds": load_seconds,
        "read_bandwidth_bytes_per_second": bandwidth,
        "error_bound": bound,
        "failures": failures,
        "ok": not failures,
    }, results


def _new_context(backend, arguments):
    try:
        return backend.new_context(num_threads=arguments.threads, compute_dtype=arguments.compute_dtype)
    except ValueError as error:
        # The arguments were checked before: what is left is the environment (MARLIN_CY_ISA).
        raise MarlinError(str(error)) from error


def _print_table(report, results):
    screen = console()
    screen.print(
        f"[bold]{escape(Path(report['checkpoint']).name)}[/bold]: {len(results)} MoE layers on {report['backend']} "
        f"({report['isa']}, {report['threads']} threads, {report['compute_dtype']}), {escape(report['activations'])}"
    )
    screen.print()
    rows = table(
        ">layer",
        "experts ×\nhidden → inner",
        ">top-k",
        ">tokens",
        ">relative\nerror",
        ">time\nms",
        ">weights\nGB/s",
        ">share of\nread GB/s",
    )
    for result in results:
        error = "—" if result.relative_error is None else f"{result.relative_error:.1e}"
        failed = result.failure(report["error_bound"]) is not None
        rows.add_row(
            str(result.layer),
            f"{result.num_experts} × {result.hidden_size} → {result.intermediate_size}",
            str(result.top_k),
            str(result.tokens),
            ("not finite" if not result.finite else error),
            f"{result.seconds * 1e3:.3f}",
            f"{result.weight_bytes_per_second / 1e9:#.3g}",
            f"{result.read_share:.0%}",
            style="red" if failed else None,
        )
    screen.print(rows)
    screen.print()
    screen.print(
        f"Loaded in {report['load_seconds']:.2f} s. Error bound {report['error_bound']:g}: "
        + ("[green]all layers within it.[/green]" if report["ok"] else "[red]exceeded.[/red]")
    )
    screen.print("Weights: packed bytes of the experts that were hit, over the time.")
    screen.print(
        f"Memory reads at {gigabytes(report['read_bandwidth_bytes_per_second'])} with {report['threads']} threads; "
        "a share above 100% means that weights came from cache."
    )
    screen.print("With many tokens an expert, arithmetic is the limit and not memory: see --tokens 1.")


def _positive(text):
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return value

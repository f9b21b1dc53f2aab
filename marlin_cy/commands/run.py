"""Run every MoE layer of a checkpoint over recorded activations, and report errors and speed.

The object that ``--json`` prints has these keys:

``version``, ``checkpoint`` (its path), ``backend``, ``activations`` (a description of their source),
``load_seconds``, ``without_shared_expert`` (layers that ran without their shared expert, which is not quantised),
``error_bound``, ``layers``, ``failures`` (sentences), ``ok``. The backend adds more keys:

on the CPU ``isa``, ``threads``, ``compute_dtype``, ``read_bandwidth_bytes_per_second``; each of ``layers`` has the
fields of `marlin_cy.cpu.layer_measurement.CpuLayerResult`;
on OpenCL ``device``, ``platform``, ``driver``, ``tier``, ``copy_bandwidth_bytes_per_second``; each of ``layers`` has
the fields of `marlin_cy.opencl.layer_measurement.OpenClLayerResult`;
on a backend without a measurement of its own ``device`` (in words); each of ``layers`` has the fields of
`marlin_cy.commands.measure.LayerResult`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape

from marlin_cy import __version__, open_checkpoint
from marlin_cy.commands.activations import RandomActivations, RecordedActivations
from marlin_cy.commands.measure import LayerMeasurement, LayerResult
from marlin_cy.commands.options import (
    BUILT_IN,
    add_backend_options,
    add_checkpoint_argument,
    argument_errors,
    checkpoint_folder,
    open_backend,
    positive_argument,
)
from marlin_cy.commands.output import LoadProgress, console, print_json, runs, table

__all__ = ["BUILT_IN", "HELP", "add_arguments", "execute"]

HELP = "run a checkpoint's MoE layers: errors, times, bandwidth"
ACTIVATIONS_FILE = "recorded/activations.safetensors"
"""In a subfolder, because other programs load every ``*.safetensors`` in the folder itself."""


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Declare the command's arguments; ``argv`` is the command line."""
    add_checkpoint_argument(parser)
    add_backend_options(parser, argv)
    parser.add_argument(
        "--activations", type=Path, metavar="FILE", help=f"default: {ACTIVATIONS_FILE} in the folder, else random ones"
    )
    parser.add_argument(
        "--tokens", type=positive_argument, metavar="N", help="only the first N tokens (default: all; 128 random)"
    )
    parser.add_argument(
        "--repeat", type=positive_argument, metavar="N", help="timed passes of a layer (default: 0.2 seconds)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    with checkpoint_folder(arguments) as folder:
        return _execute_on(folder, arguments)


def _execute_on(folder: Path, arguments: argparse.Namespace) -> int:
    backend = open_backend(arguments.backend, arguments)
    with argument_errors():
        measurement = backend.layer_measurement(arguments)
    report, results = _measure(measurement, folder, arguments)
    if arguments.json:
        print_json(report | {"layers": [dataclasses.asdict(result) for result in results]})
    else:
        _print_table(measurement, report, results)
    sys.stdout.flush()
    for failure in report["failures"]:
        print(f"marlin-cy: error: {failure}", file=sys.stderr)
    return 0 if report["ok"] else 1


def _measure(
    measurement: LayerMeasurement, folder: Path, arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[LayerResult]]:
    """The report without ``layers``, and the results of the layers."""
    recorded = arguments.activations or folder / ACTIVATIONS_FILE
    results: list[LayerResult] = []
    bounds: list[float] = []
    alone: list[int] = []
    activations: RecordedActivations | RandomActivations
    load_seconds = 0.0
    backend = measurement.backend
    with LoadProgress() as progress, open_checkpoint(folder, backend=backend, progress=progress) as checkpoint:
        if arguments.activations or recorded.exists():
            activations = RecordedActivations(recorded, arguments.tokens)
        else:
            activations = RandomActivations(arguments.tokens)
        measurement.prepare()
        progress.parts = len(checkpoint.moe_layers)
        for position, index in enumerate(checkpoint.moe_layers):
            progress.finished = position
            start = time.perf_counter()
            whole = checkpoint.has_packed_shared_expert(index)
            layer = checkpoint.moe_layer(index, shared_expert=whole)
            load_seconds += time.perf_counter() - start
            fed = activations.layer(index, layer.hidden_size, layer.num_experts)
            if not whole:
                # The recorded output is that of the whole layer.
                alone.append(index)
                fed = fed._replace(moe_output=None)
            results.append(measurement.measure(index, layer, fed, arguments.repeat))
            bounds.append(measurement.error_bound(fed.hidden_states.dtype))
    checked = [result.failure(bound) for result, bound in zip(results, bounds, strict=True)]
    failures = [failure for failure in checked if failure]
    if not results:
        failures.append("the checkpoint has no MoE layers")
    return {
        "version": __version__,
        "checkpoint": str(folder),
        "backend": backend.name,
        **measurement.about(),
        "activations": activations.description,
        "load_seconds": load_seconds,
        "without_shared_expert": alone,
        "error_bound": max(bounds, default=measurement.error_bound(np.dtype(np.float32))),
        "failures": failures,
        "ok": not failures,
    }, results


def _print_table(measurement: LayerMeasurement, report: dict[str, Any], results: list[LayerResult]) -> None:
    screen = console()
    screen.print(
        f"[bold]{escape(Path(report['checkpoint']).name)}[/bold]: {len(results)} MoE layers on {report['backend']} "
        f"({escape(measurement.description())}), {escape(report['activations'])}"
    )
    screen.print()
    rows = table(">layer", "experts ×\nhidden → inner", ">top-k", ">tokens", ">relative\nerror", *measurement.columns)
    failed = {failure.split(":")[0] for failure in report["failures"]}
    for result in results:
        error = "—" if result.relative_error is None else f"{result.relative_error:.1e}"
        rows.add_row(
            str(result.layer),
            f"{result.num_experts} × {result.hidden_size} → {result.intermediate_size}",
            str(result.top_k),
            str(result.tokens),
            ("not finite" if not result.finite else error),
            *measurement.cells(result),
            style="red" if f"layer {result.layer}" in failed else None,
        )
    screen.print(rows)
    screen.print()
    screen.print(
        f"Loaded in {report['load_seconds']:.2f} s. Error bound {report['error_bound']:g}: "
        + ("[green]all layers within it.[/green]" if report["ok"] else "[red]exceeded.[/red]")
    )
    if report["without_shared_expert"]:
        screen.print(
            "[yellow]Routed experts only[/yellow], as the shared expert is not quantised: layers "
            + runs(report["without_shared_expert"])
        )
    screen.print("Weights: packed bytes of the experts that were hit, divided by the time.")
    for note in measurement.notes():
        screen.print(note)
    screen.print("With many tokens for each expert, arithmetic is the limit, not memory: try --tokens 1.")

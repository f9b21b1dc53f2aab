"""Run every MoE layer of a checkpoint over recorded activations: is it right, and how fast is it?

The object that ``--json`` prints has these keys:

``version``, ``checkpoint`` (its path), ``backend``, ``activations`` (what was fed, in words), ``load_seconds``,
``error_bound``, ``layers``, ``failures`` (sentences), ``ok``;
on the CPU ``isa``, ``threads``, ``compute_dtype``, ``read_bandwidth_bytes_per_second``, and each of ``layers`` has
the fields of `marlin_cy.commands.measure.CpuLayerResult`;
on OpenCL ``device``, ``platform``, ``driver``, ``tier``, ``copy_bandwidth_bytes_per_second``, and each of ``layers``
the fields of `marlin_cy.commands.run_opencl.OpenClLayerResult`.
"""

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
from rich.markup import escape

from marlin_cy import __version__, get_backend, open_checkpoint
from marlin_cy.commands.activations import RandomActivations, RecordedActivations
from marlin_cy.commands.measure import ERROR_BOUNDS, measure_layer
from marlin_cy.commands.opencl_options import open_opencl
from marlin_cy.commands.options import (
    BUILT_IN,
    add_backend_options,
    add_checkpoint_argument,
    check_backend_options,
    checkpoint_folder,
    positive,
)
from marlin_cy.commands.output import LoadProgress, console, gigabytes, print_json, table
from marlin_cy.errors import MarlinError

__all__ = ["BUILT_IN", "HELP", "add_arguments", "execute"]

HELP = "run a checkpoint's MoE layers: errors, times, bandwidth"
ACTIVATIONS_FILE = "activations.safetensors"


def add_arguments(parser):
    """Declare the command's arguments."""
    add_checkpoint_argument(parser)
    add_backend_options(parser)
    parser.add_argument(
        "--activations", type=Path, metavar="FILE", help=f"default: {ACTIVATIONS_FILE} in the folder, else random ones"
    )
    parser.add_argument(
        "--tokens", type=positive, metavar="N", help="the first N tokens alone (default: all; 128 random)"
    )
    parser.add_argument("--repeat", type=positive, metavar="N", help="timed passes a layer (default: 0.2 seconds)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(refuse=parser.error)


def execute(arguments):
    """Run the command; returns the exit code."""
    check_backend_options(arguments)
    with checkpoint_folder(arguments) as folder:
        return _execute_on(folder, arguments)


def _execute_on(folder, arguments):
    place = _place(arguments)
    report, results = _measure(place, folder, arguments)
    if arguments.json:
        print_json(report | {"layers": [dataclasses.asdict(result) for result in results]})
    else:
        _print_table(place, report, results)
    sys.stdout.flush()
    for failure in report["failures"]:
        print(f"marlin-cy: error: {failure}", file=sys.stderr)
    return 0 if report["ok"] else 1


def _measure(place, folder, arguments):
    """The report without its layers, and the layers' results."""
    recorded = arguments.activations or folder / ACTIVATIONS_FILE
    results, bounds = [], []
    load_seconds = 0.0
    with LoadProgress() as progress, open_checkpoint(folder, backend=place.backend, progress=progress) as checkpoint:
        if arguments.activations or recorded.exists():
            activations = RecordedActivations(recorded, arguments.tokens)
        else:
            activations = RandomActivations(arguments.tokens)
        place.measure_bandwidth()
        progress.parts = len(checkpoint.moe_layers)
        for position, index in enumerate(checkpoint.moe_layers):
            progress.finished = position
            start = time.perf_counter()
            layer = checkpoint.moe_layer(index)
            load_seconds += time.perf_counter() - start
            fed = activations.layer(index, layer.hidden_size, layer.num_experts)
            results.append(place.measure(index, layer, fed, arguments.repeat))
            bounds.append(place.error_bound(fed.hidden_states.dtype))
    failures = [result.failure(bound) for result, bound in zip(results, bounds, strict=True)]
    failures = [failure for failure in failures if failure]
    if not results:
        failures.append("the checkpoint has no MoE layers")
    return {
        "version": __version__,
        "checkpoint": str(folder),
        "backend": place.backend.name,
        **place.about(),
        "activations": activations.description,
        "load_seconds": load_seconds,
        "error_bound": max(bounds, default=place.error_bound(np.dtype(np.float32))),
        "failures": failures,
        "ok": not failures,
    }, results


def _place(arguments):
    """What runs the layers and knows how to time them: a :class:`CpuPlace`, or OpenCL's likeness of it."""
    if arguments.backend == "opencl":
        backend = open_opencl(arguments)
        # Only here: it needs PyOpenCL.
        from marlin_cy.commands.run_opencl import OpenClPlace

        return OpenClPlace(backend)
    return CpuPlace(arguments.threads, arguments.compute_dtype or "int16")


class CpuPlace:
    """The CPU, as the command sees it.

    Attributes
    ----------
    backend : Backend
    columns : tuple of str
        Of the table, beside those that all backends have.
    """

    columns = (">time\nms", ">weights\nGB/s", ">share of\nread GB/s")

    def __init__(self, threads, compute_dtype):
        self.backend = get_backend("cpu")
        self._compute_dtype, self._bandwidth = compute_dtype, None
        try:
            self._context = self.backend.new_context(num_threads=threads, compute_dtype=compute_dtype)
        except ValueError as error:
            # The arguments were checked before: what is left is the environment (MARLIN_CY_ISA).
            raise MarlinError(str(error)) from error

    def measure_bandwidth(self):
        """Find out what the times are held against."""
        # Only here: where the extension modules are missing, get_backend says so better than an import.
        from marlin_cy.cpu.measure._bandwidth import read_bandwidth

        self._bandwidth = read_bandwidth(self._context.num_threads)

    def measure(self, index, layer, fed, repeats):
        """The :class:`LayerResult` of a layer."""
        return measure_layer(self._context, index, layer, fed, repeats=repeats, read_bandwidth=self._bandwidth)

    def error_bound(self, dtype):
        """What a layer's relative error may be, with activations of this dtype."""
        return ERROR_BOUNDS[self._compute_dtype]

    def about(self):
        """The keys of the report that other backends don't have."""
        return {
            "isa": self._context.isa,
            "threads": self._context.num_threads,
            "compute_dtype": self._compute_dtype,
            "read_bandwidth_bytes_per_second": self._bandwidth,
        }

    def description(self):
        """The same in a few words."""
        return f"{self._context.isa}, {self._context.num_threads} threads, {self._compute_dtype}"

    def cells(self, result):
        """A result's cells for :attr:`columns`."""
        return (
            f"{result.seconds * 1e3:.3f}",
            f"{result.weight_bytes_per_second / 1e9:#.3g}",
            f"{result.read_share:.0%}",
        )

    def notes(self):
        """Lines below the table."""
        return [
            f"Memory reads at {gigabytes(self._bandwidth)} with {self._context.num_threads} threads; "
            "a share above 100% means that weights came from cache."
        ]


def _print_table(place, report, results):
    screen = console()
    screen.print(
        f"[bold]{escape(Path(report['checkpoint']).name)}[/bold]: {len(results)} MoE layers on {report['backend']} "
        f"({escape(place.description())}), {escape(report['activations'])}"
    )
    screen.print()
    rows = table(">layer", "experts ×\nhidden → inner", ">top-k", ">tokens", ">relative\nerror", *place.columns)
    failed = {failure.split(":")[0] for failure in report["failures"]}
    for result in results:
        error = "—" if result.relative_error is None else f"{result.relative_error:.1e}"
        rows.add_row(
            str(result.layer),
            f"{result.num_experts} × {result.hidden_size} → {result.intermediate_size}",
            str(result.top_k),
            str(result.tokens),
            ("not finite" if not result.finite else error),
            *place.cells(result),
            style="red" if f"layer {result.layer}" in failed else None,
        )
    screen.print(rows)
    screen.print()
    screen.print(
        f"Loaded in {report['load_seconds']:.2f} s. Error bound {report['error_bound']:g}: "
        + ("[green]all layers within it.[/green]" if report["ok"] else "[red]exceeded.[/red]")
    )
    screen.print("Weights: packed bytes of the experts that were hit, over the time.")
    for note in place.notes():
        screen.print(note)
    screen.print("With many tokens an expert, arithmetic is the limit and not memory: see --tokens 1.")

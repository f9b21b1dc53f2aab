"""The tables of the claims about OpenCL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.common.results import verdict
from marlin_cy.commands.output import table

__all__ = ["brief", "print_claims"]

Row = Mapping[str, Any]


def print_claims(screen: Console, results: Mapping[str, Sequence[Row]]) -> None:
    """Print a table for each of ``gemm``, ``layer``, ``host`` and ``compile`` that has rows."""
    if results["gemm"]:
        screen.print("\nProducts: kernel time by OpenCL events, median of the launches")
        screen.print(_gemm_table(results["gemm"]))
    if results["layer"]:
        screen.print("\nWhole layer: from the start of the first event to the end of the last one, and its parts, µs")
        screen.print(_layer_table(results["layer"]))
    if results["host"]:
        screen.print("\nHost time of a warm gemm_phase_vllm call")
        screen.print(_host_table(results["host"]))
    if results["compile"]:
        screen.print("\nFirst call of a process")
        screen.print(_compile_table(results["compile"]))


def brief(cell: Row) -> str:
    """The line that is printed when a product has been measured."""
    return f"{cell['shape']}, {cell['tokens']} tokens, {cell['tier']}: {cell['us']['median']:.1f} µs"


def _gemm_table(cells: Sequence[Row]) -> Table:
    result = table(
        "K, N, experts",
        "tier",
        ">tokens",
        ">block",
        ">µs",
        ">p10–p90",
        ">span",
        ">CUDA\nMarlin",
        ">ratio",
        ">bar",
        ">× best\ntier",
        ">weights\nTB/s",
        ">TFLOP/s",
        ">relative\nerror",
        "verdict",
    )
    for cell in cells:
        missed = [name for name, passed in cell["checks"].items() if not passed]
        us = cell["us"]
        result.add_row(
            cell["shape"],
            cell["tier"],
            str(cell["tokens"]),
            str(cell["block_size"]),
            f"{us['median']:.1f}",
            f"{us['p10']:.1f}–{us['p90']:.1f}",
            f"{cell['span_us']:.1f}",
            _or_dash(cell["cuda_marlin_us"], "g"),
            _or_dash(cell["ratio"], ".2f"),
            _or_dash(cell["bar"], "g"),
            _or_dash(cell["ratio_to_best"], ".2f"),
            f"{cell['weight_bytes_per_second'] / 1e12:.3g}",
            f"{cell['flops'] / 1e12:.3g}",
            _or_dash(cell["error"], ".1e"),
            verdict(not missed) + (f" ({', '.join(missed)})" if missed else ""),
        )
    return result


def _layer_table(layers: Sequence[Row]) -> Table:
    labels = list(dict.fromkeys(label for one in layers for label in one["labels_us"]))
    result = table(
        ">tokens",
        ">total",
        ">with the\nhost's gaps",
        ">products",
        ">ratio",
        ">bar",
        *(f">{label.replace(': ', ':' + chr(10))}" for label in labels),
        "verdict",
    )
    for one in layers:
        result.add_row(
            str(one["tokens"]),
            f"{one['us']:.1f}",
            f"{one['host_bound_us']:.1f}",
            f"{one['products_us']:.1f}",
            f"{one['ratio']:.2f}",
            _or_dash(one["bar"], "g"),
            *(_or_dash(one["labels_us"].get(label), ".1f") for label in labels),
            verdict(one["passed"]),
        )
    return result


def _host_table(rows: Sequence[Row]) -> Table:
    result = table("tier", ">tokens", ">µs", ">least", ">bar", "verdict")
    for one in rows:
        figures = (f"{one[key]:.1f}" for key in ("us", "least_us", "bar"))
        result.add_row(one["tier"], str(one["tokens"]), *figures, verdict(one["passed"]))
    return result


def _compile_table(rows: Sequence[Row]) -> Table:
    names = ("check of the tier", "first call", "second call")
    result = table("", *(f">{name}, s" for name in names), ">compiled", ">loaded")
    for one in rows:
        seconds = (f"{one[name]:.4f}" for name in names)
        result.add_row(one["state"], *seconds, str(one["compiled"]), str(one["loaded"]))
    return result


def _or_dash(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)

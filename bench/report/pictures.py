"""``python -m bench pictures``: pictures of a saved comparison, each as PNG and SVG. Needs matplotlib.

``decoder_pictures.py`` draws what ``python -m bench decoder`` saved. Colours are those of Okabe and Ito, one per
library. The dash pattern shows the type in which activations are computed. Names are at the ends of lines.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import decoder_pictures
from bench.report.bars import RIVALS, SAME_ERROR, fastest
from bench.report.card import FAINT, INK, LABEL_POINTS, card, card_style, count_axis, label_ends, save_figure
from bench.report.tables import read_document

__all__ = ["PICTURES", "add_options", "draw", "run"]

OURS = {"int8": "#d55e00", "int16": "#0072b2"}
LIBRARIES = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000", "#8c6d31", "#6a3d9a")
MARKERS = "osD^vPX<>*hd"
DASHES = {"int8": "-", "bf16": (0, (5, 2)), "float32": (0, (1, 1.6)), "int16": "-"}
PANELS = {"int8": "8-bit activations", "int16": "16-bit activations and wider"}
PARTS = {"projection": "one projection", "routed": "routed product", "layer": "whole layer"}
BAR_CASES = (1, 4, 16, 64, 256, 1024)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "document", type=Path, metavar="FILE", help="a saved comparison, of libraries or of whole models"
    )
    parser.add_argument("--into", type=Path, default=Path(), metavar="FOLDER", help="default: the current folder")


def run(arguments: argparse.Namespace) -> int:
    """Draw all pictures; returns the exit code."""
    document = read_document(arguments.document, ("compare", "decoder"))
    make = decoder_pictures.draw if document["mode"] == "decoder" else draw
    for path in make(document, arguments.into):
        print(path)
    return 0


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every picture for which the document has cases; returns the paths of the files.

    Raises
    ------
    ValueError
        matplotlib is not installed, or there is nothing to draw.
    """
    if not document["cases"]:
        raise ValueError("the document has no cases: nothing was measured")
    paths: list[Path] = []
    with card_style():
        for name, (part, make) in PICTURES.items():
            if part is None or any(case["part"] == part for case in document["cases"]):
                paths += save_figure(make(document), folder, name)
    return paths


# ---------------------------------------------------------------------------------------------
# The pictures


def roofline(document: Mapping[str, Any]) -> Any:
    """Speed over operations per byte of weights, under the limits of memory bandwidth and of the dot products' peak."""
    figure, panels = _panels(document, "One projection under the machine's roofline", top=1.05)
    read = statistics.median(pair["read_bytes_per_second"] for pair in document["pairs"].values() if pair)
    peaks = [pair["peak_ops_per_second"] for pair in document["pairs"].values() if pair.get("peak_ops_per_second")]
    for ours, axes in panels.items():
        intensity = {
            case["m"]: case["flop"] / case["weight_bytes"] for case in document["cases"] if case["part"] == "projection"
        }
        x = np.geomspace(min(intensity.values()) / 1.5, max(intensity.values()) * 1.5, 200)
        roof, words = read * x, f"{read / 1e9:.0f} GB/s"
        if peaks:
            peak = statistics.median(peaks) / (2 if ours == "int16" else 1)
            roof = np.minimum(roof, peak)
            words += f"; 8-bit dot products{' ÷ 2' * (ours == 'int16')}: {peak / 1e9:.0f} GOP/s"
        axes.set(xscale="log", yscale="log", xlabel="operations per byte of 4-bit weights")
        axes.plot(x, roof / 1e9, color=INK, linewidth=1.2, zorder=1)
        axes.text(x[-1], 1.08 * roof[-1] / 1e9, words, ha="right", va="bottom", fontsize=8, color="#57606a")
        lines = {
            name: [(intensity[m], flop / seconds / 1e9) for m, flop, seconds in points]
            for name, points in _lines(document, "projection", ours).items()
        }
        _draw_lines(axes, document, "projection", lines, ours)
        rows = axes.secondary_xaxis("top", functions=(lambda v: v * 1.0, lambda v: v * 1.0))
        rows.set_xticks(list(intensity.values()), [str(m) for m in intensity])
        rows.minorticks_off()
        rows.tick_params(length=0, labelcolor=FAINT, labelsize=8)
        rows.set_xlabel("rows", color=FAINT, fontsize=8)
        rows.spines["top"].set_visible(False)
    panels["int8"].set_ylabel("GOP/s: 2 · rows · K · N ÷ time")
    return figure


def rows(document: Mapping[str, Any]) -> Any:
    """Speed over the rows of one projection."""
    figure, panels = _panels(document, "One projection: speed over rows")
    for ours, axes in panels.items():
        lines = {
            name: [(m, flop / seconds / 1e9) for m, flop, seconds in points]
            for name, points in _lines(document, "projection", ours).items()
        }
        axes.set(xscale="log", xlabel="rows")
        count_axis(axes, [m for points in lines.values() for m, _ in points])
        _draw_lines(axes, document, "projection", lines, ours)
    panels["int8"].set_ylabel("GOP/s: 2 · rows · K · N ÷ time")
    return figure


def layer(document: Mapping[str, Any]) -> Any:
    """Time of a whole layer over tokens."""
    model = document["model"]
    title = f"A whole layer, {model['num_experts']} experts, top {model['top_k']}: time over tokens"
    figure, panels = _panels(document, title)
    for ours, axes in panels.items():
        lines = {
            name: [(m, seconds * 1e3) for m, _, seconds in points]
            for name, points in _lines(document, "layer", ours).items()
        }
        axes.set(xscale="log", yscale="log", xlabel="tokens")
        count_axis(axes, [m for points in lines.values() for m, _ in points])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _draw_lines(axes, document, "layer", lines, ours)
    panels["int8"].set_ylabel("ms per layer; lower is faster")
    return figure


def speedup(document: Mapping[str, Any]) -> Any:
    """The fastest peer's time over this library's, case by case."""
    cases = [
        (part, m)
        for part in PARTS
        for m in sorted({case["m"] for case in document["cases"] if case["part"] == part})
        if m in BAR_CASES
    ]
    figure, panels = _panels(
        document,
        "How many times as fast as the fastest peer",
        height=2.0 + 0.25 * len(cases),
        left=0.15,
        right=0.825,
        wspace=0.66,
    )
    for ours, axes in panels.items():
        widest = 1.0
        for place, (part, m) in enumerate(cases):
            best = fastest(document, part, ours, m)
            if best is None:
                continue
            peer, ratio = best
            widest = max(widest, ratio["median"])
            axes.barh(place, ratio["median"], height=0.66, color=OURS[ours], zorder=2)
            axes.plot([ratio["p10"], ratio["p90"]], [place, place], color=INK, linewidth=1, zorder=3)
            axes.annotate(
                f"{ratio['median']:.2f} × {peer}",
                (1, place),
                xycoords=axes.get_yaxis_transform(),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=LABEL_POINTS,
            )
        axes.axvline(1, color=FAINT, linewidth=1, zorder=1)
        axes.set(xlim=(0, 1.08 * widest), xlabel="fastest peer's time ÷ marlin_cy's; thin line: p10–p90")
        axes.set_yticks(range(len(cases)), [f"{PARTS[part]}, {m}" for part, m in cases])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", zorder=0)
    panels["int16"].invert_yaxis()  # of both panels: they share it
    return figure


PICTURES = {
    "roofline": ("projection", roofline),
    "rows": ("projection", rows),
    "layer": ("layer", layer),
    "speedup": (None, speedup),
}
"""By file name: the part whose cases the picture needs (None: any), and the function that draws it."""


# ---------------------------------------------------------------------------------------------
# Parts of pictures


def _panels(
    document: Mapping[str, Any],
    title: str,
    height: float = 4.7,
    left: float = 0.075,
    right: float = 0.845,
    wspace: float = 0.5,
    top: float = 0.75,
) -> tuple[Any, dict[str, Any]]:
    """A card with a title, a caption and two panels, by compute dtype of this library."""
    figure, axes = card(title, _caption(document), height, left=left, right=right, wspace=wspace, top=top)
    panels = dict(zip(PANELS, axes, strict=True))
    for ours, panel in panels.items():
        panel.set_title(PANELS[ours], loc="left", color=OURS[ours], weight="bold", pad=8)
    return figure, panels


def _caption(document: Mapping[str, Any]) -> str:
    machine, model = document["machine"], document["model"]
    versions = {side["library"]: side["version"] for side in document["sides"].values() if side["version"]}
    first = (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; "
        f"{model['hidden']} → 2·{model['intermediate']}, group size {model['group_size']}; medians; {document['date']}"
    )
    return first + "\n" + ", ".join(f"{library} {version}" for library, version in versions.items())


def _lines(document: Mapping[str, Any], part: str, ours: str) -> dict[str, list[tuple[int, float, float]]]:
    """``(m, flop, seconds)`` of the sides of a panel, sorted by m; this library's time is the median over all pairs."""
    panel = ("int8",) if ours == "int8" else RIVALS["int16"]
    peers = [name for name, side in document["sides"].items() if name not in OURS and side["accuracy"] in panel]
    lines = {}
    for name in (*peers, ours):
        found: dict[int, tuple[float, list[float]]] = {}
        for case in document["cases"]:
            if case["part"] == part and name in case["us"] and name in (ours, case["peer"]):
                found.setdefault(case["m"], (case["flop"], []))[1].append(case["us"][name]["median"])
        if found:
            lines[name] = [(m, flop, statistics.median(us) * 1e-6) for m, (flop, us) in sorted(found.items())]
    return lines


def _draw_lines(
    axes: Any, document: Mapping[str, Any], part: str, lines: Mapping[str, Sequence[tuple[float, float]]], ours: str
) -> None:
    """Draw the line of every side, with its name at the end."""
    libraries = list(dict.fromkeys(side["library"] for name, side in document["sides"].items() if name not in OURS))
    labels = []
    for number, (name, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        side, own = document["sides"][name], name == ours
        colour = OURS[ours] if own else LIBRARIES[libraries.index(side["library"]) % len(LIBRARIES)]
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=DASHES[side["accuracy"]],
            linewidth=2.6 if own else 1.3,
            marker="o" if own else MARKERS[1 + number % (len(MARKERS) - 1)],
            markersize=5.5 if own else 4,
            zorder=5 if own else 3,
        )
        text = f"marlin_cy {name}" if own else name
        if side["accuracy"] == ours and side["errors"][part] > SAME_ERROR * document["sides"][ours]["errors"][part]:
            text += f", error {100 * side['errors'][part]:.0f}%"
        labels.append((x[-1], y[-1], text, colour, own))
    axes.grid(which="major", zorder=0)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    label_ends(axes, labels)

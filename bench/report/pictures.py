"""``python -m bench pictures``: pictures of a saved comparison, each as PNG and SVG. Needs matplotlib.

Each picture is drawn on a light card, so that it can be read on light and on dark pages. Colours are those of Okabe and
Ito, one per library. The dash pattern shows the type in which activations are computed. Names are at the ends of lines.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.report.bars import RIVALS, SAME_ERROR, fastest
from bench.report.tables import read_document

__all__ = ["PICTURES", "add_options", "draw", "run"]

CARD, EDGE, INK, FAINT = "#fcfcfa", "#c9d1d9", "#24292f", "#8b949e"
OURS = {"int8": "#d55e00", "int16": "#0072b2"}
LIBRARIES = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000", "#8c6d31", "#6a3d9a")
MARKERS = "osD^vPX<>*hd"
DASHES = {"int8": "-", "bf16": (0, (5, 2)), "float32": (0, (1, 1.6)), "int16": "-"}
PANELS = {"int8": "8-bit activations", "int16": "16-bit activations and wider"}
PARTS = {"projection": "one projection", "routed": "routed product", "layer": "whole layer"}
BAR_CASES = (1, 4, 16, 64, 256, 1024)
LABEL_POINTS = 8.5
DOTS_PER_INCH = 150


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("document", type=Path, metavar="FILE", help="a saved comparison")
    parser.add_argument("--into", type=Path, default=Path(), metavar="FOLDER", help="default: the current folder")


def run(arguments: argparse.Namespace) -> int:
    """Draw all pictures; returns the exit code."""
    for path in draw(read_document(arguments.document), arguments.into):
        print(path)
    return 0


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every picture for which the document has cases; returns the paths of the files.

    Raises
    ------
    ValueError
        matplotlib is not installed, or there is nothing to draw.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"matplotlib cannot be imported ({error}): pip install matplotlib") from error
    if not document["cases"]:
        raise ValueError("the document has no cases: nothing was measured")
    folder.mkdir(parents=True, exist_ok=True)
    style = {
        "font.size": 9,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.facecolor": CARD,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "grid.color": "#e4e7eb",
        "svg.hashsalt": "bench",  # equal pictures become equal files
    }
    paths: list[Path] = []
    with matplotlib.rc_context(style):
        for name, (part, make) in PICTURES.items():
            if part is None or any(case["part"] == part for case in document["cases"]):
                paths += _save(make(document), folder, name)
    return paths


def _save(figure: Any, folder: Path, name: str) -> list[Path]:
    import matplotlib.pyplot as plt

    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata=metadata)
    plt.close(figure)
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
        _count_axis(axes, lines)
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
        _count_axis(axes, lines)
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
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    width = 10.5
    figure, axes = plt.subplots(1, 2, figsize=(width, height), sharey=True)
    figure.patch.set_alpha(0)
    inset = 0.02
    card = FancyBboxPatch(
        (inset, inset),
        width - 2 * inset,
        height - 2 * inset,
        boxstyle="round,pad=0,rounding_size=0.12",
        facecolor=CARD,
        edgecolor=EDGE,
        transform=figure.dpi_scale_trans,
        zorder=-1,
    )
    figure.add_artist(card)
    figure.text(0.3 / width, 1 - 0.3 / height, title, fontsize=12, weight="bold", va="center")
    figure.text(0.3 / width, 0.28 / height, _caption(document), fontsize=7.5, color="#57606a", va="center")
    figure.subplots_adjust(left=left, right=right, wspace=wspace, top=1 - top / height, bottom=1.0 / height)
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
    _label_ends(axes, labels)


def _label_ends(axes: Any, labels: Sequence[tuple[float, float, str, str, bool]]) -> None:
    """Write names beside the ends of lines, moved up and down until they do not overlap."""
    if not labels:
        return
    axes.figure.canvas.draw()  # sets the limits of the axes
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # in points, the unit of the labels
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted((height * to_axes.transform((x, y))[1], *rest) for x, y, *rest in labels)
    places, apart = [end[0] for end in ends], 1.25 * LABEL_POINTS
    for _ in range(200):
        for i in range(len(places) - 1):
            short = apart - (places[i + 1] - places[i])
            if short > 0.01:
                places[i] -= short / 2
                places[i + 1] += short / 2
    for (at, text, colour, own), place in zip(ends, places, strict=True):
        axes.annotate(
            text,
            xy=(1, at / height),
            xycoords="axes fraction",
            xytext=(6, place - at),
            textcoords="offset points",
            color=colour,
            fontsize=LABEL_POINTS,
            weight="bold" if own else "normal",
            va="center",
            annotation_clip=False,
        )


def _count_axis(axes: Any, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Set up an axis of rows or tokens, with a tick at each number that was measured."""
    counts = sorted({m for points in lines.values() for m, _ in points})
    axes.set_xticks(counts, [str(m) for m in counts])
    axes.minorticks_off()

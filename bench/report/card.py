"""The card that pictures are drawn on, and what all of them share. Needs matplotlib.

A card is light, so that it can be read on light and on dark pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["FAINT", "INK", "LABEL_POINTS", "card", "card_style", "count_axis", "label_ends", "save_figure"]

CARD, EDGE, INK, FAINT = "#fcfcfa", "#c9d1d9", "#24292f", "#8b949e"
LABEL_POINTS = 8.5
DOTS_PER_INCH = 150
WIDTH = 10.5  # inches


@contextmanager
def card_style() -> Iterator[None]:
    """matplotlib's settings for pictures that are drawn and saved inside.

    Raises
    ------
    ValueError
        matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"matplotlib cannot be imported ({error}): pip install matplotlib") from error
    style: Any = {
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
    with matplotlib.rc_context(style):
        yield


def card(
    title: str,
    caption: str,
    height: float,
    *,
    left: float,
    right: float,
    wspace: float,
    top: float,
    sharey: bool = True,
) -> tuple[Any, Any]:
    """A card with a title, a caption and two panels: the figure and its axes.

    ``left``, ``right``, ``wspace`` and ``top`` place the panels, which share the vertical axis if ``sharey``.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, height), sharey=sharey)
    figure.patch.set_alpha(0)
    inset = 0.02
    background = FancyBboxPatch(
        (inset, inset),
        WIDTH - 2 * inset,
        height - 2 * inset,
        boxstyle="round,pad=0,rounding_size=0.12",
        facecolor=CARD,
        edgecolor=EDGE,
        transform=figure.dpi_scale_trans,
        zorder=-1,
    )
    figure.add_artist(background)
    figure.text(0.3 / WIDTH, 1 - 0.3 / height, title, fontsize=12, weight="bold", va="center")
    figure.text(0.3 / WIDTH, 0.28 / height, caption, fontsize=7.5, color="#57606a", va="center")
    figure.subplots_adjust(left=left, right=right, wspace=wspace, top=1 - top / height, bottom=1.0 / height)
    return figure, axes


def save_figure(figure: Any, folder: Path, name: str) -> list[Path]:
    """Save a figure as PNG and SVG, and close it; returns the paths."""
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata=metadata)
    plt.close(figure)
    return paths


def label_ends(axes: Any, labels: Sequence[tuple[float, float, str, str, bool]]) -> None:
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


def count_axis(axes: Any, counts: Iterable[int]) -> None:
    """Set up an axis of rows, tokens or sequences, with a tick at each number that was measured."""
    ticks = sorted(set(counts))
    axes.set_xticks(ticks, [str(count) for count in ticks])
    axes.minorticks_off()

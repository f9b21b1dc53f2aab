"""Pictures of what ``python -m bench decoder`` saved: tokens per second of whole models. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.card import FAINT, INK, LABEL_POINTS, card, card_style, count_axis, label_ends, save_figure

__all__ = ["PICTURES", "draw"]

COLOURS = {"int8": "#d55e00", "int16": "#0072b2", "llama.cpp": "#009e73", "transformers": "#cc79a7"}
NAMES = {
    "int8": "marlin_cy int8",
    "int16": "marlin_cy int16",
    "llama.cpp": "llama.cpp Q4_0",
    "transformers": "transformers bfloat16",
}
MARKERS = {"int8": "o", "int16": "o", "llama.cpp": "s", "transformers": "D"}
LINE_LABELS = 0.15  # of the card's width, for names at the ends of lines

Case = Mapping[str, Any]


def draw(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw every picture for which the document has cases; returns the paths of the files.

    Raises
    ------
    ValueError
        matplotlib is not installed, or there is nothing to draw.
    """
    paths: list[Path] = []
    with card_style():
        for name, make in PICTURES.items():
            figure = make(document)
            if figure is not None:
                paths += save_figure(figure, folder, name)
    if not paths:
        raise ValueError("the document has no runs that could be drawn")
    return paths


# ---------------------------------------------------------------------------------------------
# The pictures


def decode_and_prefill(document: Mapping[str, Any]) -> Any:
    """Tokens per second of one sequence from an empty cache: decode, and the shortest prompt."""
    alone = [case for case in document["cases"] if (case["sequences"], case["depth"]) == (1, 0)]
    panels = []
    for part in ("decode", "prefill"):
        cases = sorted((case for case in alone if case["part"] == part), key=lambda case: int(case["tokens"]))
        if cases:
            panels.append((part, cases[0]))
    if len(panels) < 2:
        return None
    shown = [name for name in NAMES if any(name in case["tokens_per_second"] for _, case in panels)]
    title = f"A whole model of {document['model']['layers']} layers: tokens per second"
    height = 2.0 + 0.42 * len(shown)
    figure, axes = card(title, _caption(document), height, left=0.17, right=0.94, wspace=0.2, top=0.75)
    for panel, (part, case) in zip(axes, panels, strict=True):
        words = "decode" if part == "decode" else f"prefill of {case['tokens']} tokens"
        panel.set_title(f"{words}: tokens/s", loc="left", weight="bold", pad=8)
        for place, name in enumerate(shown):
            rate = case["tokens_per_second"].get(name)
            if rate is None:
                panel.annotate("not measured", (0, place), (4, 0), textcoords="offset points", va="center", color=FAINT)
                continue
            panel.barh(place, rate["median"], height=0.62, color=COLOURS[name], zorder=2)
            panel.plot([rate["p10"], rate["p90"]], [place, place], color=INK, linewidth=1, zorder=3)
            panel.annotate(
                f"{rate['median']:.4g}",
                (max(rate["median"], rate["p90"]), place),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=LABEL_POINTS,
            )
        panel.set_yticks(range(len(shown)), [NAMES[name] for name in shown])
        panel.tick_params(axis="y", length=0)
        panel.margins(x=0.16)
        panel.set_xlim(left=0)
        panel.grid(axis="x", zorder=0)
        panel.set_xlabel("thin line: p10–p90", fontsize=7.5, color="#57606a")
    axes[0].invert_yaxis()  # of both panels: they share it
    return figure


def depth_and_sequences(document: Mapping[str, Any]) -> Any:
    """Tokens per second of decoding: of one sequence over the tokens in its cache, and of several together."""
    decoded = [case for case in document["cases"] if case["part"] == "decode"]
    by_depth = {int(case["depth"]): case for case in decoded if case["sequences"] == 1}
    by_sequences = {int(case["sequences"]): case for case in decoded if case["sequences"] > 1}
    if 0 in by_depth:
        by_sequences[1] = by_depth[0]
    return _lines(
        document,
        "Decode: tokens per second",
        {
            "one sequence, over tokens in the cache": ("tokens in the cache", by_depth, "symlog"),
            "sequences together": ("sequences", by_sequences, "log"),
        },
    )


def prompt_length(document: Mapping[str, Any]) -> Any:
    """Tokens per second of a prefill, and its time, over the length of the prompt."""
    cases = {int(case["tokens"]): case for case in document["cases"] if case["part"] == "prefill"}
    if len(cases) < 2:
        return None
    figure, axes = card("Prefill", _caption(document), 4.7, left=0.075, right=1 - LINE_LABELS, wspace=0.55, top=0.75)
    # The panels of a card share the vertical axis; times need one of their own.
    axes[1].remove()
    axes = axes[0], figure.add_subplot(1, 2, 2)
    for panel, quantity, words in zip(
        axes, ("tokens_per_second", "us_a_layer"), ("tokens/s", "µs a layer and token; lower is faster"), strict=True
    ):
        panel.set(xscale="log", xlabel="tokens of the prompt")
        panel.set_title(words, loc="left", weight="bold", pad=8)
        _draw_lines(panel, cases, quantity)
    return figure


PICTURES = {
    "decoder": decode_and_prefill,
    "decoder-depth": depth_and_sequences,
    "decoder-prompt": prompt_length,
}
"""By file name: the function that draws the picture, or returns None if the document has too few cases."""


# ---------------------------------------------------------------------------------------------
# Parts of pictures


def _lines(document: Mapping[str, Any], title: str, panels: Mapping[str, tuple[str, Mapping[int, Case], str]]) -> Any:
    """A card whose panels have lines of tokens per second; a panel is its x label, its cases by x, and its scale."""
    if all(len(cases) < 2 for _, cases, _ in panels.values()):
        return None
    figure, axes = card(title, _caption(document), 4.7, left=0.075, right=1 - LINE_LABELS, wspace=0.5, top=0.75)
    for panel, (words, (label, cases, scale)) in zip(axes, panels.items(), strict=True):
        panel.set_title(words, loc="left", weight="bold", pad=8)
        panel.set(xlabel=label)
        if cases:
            # A logarithmic axis that has a place for 0: linear up to the smallest other number.
            linear = {"linthresh": min([x for x in cases if x], default=1)} if scale == "symlog" else {}
            panel.set_xscale(scale, **linear)
            _draw_lines(panel, cases, "tokens_per_second")
    axes[0].set_ylabel("tokens/s, of all sequences together")
    return figure


def _draw_lines(panel: Any, cases: Mapping[int, Case], quantity: str) -> None:
    """Draw a line for each side, with its name at the end."""
    labels: list[tuple[float, float, str, str, bool]] = []
    for name in NAMES:
        points = [(x, case[quantity][name]["median"]) for x, case in sorted(cases.items()) if name in case[quantity]]
        if not points:
            continue
        own = name in ("int8", "int16")
        xs, ys = zip(*points, strict=True)
        panel.plot(xs, ys, color=COLOURS[name], marker=MARKERS[name], linewidth=2.6 if own else 1.3, markersize=5)
        labels.append((xs[-1], ys[-1], NAMES[name], COLOURS[name], own))
    panel.set_ylim(bottom=0)
    count_axis(panel, cases)
    panel.grid(which="major", zorder=0)
    label_ends(panel, labels)


def _caption(document: Mapping[str, Any]) -> str:
    machine, model = document["machine"], document["model"]
    versions: Sequence[str] = [f"{name} {version}" for name, version in document["sides"].items() if version]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; {model['layers']} layers of hidden size "
        f"{model['hidden_size']}, top {model['num_experts_per_tok']} of {model['num_experts']} experts; medians; "
        f"{document['date']}\n{'; '.join(versions)}"
    )

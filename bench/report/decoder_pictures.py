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


def depth_and_prompt(document: Mapping[str, Any]) -> Any:
    """Tokens per second of one sequence: of decoding over the tokens in its cache, and of prompts over their length."""
    alone = [case for case in document["cases"] if case["sequences"] == 1]
    depths = {int(case["depth"]): case for case in alone if case["part"] == "decode"}
    prompts = {int(case["tokens"]): case for case in alone if case["part"] == "prefill"}
    if len(depths) < 2 and len(prompts) < 2:
        return None
    figure, (left, right) = _line_card(document, "One sequence: tokens per second")
    if depths:
        # A logarithmic axis that has a place for 0: linear up to the smallest other number.
        left.set_xscale("symlog", linthresh=min([depth for depth in depths if depth], default=1))
    right.set_xscale("log")
    _draw_lines(left, "decode: tokens/s", "tokens in the cache", depths, "tokens_per_second")
    _draw_lines(right, "prefill: tokens/s", "tokens of the prompt", prompts, "tokens_per_second")
    return figure


def sequences(document: Mapping[str, Any]) -> Any:
    """Decoding of several sequences together: tokens per second, and the time of a step."""
    decoded = [case for case in document["cases"] if case["part"] == "decode"]
    cases = {int(case["sequences"]): case for case in decoded if case["sequences"] > 1}
    if not cases:
        return None
    for case in decoded:
        if (case["sequences"], case["depth"]) == (1, 0):
            cases[1] = case
    figure, (left, right) = _line_card(document, "Decode of several sequences together")
    for panel in (left, right):
        panel.set_xscale("log")
    _draw_lines(left, "tokens/s of all sequences", "sequences", cases, "tokens_per_second")
    _draw_lines(right, "µs a layer and step; lower is faster", "sequences", cases, "us_a_layer")
    return figure


PICTURES = {"decoder": decode_and_prefill, "decoder-depth": depth_and_prompt, "decoder-sequences": sequences}
"""By file name: the function that draws the picture, or returns None if the document has too few cases."""


# ---------------------------------------------------------------------------------------------
# Parts of pictures


def _line_card(document: Mapping[str, Any], title: str) -> tuple[Any, Any]:
    """A card whose two panels have axes of their own, and room for names at the ends of lines."""
    return card(title, _caption(document), 4.7, left=0.075, right=0.85, wspace=0.62, top=0.75, sharey=False)


def _draw_lines(panel: Any, title: str, label: str, cases: Mapping[int, Case], quantity: str) -> None:
    """Draw a line for each side, with its name at the end."""
    panel.set_title(title, loc="left", weight="bold", pad=8)
    panel.set_xlabel(label)
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

"""The bars of a comparison: how many times as fast as the fastest peer this library must be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.common.results import verdict
from marlin_cy.commands.output import table

__all__ = ["BARS", "RIVALS", "SAME_ERROR", "Bar", "bars_table", "fastest", "judge", "rivals"]

# Each compute dtype of this library is compared with peers that compute in these types. Peers beside int8 must have an
# error within a factor of this library's, which excludes peers that rounded the weights once more. bfloat16 is a
# hundred times less accurate than int16, but no other library has a type between bfloat16 and float32.
RIVALS = {"int16": ("bf16", "float32"), "int8": ("int8", "bf16", "float32")}
SAME_ERROR = 2.0


@dataclass(frozen=True)
class Bar:
    """The least ratio of the fastest peer's time to this library's, over a range of rows or tokens.

    Attributes
    ----------
    part : {"projection", "routed", "layer"}
    ours : {"int16", "int8"}
        Compute dtype of this library.
    first, last : int
        The range of rows or tokens.
    least : float
    """

    part: str
    ours: str
    first: int
    last: int
    least: float


BARS = (
    *(
        Bar("projection", ours, rows, rows, least)
        for ours, bars in (("int8", (1.1, 2, 2)), ("int16", (1.3, 2, 2)))
        for rows, least in zip((1, 16, 256), bars, strict=True)
    ),
    *(
        Bar("routed", ours, first, last, least)
        for ours in ("int8", "int16")
        for first, last, least in ((1, 8, 1.1), (16, 64, 2), (256, 1024, 3))
    ),
    *(
        Bar("layer", ours, tokens, tokens, least)
        for ours in ("int8", "int16")
        for tokens, least in ((1, 1.1), (16, 2), (256, 3))
    ),
)


def rivals(document: Mapping[str, Any], ours: str, part: str) -> list[str]:
    """Names of the peers that a compute dtype of this library is compared with."""
    sides = document["sides"]
    limit = SAME_ERROR * sides["int8"]["errors"].get(part, 0) if ours == "int8" else math.inf
    return [
        name
        for name, side in sides.items()
        if name not in ("int16", "int8")
        and side["accuracy"] in RIVALS[ours]
        and part in side["errors"]
        and side["errors"][part] <= limit
    ]


def fastest(document: Mapping[str, Any], part: str, ours: str, m: int) -> tuple[str, dict[str, float]] | None:
    """``(peer, ratio)`` of the peer with the shortest time in one case; the ratio is a spread. None without peers.

    The peer is chosen by its time, not by its ratio: a ratio is also small if this library was disturbed.
    """
    names = rivals(document, ours, part)
    timed = [case for case in document["cases"] if (case["part"], case["m"]) == (part, m) and case["peer"] in names]
    if not timed:
        return None
    best = min(timed, key=lambda case: case["us"][case["peer"]]["median"])
    return best["peer"], best["ratio"][ours]


def judge(document: Mapping[str, Any], bars: Sequence[Bar] = BARS) -> list[dict[str, Any]]:
    """Judge each bar by the case of its range in which the fastest peer comes nearest.

    Returns
    -------
    list of dict
        ``part``, ``ours``, ``first``, ``last``, ``bar``; ``measured`` (a spread), ``m``, ``peer`` and ``passed``, which
        are None if nothing was timed.
    """
    return [_judged(document, bar) for bar in bars]


def _judged(document: Mapping[str, Any], bar: Bar) -> dict[str, Any]:
    measured = sorted({case["m"] for case in document["cases"] if case["part"] == bar.part})
    found = [
        (m, *best)
        for m in measured
        if bar.first <= m <= bar.last and (best := fastest(document, bar.part, bar.ours, m)) is not None
    ]
    m, peer, ratio = min(found, key=lambda one: one[2]["median"]) if found else (None, None, None)
    return {
        "part": bar.part,
        "ours": bar.ours,
        "first": bar.first,
        "last": bar.last,
        "bar": bar.least,
        "measured": ratio,
        "m": m,
        "peer": peer,
        "passed": None if ratio is None else ratio["median"] >= bar.least,
    }


def bars_table(judged: Sequence[Mapping[str, Any]]) -> Table:
    """The table of the result of :func:`judge`."""
    result = table("what", "ours", ">rows, tokens", ">bar", ">measured", ">p10–p90", ">at", "fastest peer", "verdict")
    for one in judged:
        span = str(one["first"]) if one["first"] == one["last"] else f"{one['first']}–{one['last']}"
        cells = [one["part"], one["ours"], span, f"≥ {one['bar']:g}"]
        if one["measured"] is None:
            result.add_row(*cells, "—", "—", "—", "—", "not measured")
            continue
        ratio = one["measured"]
        figures = f"{ratio['median']:.2f}", f"{ratio['p10']:.2f}–{ratio['p90']:.2f}"
        result.add_row(*cells, *figures, str(one["m"]), one["peer"], verdict(one["passed"]))
    return result

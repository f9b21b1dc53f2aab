"""The bars that the library is held to beside others: how many times as fast as the fastest of them it must be."""

import math
from dataclasses import dataclass

from marlin_cy.commands.output import table

__all__ = ["BARS", "RIVALS", "SAME_ERROR", "Bar", "bars_table", "fastest", "judge", "rivals"]

# What a side of ours is held against: peers that compute in these, the errors of 8-bit ones within a factor, which
# leaves out those that rounded the weights once more. bfloat16 is a hundred times less accurate than int16, but no
# other library has anything between it and float32.
RIVALS = {"int16": ("bf16", "float32"), "int8": ("int8", "bf16", "float32")}
SAME_ERROR = 2.0


@dataclass(frozen=True)
class Bar:
    """The least ratio, the fastest peer's time over ours, of a side of ours, from some rows or tokens on to others."""

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


def rivals(document, ours, part):
    """Names of the peers that a side of ours is held against."""
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


def fastest(document, part, ours, m):
    """``(peer, ratio)`` of the peer with the shortest time in one case, its ratio a spread; None where none was timed.

    Its own time chooses it: a ratio is as small where ours was disturbed.
    """
    names = rivals(document, ours, part)
    timed = [case for case in document["cases"] if (case["part"], case["m"]) == (part, m) and case["peer"] in names]
    if not timed:
        return None
    best = min(timed, key=lambda case: case["us"][case["peer"]]["median"])
    return best["peer"], best["ratio"][ours]


def judge(document, bars=BARS):
    """The figure of each bar: that of the case, of those it is about, where the fastest peer comes nearest.

    Returns
    -------
    list of dict
        ``part``, ``ours``, ``first``, ``last``, ``bar``; ``measured`` (a spread), ``m``, ``peer`` and ``passed``, all
        None where nothing was timed.
    """
    return [_judged(document, bar) for bar in bars]


def _judged(document, bar):
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


def bars_table(judged):
    """What :func:`judge` returned, to be printed."""
    result = table("what", "ours", ">rows, tokens", ">bar", ">measured", ">p10–p90", ">at", "fastest peer", "verdict")
    for one in judged:
        span = str(one["first"]) if one["first"] == one["last"] else f"{one['first']}–{one['last']}"
        cells = [one["part"], one["ours"], span, f"≥ {one['bar']:g}"]
        if one["measured"] is None:
            result.add_row(*cells, "—", "—", "—", "—", "not measured")
            continue
        verdict = "[green]met[/green]" if one["passed"] else "[red]missed[/red]"
        ratio = one["measured"]
        figures = f"{ratio['median']:.2f}", f"{ratio['p10']:.2f}–{ratio['p90']:.2f}"
        result.add_row(*cells, *figures, str(one["m"]), one["peer"], verdict)
    return result

"""The bars of ``python -m bench decoder``: each claim about the speed of whole models, from a measured document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.common.timing import Spread
from bench.report.show_lines import measured_line, skipped_line

__all__ = ["FIGURE_BARS", "RUN_BARS", "FigureBar", "RunBar", "judge"]

FEW_CORES, MANY_CORES = 2, 16
MANY_THREADS = 8  # from so many threads on, the bars of many cores count


@dataclass(frozen=True)
class RunBar:
    """A bar on this library's time in a run, over another side's.

    Attributes
    ----------
    line : str
    what : str
    part : {"decode", "prefill"}
    sequences, depth, tokens : int
        Of the case; ``depth`` or ``tokens`` of -1 stands for any.
    ours : {"int16", "int8"}
        Compute dtype of this library.
    other : str
        The other side; "kernels" for the products alone.
    bars : dict
        By number of cores. Speed over another library's has to be at least so much; time over the kernels' at most.
    """

    line: str
    what: str
    part: str
    sequences: int
    depth: int
    tokens: int
    ours: str
    other: str
    bars: Mapping[int, float]


@dataclass(frozen=True)
class FigureBar:
    """A bar on a figure of the document."""

    line: str
    what: str
    figure: str
    comparison: str
    bar: float


LLAMA = "llama.cpp"
RUN_BARS = (
    RunBar("1", "decode, int16: speed ÷ llama.cpp", "decode", 1, 0, -1, "int16", LLAMA, {2: 1.15, 16: 1.4}),
    RunBar("2", "decode at depth 4096, int16: speed ÷ llama.cpp", "decode", 1, 4096, -1, "int16", LLAMA, {2: 1.1}),
    RunBar("3", "decode, int16: time ÷ the products alone", "decode", 1, 0, -1, "int16", "kernels", {2: 1.12, 16: 1.2}),
    RunBar("4a", "prefill of 512, int8: speed ÷ llama.cpp", "prefill", 1, 0, 512, "int8", LLAMA, {2: 4.0, 16: 12.0}),
    RunBar("4b", "prefill of 512, int16: speed ÷ llama.cpp", "prefill", 1, 0, 512, "int16", LLAMA, {2: 2.3}),
    RunBar("5", "prefill of 4096, int16: speed ÷ llama.cpp", "prefill", 1, 0, 4096, "int16", LLAMA, {2: 1.8}),
    RunBar(
        "6", "decode of 16 sequences, int16: speed ÷ llama.cpp", "decode", 16, -1, -1, "int16", LLAMA, {2: 1.5, 16: 3.0}
    ),
)
FIGURE_BARS = (
    FigureBar("7a", "head in bfloat16, 1 row: bytes/s ÷ read bandwidth", "head", ">=", 0.85),
    FigureBar("7b", "the same, ISA avx2", "head, avx2", ">=", 0.8),
    FigureBar("8", "built-in model: decode, tokens/s", "built-in decode, tokens/s", ">=", 2000.0),
    FigureBar("9a", "built-in model: seconds from the command to the first token", "start, built-in", "<=", 1.0),
    FigureBar("9b", "packed folder: seconds from the command to the first token", "start, packed", "<=", 1.5),
    FigureBar("9c", "GGUF file: seconds from the command to the first token", "start, GGUF", "<=", 5.0),
    FigureBar("10a", "resident memory ÷ weights and cache", "memory, checkpoint", "<=", 1.05),
    FigureBar("10b", "the same, packed folder", "memory, packed", "<=", 1.05),
)


def judge(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of a document, each with its bar; those that were not measured have the reason."""
    cores = MANY_CORES if document["machine"]["threads"] >= MANY_THREADS else FEW_CORES
    return [_run_line(document, bar, cores) for bar in RUN_BARS] + [
        _figure_line(document["figures"], bar) for bar in FIGURE_BARS
    ]


def _run_line(document: Mapping[str, Any], bar: RunBar, cores: int) -> dict[str, Any]:
    least = bar.bars.get(cores)
    kernels = bar.other == "kernels"
    comparison = None if least is None else "<=" if kernels else ">="
    other = f"kernels, {bar.ours}" if kernels else bar.other
    for case in document["cases"]:
        wanted = (case["part"], case["sequences"]) == (bar.part, bar.sequences) and all(
            getattr(bar, name) in (-1, case[name]) for name in ("depth", "tokens")
        )
        if not wanted:
            continue
        found = case["ratio"].get(bar.ours, {}).get(other)
        if found is None:
            reasons = [reason for name, reason in case["skipped"].items() if name.startswith(other)]
            reason = reasons[0] if reasons else f"{bar.ours} was not measured"
            return skipped_line(bar.line, bar.what, comparison, least, reason)
        # The document's ratios are those of the other side's time to this library's.
        ratio = Spread(1 / found["median"], 1 / found["p90"], 1 / found["p10"]) if kernels else Spread(**found)
        return measured_line(bar.line, bar.what, comparison, least, ratio)
    return skipped_line(bar.line, bar.what, comparison, least, "not measured")


def _figure_line(figures: Mapping[str, Any], bar: FigureBar) -> dict[str, Any]:
    figure = figures.get(bar.figure, "not measured")
    if isinstance(figure, str):
        return skipped_line(bar.line, bar.what, bar.comparison, bar.bar, figure)
    return measured_line(bar.line, bar.what, bar.comparison, bar.bar, Spread(**figure))

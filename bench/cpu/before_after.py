"""Time two builds of this library against each other, to see whether a change made anything slower.

Each build runs in a process of its own that stays alive (``before_after_worker.py``). The two take turns, block by
block. A case's figure is the median of ``before / after`` over neighbouring blocks: above 1, the later build is faster.
Both processes are restarted a few times, because the memory layout that one process gets can favour it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.common.machine import last_level_cache_bytes
from bench.common.options import (
    COMPUTE_DTYPES,
    add_cpus,
    add_model,
    add_quick,
    names,
    positive,
    restrict_cpus,
    values,
)
from bench.common.processes import Child
from bench.common.results import counted, verdict
from bench.common.shapes import MODELS, TINY, ModelShape, packed_bytes_estimate, routings
from bench.common.timing import CallTimer, Spread, alternate, median_interval, spread

__all__ = ["Side", "add_options", "cases_of", "compare_builds", "run"]

WORKER = Path(__file__).with_name("before_after_worker.py")
SCHEMA_VERSION = 1
PARTS = ("overhead", "product", "routed", "layer")
ROWS = (1, 4, 16, 256)
TOKENS = (1, 16, 256)
EXPERTS_PER_CALL = 8
OVERHEAD_STACK = (EXPERTS_PER_CALL, 32, 8, 32)  # almost nothing to compute, so the time is the cost of a call
CACHE_MULTIPLE = 4  # size of the weights that calls take in turns, in last-level caches
LEAST_RATIO = 0.97

Case = dict[str, Any]
"""A case as ``before_after_worker.py`` takes it, and its ``name`` and ``part``."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m bench before-after``."""
    parser.add_argument("--before", required=True, metavar="PYTHON", help="interpreter that has the earlier build")
    parser.add_argument("--after", default=sys.executable, metavar="PYTHON", help="the later build; default: this one")
    for side in ("before", "after"):
        parser.add_argument(
            f"--{side}-path", metavar="FOLDER", help=f"import marlin_cy of the {side} side from this folder"
        )
    parser.add_argument("--only", type=names(PARTS), default=PARTS, metavar="A,B", help=f"default: {','.join(PARTS)}")
    add_model(parser)
    parser.add_argument("--rows", type=values(positive), default=ROWS, metavar="A,B", help="rows of a product")
    parser.add_argument("--tokens", type=values(positive), default=TOKENS, metavar="A,B", help="tokens of a layer")
    parser.add_argument("--compute-dtypes", type=names(COMPUTE_DTYPES), default=COMPUTE_DTYPES, metavar="A,B")
    parser.add_argument("--isa", help="instruction set of both sides; default: MARLIN_CY_ISA, or the best one here")
    add_cpus(parser)
    parser.add_argument("--rounds", type=positive, metavar="N", help="rounds of a case, over all starts (default: 40)")
    parser.add_argument("--starts", type=positive, metavar="N", help="times that both processes start (default: 2)")
    parser.add_argument(
        "--min-ms", type=float, default=20.0, metavar="MS", help="least length of a block (default: 20)"
    )
    parser.add_argument("--pause-ms", type=float, default=5.0, metavar="MS", help="sleep before a block (default: 5)")
    parser.add_argument("--least", type=float, default=LEAST_RATIO, metavar="R", help="least ratio (default: 0.97)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also save the JSON here")
    add_quick(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns the exit code, which is 0 for any ratios."""
    restrict_cpus(arguments)
    document = compare_builds(arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    if arguments.json:
        print(json.dumps(document, indent=1, allow_nan=False))
    else:
        _print(document)
    return 0


def compare_builds(arguments: argparse.Namespace) -> dict[str, Any]:
    """The JSON document of a comparison of two builds."""
    starts = arguments.starts or (1 if arguments.quick else 2)
    rounds = arguments.rounds or (2 if arguments.quick else 40)
    timing = {
        "starts": starts,
        "rounds": -(-rounds // starts) * starts,
        "min_seconds": 1e-3 if arguments.quick else arguments.min_ms * 1e-3,
        "pause_seconds": 1e-3 if arguments.quick else arguments.pause_ms * 1e-3,
    }
    cases = list(cases_of(arguments))
    described: dict[str, Any] = {}
    found: list[dict[str, Any]] = [{"before": [], "after": [], "digests": set()} for _ in cases]
    for start in range(starts):
        order = ("before", "after") if start % 2 == 0 else ("after", "before")
        sides = {name: Side(name, getattr(arguments, name), getattr(arguments, f"{name}_path")) for name in order}
        try:
            described = {name: sides[name].described for name in ("before", "after")}
            for case, figures in zip(cases, found, strict=True):
                print(f"start {start + 1} of {starts}: {case['name']}", file=sys.stderr)
                _measure_case(sides, case, figures, -(-rounds // starts), timing)
        finally:
            for side in sides.values():
                side.close()
    return {
        "schema": SCHEMA_VERSION,
        "mode": "before-after",
        "command": sys.argv[1:],
        "date": time.strftime("%Y-%m-%d"),
        "sides": described,
        "timing": timing,
        "least": arguments.least,
        "cases": [_summary(case, figures, arguments.least) for case, figures in zip(cases, found, strict=True)],
    }


def cases_of(arguments: argparse.Namespace) -> Iterator[Case]:
    """Every case that the options ask for."""
    model = TINY if arguments.quick else MODELS[arguments.model]
    cache = 0 if arguments.quick else CACHE_MULTIPLE * last_level_cache_bytes()
    stacks, copies = _stacks(model, cache)
    k, n = model.projections["gate_up"]
    tokens = tuple(min(count, 16) for count in arguments.tokens) if arguments.quick else arguments.tokens
    rows = tuple(min(count, 16) for count in arguments.rows) if arguments.quick else arguments.rows
    drawn = {count: [ids.tolist() for ids in routings(model.num_experts, model.top_k, count)] for count in set(tokens)}
    layer_stacks: Case = {
        name: (model.num_experts, *shape, model.group_size) for name, shape in model.projections.items()
    }
    for dtype in arguments.compute_dtypes:
        common = {"compute_dtype": dtype, "threads": arguments.threads, "isa": arguments.isa}

        def case(part: str, what: str, common: Case = common, **more: Any) -> Case:
            return {"part": part, "name": f"{part} {what}, {common['compute_dtype']}", **common, **more}

        several: Case = {"kind": "product", "experts_per_call": EXPERTS_PER_CALL}
        if "overhead" in arguments.only:
            what = f"{EXPERTS_PER_CALL} experts × 1 row, 32→8"
            yield case("overhead", what, stack=OVERHEAD_STACK, rows=1, **several)
        if "product" in arguments.only:
            for count in (1, 4):
                what = f"{EXPERTS_PER_CALL} experts × {counted(count, 'row')}, {k}→{n}"
                yield case("product", what, stack=stacks["gate_up"], rows=count, **several)
            for count in dict.fromkeys(rows):
                what = f"1 expert × {counted(count, 'row')}, {k}→{n}"
                yield case("product", what, kind="product", stack=stacks["gate_up"], rows=count, experts_per_call=1)
        for count in dict.fromkeys(tokens):
            what = f"{counted(count, 'token')}, top {model.top_k} of {model.num_experts}"
            if "routed" in arguments.only:
                stack = layer_stacks["gate_up"]
                yield case("routed", what, kind="routed", stack=stack, copies=copies, routings=drawn[count])
            if "layer" in arguments.only:
                yield case("layer", what, kind="layer", copies=copies, routings=drawn[count], **layer_stacks)


def _stacks(model: ModelShape, least_bytes: int) -> tuple[dict[str, tuple[int, int, int, int]], int]:
    """Stacks for single products, and the number of layers, each of them at least so many bytes together."""
    estimates = {name: packed_bytes_estimate(k, n) for name, (k, n) in model.projections.items()}
    stacks = {}
    for name, (k, n) in model.projections.items():
        experts = max(model.num_experts, -(-least_bytes // estimates[name]))
        stacks[name] = (experts + -experts % EXPERTS_PER_CALL, k, n, model.group_size)
    copies = max(1, -(-least_bytes // (model.num_experts * sum(estimates.values()))))
    return stacks, copies


class Side(CallTimer):
    """A build in a process of its own: a side of ``bench.timing`` whose calls are made there.

    Parameters
    ----------
    name : str
        ``"before"`` or ``"after"``, for messages.
    python : str
        The interpreter.
    folder : str, optional
        Where it imports marlin_cy from, if not where it is installed.

    Attributes
    ----------
    described : dict
        Version, folder, ISA and threads, from the process itself.

    Raises
    ------
    ValueError
        The interpreter does not start, has no marlin_cy, or a request failed.
    """

    def __init__(self, name: str, python: str, folder: str | None = None) -> None:
        command = [python, "-I", str(WORKER), *([str(Path(folder).resolve())] if folder else [])]
        self._child = Child(f"--{name}", command)
        self.described = self._child.described
        self._reset()

    def make(self, case: Case, min_seconds: float) -> str:
        """Make a case, whose calls are timed from then on; returns the SHA-256 of its output."""
        self._reset(min_seconds)
        return str(self._child.ask({"do": "make", "case": case})["digest"])

    def block(self, min_seconds: float) -> list[float]:
        """Seconds of each of some calls that take at least ``min_seconds`` together; at least one call."""
        reply = self._child.ask({"do": "block", "first": self._index, "min_seconds": min_seconds})
        seconds: list[float] = reply["seconds"]
        self._index += len(seconds)
        return seconds

    def close(self) -> None:
        """End the process."""
        self._child.close()

    def _reset(self, min_seconds: float = 0.0) -> None:
        super().__init__(lambda i: None, min_seconds)


def _measure_case(
    sides: dict[str, Side], case: Case, figures: dict[str, Any], rounds: int, timing: dict[str, float]
) -> None:
    """Add a start's rounds to ``figures``: seconds of ``before`` and ``after``, and digests of the outputs."""
    for side in sides.values():
        figures["digests"].add(side.make(case, timing["min_seconds"]))
    for name, seconds in alternate(sides, rounds, timing["pause_seconds"]).items():
        figures[name] += seconds


def _summary(case: Case, figures: dict[str, Any], least: float) -> dict[str, Any]:
    """The JSON object of a case."""
    paired = np.divide(figures["before"], figures["after"])
    ratio = spread(paired)
    return {
        "part": case["part"],
        "name": case["name"],
        "compute_dtype": case["compute_dtype"],
        "rounds": len(paired),
        "us": {name: spread(np.multiply(figures[name], 1e6))._asdict() for name in ("before", "after")},
        "ratio": ratio._asdict(),
        "ratio_interval": list(median_interval(paired)),
        "same_bits": len(figures["digests"]) == 1,
        "passed": ratio.median >= least,
    }


def _print(document: dict[str, Any]) -> None:
    """The table of a document."""
    from marlin_cy.commands.output import console, table

    screen = console()
    for name, side in document["sides"].items():
        screen.print(
            f"{name}: marlin_cy {side['version']} in {side['folder']}, Python {side['python']}, ISA {side['isa']}, "
            f"threads {side['threads']}",
            markup=False,
        )
    for key in ("isa", "threads"):
        if document["sides"]["before"][key] != document["sides"]["after"][key]:
            screen.print(f"[yellow]The sides differ in {key}: ratios compare more than the builds.[/yellow]")
    result = table(
        "case", ">before\nµs", ">after\nµs", ">before ÷\nafter", ">95% interval\nof the median", ">p10–p90", "bits", ""
    )
    for case in document["cases"]:
        low, high = case["ratio_interval"]
        ratio = Spread(**case["ratio"])
        result.add_row(
            case["name"],
            *(f"{case['us'][name]['median']:.1f}" for name in ("before", "after")),
            f"{ratio.median:.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{ratio.p10:.3f}–{ratio.p90:.3f}",
            "equal" if case["same_bits"] else "[red]differ[/red]",
            verdict(case["passed"]) + (", but unclear" if low < document["least"] <= high else ""),
        )
    screen.print(result)
    timing = document["timing"]
    screen.print(
        f"\nBar: the median of before ÷ after ≥ {document['least']:g}; unclear if its interval holds the bar. "
        f"{timing['rounds']} rounds over {counted(timing['starts'], 'start')}. "
        "Bits: SHA-256 of the outputs of both sides."
    )

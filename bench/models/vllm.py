"""``python -m bench vllm``: a model in vLLM with the plugin, beside two others.

The model has Qwen3-30B-A3B's layer shapes and random weights. The others are the same weights by
``marlin_cy.integrations.transformers.load``, and in vLLM as bfloat16. Each is in a process of its own, and they run in
turns. Run the command with the Python of an environment that has vLLM.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.common.options import add_cpus, add_output, add_quick, names, positive, restrict_cpus, set_defaults
from bench.common.processes import Child, module_command, module_environment
from bench.common.timing import Spread, alternate, ratios, spread
from bench.models.claims import run_claims
from bench.models.synthetic import QWEN3_30B_A3B, TINY, VOCAB_SIZE, write_qwen3_moe

__all__ = ["OTHERS", "add_options", "judge", "run"]

SCHEMA_VERSION = 1
PLUGIN, LOAD, DENSE = "plugin", "load", "bfloat16"
OTHERS: Mapping[str, tuple[str, float | None]] = {
    LOAD: ("load in transformers", 1.2),
    DENSE: ("vLLM's unquantised bfloat16 experts", 2.0),
}
"""What the plugin is compared with, and the least ratio of tokens per second. The second is for AVX512-VNNI."""

DEFAULTS: Mapping[str, Any] = {"layers": 2, "rounds": 9}
QUICK: Mapping[str, Any] = {"layers": 2, "rounds": 1}
CASES = {"1 sequence": (1, 16, 32), "16 sequences": (16, 16, 8), "prompt of 512": (1, 512, 1)}
"""By name: sequences, tokens of each prompt, tokens that follow each."""

QUICK_CASES = {"1 sequence": (1, 4, 3), "16 sequences": (16, 4, 2), "prompt of 512": (1, 32, 1)}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the worker
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--only", type=names(tuple(OTHERS)), default=tuple(OTHERS), metavar="A,B", help="the others")
    parser.add_argument("--layers", type=positive, metavar="N", help=f"default: {DEFAULTS['layers']}")
    parser.add_argument(
        "--rounds", type=positive, metavar="N", help=f"rounds that count (default: {DEFAULTS['rounds']})"
    )
    parser.add_argument("--eager", action="store_true", help="do not compile the model in vLLM")
    add_cpus(parser)
    add_output(parser)
    add_quick(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code."""
    set_defaults(arguments, DEFAULTS, QUICK)
    restrict_cpus(arguments)
    timing = {name: getattr(arguments, name) for name in (*DEFAULTS, "eager", "quick")}
    return run_claims(
        "vllm",
        SCHEMA_VERSION,
        arguments,
        timing,
        partial(measure, arguments),
        lambda document: judge(document["figures"]),
    )


def measure(arguments: argparse.Namespace, temporary: Path, threads: int) -> dict[str, Any]:
    """The measured part of the document."""
    packed, dense = temporary / "packed", temporary / "dense"
    write_qwen3_moe(packed, arguments.layers, TINY if arguments.quick else QWEN3_30B_A3B)
    cases = QUICK_CASES if arguments.quick else CASES
    sides = (PLUGIN, *arguments.only)
    environment = module_environment(ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)})
    children: dict[str, Child] = {}
    try:
        for side in sides:
            children[side] = Child(side, module_command("bench.models.vllm_worker"), environment)
            if side == LOAD:
                children[side].ask({"do": "load", "folder": str(packed), "threads": threads})
                continue
            if side == DENSE:
                children[side].ask({"do": "dense", "folder": str(packed), "target": str(dense)})
            reply = children[side].ask(
                {
                    "do": "vllm",
                    "folder": str(packed if side == PLUGIN else dense),
                    "threads": threads,
                    "context_length": max(prompt + tokens for _, prompt, tokens in cases.values()),
                    "sequences": max(sequences for sequences, _, _ in cases.values()),
                    "eager": arguments.eager,
                }
            )
            if (side == PLUGIN) != (reply["method"] == "marlin_cy"):
                raise ValueError(f"{side}: vLLM runs the method {reply['method']!r}")
        figures = {name: _case(children, arguments.rounds, *case) for name, case in cases.items()}
    finally:
        for child in children.values():
            child.close()
    return {"versions": {side: child.described for side, child in children.items()}, "figures": figures}


def _case(children: Mapping[str, Child], rounds: int, sequences: int, prompt: int, tokens: int) -> dict[str, Any]:
    """Tokens per second of each side, and the plugin's over each other's."""
    prompts = np.random.default_rng(0).integers(2, VOCAB_SIZE, (sequences, prompt)).tolist()
    request = {"do": "generate", "prompts": prompts, "tokens": tokens}
    sides = {side: lambda child=child: float(child.ask(request)["seconds"]) for side, child in children.items()}
    seconds = alternate(sides, rounds, 0.0)
    count = sequences * (tokens if tokens > 1 else prompt)
    return {
        "tokens_per_second": {side: spread(np.divide(count, each))._asdict() for side, each in seconds.items()},
        "ratios": {side: ratios(seconds[side], seconds[PLUGIN])._asdict() for side in children if side != PLUGIN},
    }


def judge(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of a document, each with its bar."""
    from bench.report.show_lines import measured_line, skipped_line

    lines = []
    number = 0
    for side, (words, bar) in OTHERS.items():
        for case, found in figures.items():
            number += 1
            what = f"{case}: tokens/s in vLLM ÷ those of {words}"
            if side in found["ratios"]:
                lines.append(measured_line(str(number), what, ">=", bar, Spread(**found["ratios"][side])))
            else:
                lines.append(skipped_line(str(number), what, ">=", bar, "not measured"))
    return lines

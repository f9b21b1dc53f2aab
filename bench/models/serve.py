"""``python -m bench serve``: what the server adds to the model that it serves.

The model has Qwen3-30B-A3B's layer shapes and random weights. One process holds it; there it is served, and there it
runs alone, in turns. The clients are in this process. Each claim is printed with its bar.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.common.options import (
    COMPUTE_DTYPES,
    add_cpus,
    add_output,
    add_quick,
    names,
    positive,
    restrict_cpus,
    set_defaults,
)
from bench.common.processes import Child, module_command, module_environment
from bench.common.timing import Spread, alternate, ratios, spread
from bench.models.claims import run_claims
from bench.models.serve_clients import first_token_seconds, run_clients, whole_seconds
from bench.models.start_up import write_tokenizer
from bench.models.synthetic import QWEN3_30B_A3B, TINY, write_qwen3_moe

__all__ = ["PARTS", "add_options", "judge", "run"]

SCHEMA_VERSION = 1
PARTS = ("throughput", "first-token", "lone")
SEQUENCES, CLIENTS = 16, 32
FIRST_TOKEN_CLIENTS = 8
LONE_PROMPT, LONE_TOKENS = 32, 8
LONE_ROUNDS = 20  # short requests, for each round of the other parts
LONE_PAUSE_SECONDS = 0.05
"""Both sides have a team of OpenMP threads each, which spins for some milliseconds after its last call."""
DEFAULTS: Mapping[str, Any] = {"layers": 8, "rounds": 5, "prompt": 128, "tokens": 64, "first_prompt": 512}
QUICK: Mapping[str, Any] = {"layers": 2, "rounds": 1, "prompt": 20, "tokens": 3, "first_prompt": 40}
LEAST_SHARE, MOST_ADDED_MS = 0.9, 5.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""

    def option(name: str, words: str) -> None:
        default = DEFAULTS[name.replace("-", "_")]
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=f"{words} (default: {default})")

    parser.add_argument("--only", type=names(PARTS), default=PARTS, metavar="A,B", help=f"default: {','.join(PARTS)}")
    parser.add_argument(
        "--folder",
        type=Path,
        help="a checkpoint of that shape, written if it does not exist (default: a temporary one)",
    )
    option("layers", "layers of a checkpoint that is written, 0.34 GB each")
    option("prompt", f"tokens of the prompts of {CLIENTS} clients")
    option("tokens", "tokens of their answers")
    option("first-prompt", f"tokens of the prompts of {FIRST_TOKEN_CLIENTS} clients, whose first tokens are timed")
    option("rounds", "rounds that count")
    parser.add_argument("--compute-dtype", choices=COMPUTE_DTYPES, default="int16")
    add_cpus(parser)
    add_output(parser)
    add_quick(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and save; returns the exit code."""
    set_defaults(arguments, DEFAULTS, QUICK)
    restrict_cpus(arguments)
    timing = {name: getattr(arguments, name) for name in (*DEFAULTS, "compute_dtype", "quick")}
    return run_claims(
        "serve",
        SCHEMA_VERSION,
        arguments,
        timing,
        partial(measure, arguments),
        lambda document: judge(document["figures"]),
    )


def measure(arguments: argparse.Namespace, temporary: Path, threads: int) -> dict[str, Any]:
    """The measured part of the document."""
    folder = (arguments.folder or temporary / "model").resolve()
    if not (folder / "config.json").exists():
        write_qwen3_moe(folder, arguments.layers, TINY if arguments.quick else QWEN3_30B_A3B)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if not (folder / "tokenizer.json").exists():
        write_tokenizer(folder, config["vocab_size"])
    child = Child("the server", module_command("bench.models.serve_worker"), module_environment())
    try:
        measurement = _Measurement(child, folder, config["vocab_size"], threads, arguments)
        return {"figures": {part: getattr(measurement, part.replace("-", "_"))() for part in arguments.only}}
    finally:
        child.close()


class _Measurement:
    """The parts. Prompts are random, so that none begins as another one."""

    def __init__(
        self, child: Child, folder: Path, vocab_size: int, threads: int, arguments: argparse.Namespace
    ) -> None:
        self._child, self._folder, self._threads, self._arguments = child, folder, threads, arguments
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(0)
        self._served: tuple[Path | None, int] | None = None

    def _port(self, folder: Path | None) -> int:
        """The port of a folder's model, or of the built-in one; it is loaded in place of another one."""
        if self._served is None or self._served[0] != folder:
            arguments = self._arguments
            longest = max(arguments.prompt + arguments.tokens, arguments.first_prompt, LONE_PROMPT + LONE_TOKENS)
            request = {
                "do": "load",
                "folder": None if folder is None else str(folder),
                "compute_dtype": arguments.compute_dtype,
                "threads": self._threads,
                "context_length": longest + 1,
                "cache_tokens": 2 * CLIENTS * (longest + 32),
                "max_sequences": SEQUENCES,
            }
            self._served = folder, int(self._child.ask(request)["port"])
        return self._served[1]

    def throughput(self) -> dict[str, Any]:
        """Tokens per second of 32 clients, and of ``forward_batch`` with 16 sequences at a time."""
        count, port = self._arguments.tokens, self._port(self._folder)
        prompts: list[list[int]] = []

        def alone() -> float:
            request = {"do": "alone", "prompts": prompts, "tokens": count, "sequences": SEQUENCES}
            return float(self._child.ask(request)["seconds"])

        def served() -> float:
            return run_clients(port, prompts, count)

        seconds: dict[str, list[float]] = {"alone": [], "served": []}
        for number in range(self._arguments.rounds + 1):
            prompts[:] = self._prompts(CLIENTS, self._arguments.prompt)
            sides = {"alone": alone, "served": served}
            for name in sorted(sides, reverse=bool(number % 2)):
                figure = sides[name]()
                if number:  # the first round warms up
                    seconds[name].append(figure)
        total = CLIENTS * count
        return {
            "tokens_per_second": {name: spread(np.divide(total, each))._asdict() for name, each in seconds.items()},
            "share": ratios(seconds["alone"], seconds["served"])._asdict(),
        }

    def lone(self) -> dict[str, Any]:
        """Milliseconds of a request when nothing else runs, beyond those of the model's own generation.

        They do not depend on the model. The built-in one has the shortest steps, so that they are seen best.
        """
        port = self._port(None)
        prompts: list[list[int]] = []

        def direct() -> float:
            request = {"do": "generate", "prompt": prompts[0], "tokens": LONE_TOKENS}
            return float(self._child.ask(request)["seconds"])

        def served() -> float:
            return whole_seconds(port, prompts.pop(0), LONE_TOKENS)

        rounds = LONE_ROUNDS * self._arguments.rounds
        prompts[:] = self._prompts(rounds + 2, LONE_PROMPT, most=256)
        seconds = alternate({"direct": direct, "served": served}, rounds, LONE_PAUSE_SECONDS)
        added = np.subtract(seconds["served"], seconds["direct"]) * 1e3
        milliseconds = {name: spread(np.multiply(each, 1e3))._asdict() for name, each in seconds.items()}
        return {"ms": milliseconds, "added_ms": spread(added)._asdict()}

    def first_token(self) -> dict[str, Any]:
        """Seconds until the first token of each of 8 clients that begin together."""
        found: list[float] = []
        port = self._port(self._folder)
        for number in range(self._arguments.rounds + 1):
            prompts = self._prompts(FIRST_TOKEN_CLIENTS, self._arguments.first_prompt)
            seconds = first_token_seconds(port, prompts)
            if number:
                found += seconds
        return {"seconds": spread(found)._asdict(), "longest": max(found)}

    def _prompts(self, count: int, length: int, most: int | None = None) -> list[list[int]]:
        rows = self._rng.integers(2, most or self._vocab_size, (count, length))
        return [[int(one) for one in row] for row in rows]


def judge(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of a document, each with its bar."""
    from bench.report.show_lines import measured_line, skipped_line

    lines = []
    for number, part, what, name, comparison, bar in (
        (
            "1",
            "throughput",
            f"tokens/s of {CLIENTS} clients ÷ forward_batch of {SEQUENCES} sequences",
            "share",
            ">=",
            LEAST_SHARE,
        ),
        ("2", "lone", "milliseconds that the server adds to a lone request", "added_ms", "<=", MOST_ADDED_MS),
        ("3", "first-token", f"seconds to the first token, {FIRST_TOKEN_CLIENTS} clients", "seconds", None, None),
    ):
        if part in figures:
            lines.append(measured_line(number, what, comparison, bar, Spread(**figures[part][name])))
        else:
            lines.append(skipped_line(number, what, comparison, bar, "not measured"))
    return lines

"""Measure how fast a checkpoint's model reads a prompt and generates, on random tokens.

Prefill and decode are measured apart. Each run begins with a cache that holds ``--depth`` tokens of each sequence; the
first run of each is not counted. No tokenizer is needed.

The object that ``--json`` prints has these keys: ``version``, ``checkpoint`` (its path), ``backend``, ``device`` (in
words), ``cache_dtype``, ``prompt_tokens``, ``new_tokens``, ``depth``, ``sequences``, ``repeat``, ``load_seconds``,
``prefill_tokens_per_second`` and ``decode_tokens_per_second`` (medians, of all sequences together; null for a part of 0
tokens), ``prefill_seconds`` and ``decode_seconds`` (of each run), ``packed_bytes``, ``other_weight_bytes``,
``cache_bytes``, ``resident_bytes`` (null where the system does not report it). With ``--mpi``, the sizes are those of
rank 0.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_cy import __version__
from marlin_cy.commands.decoder_model import load_decoder, memory_line, resident_bytes, weight_bytes
from marlin_cy.commands.mpi import add_mpi_options, mpi_group
from marlin_cy.commands.options import (
    add_backend_options,
    add_checkpoint_argument,
    argument_errors,
    checkpoint_folder,
    positive_argument,
)
from marlin_cy.commands.output import LoadProgress, console, escape, megabytes, print_json, rate, table
from marlin_cy.commands.sampling_options import add_cache_option, count_argument
from marlin_cy.decoder.options import CACHE_DTYPE
from marlin_cy.errors import MarlinError

if TYPE_CHECKING:
    from marlin_cy.decoder.model import Model
    from marlin_cy.distributed import Group

__all__ = ["HELP", "add_arguments", "execute"]

HELP = "measure how fast a checkpoint's model reads a prompt and generates"
PAGES = 2 * 16  # more positions of a sequence's cache: the copy of a shared page, and the rest of the last one


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Declare the command's arguments; ``argv`` is the command line."""
    add_checkpoint_argument(parser)
    for name, default, text in (
        ("--prompt-tokens", 512, "tokens of a prompt; 0: do not measure prefill"),
        ("--new-tokens", 64, "tokens to generate; 0: do not measure decode"),
        ("--depth", 0, "tokens in the cache before each run"),
    ):
        parser.add_argument(name, type=count_argument, default=default, metavar="N", help=f"{text}; default: {default}")
    for name, default, text in (
        ("--sequences", 1, "sequences that run together"),
        ("--repeat", 5, "counted runs"),
    ):
        parser.add_argument(
            name, type=positive_argument, default=default, metavar="N", help=f"{text}; default: {default}"
        )
    add_cache_option(parser)
    add_backend_options(parser, argv)
    add_mpi_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if not arguments.prompt_tokens and not arguments.new_tokens:
        arguments.refuse("--prompt-tokens and --new-tokens: got 0 for both, expected tokens to measure")
    with mpi_group(arguments) as group, checkpoint_folder(arguments) as folder:
        report = _measure(folder, arguments, group)
        if arguments.json:
            print_json(report)
        else:
            _print_table(report)
    return 0


def _measure(folder: Path, arguments: argparse.Namespace, group: Group | None) -> dict[str, Any]:
    count = arguments.sequences
    most = arguments.depth + max(arguments.prompt_tokens, arguments.new_tokens)
    loaded = load_decoder(folder, arguments, cache_tokens=count * (most + PAGES), group=group)
    model = loaded.model
    if most > model.context_length:
        raise MarlinError(
            f"--depth {arguments.depth}: {most} tokens with those of a run, but the model has a context of "
            f"{model.context_length}"
        )
    with LoadProgress("measuring") as progress, argument_errors():
        bench = _Bench(model, count, arguments.depth, arguments.repeat, progress)
        prefill = bench.times("prefill", bench.prefill, arguments.prompt_tokens)
        decode = bench.times("decode", bench.decode, arguments.new_tokens)
    packed, others = weight_bytes(model.plan)
    return {
        "version": __version__,
        "checkpoint": str(folder),
        "backend": arguments.backend,
        "device": loaded.device,
        "cache_dtype": arguments.cache_dtype or CACHE_DTYPE,
        **{name: getattr(arguments, name) for name in ("prompt_tokens", "new_tokens", "depth", "sequences", "repeat")},
        "load_seconds": loaded.seconds,
        "prefill_tokens_per_second": _rate(count * arguments.prompt_tokens, prefill),
        "decode_tokens_per_second": _rate(count * arguments.new_tokens, decode),
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "packed_bytes": packed,
        "other_weight_bytes": others,
        "cache_bytes": model.cache_bytes,
        "resident_bytes": resident_bytes(),
    }


class _Bench:
    """Runs of a model on random tokens, each from a cache that holds ``depth`` tokens of each sequence."""

    def __init__(self, model: Model, count: int, depth: int, repeat: int, progress: LoadProgress) -> None:
        import numpy as np

        self._model, self._count, self._repeat, self._progress = model, count, repeat, progress
        self._rng = np.random.default_rng(0)
        self._filled: list[Any] = []
        if depth:
            self._filled = [model.new_sequence() for _ in range(count)]
            self._append(self._filled, depth)

    def times(self, name: str, run: Callable[[list[Any], int], float], tokens: int) -> list[float]:
        """Seconds of each counted run; none for 0 tokens."""
        seconds = []
        for number in range(self._repeat + 1 if tokens else 0):
            sequences = self._sequences()
            try:
                seconds.append(run(sequences, tokens))
            finally:
                for sequence in sequences:
                    self._model.free(sequence)
            self._progress(number + 1, self._repeat + 1, name)
        return seconds[1:]

    def prefill(self, sequences: list[Any], tokens: int) -> float:
        """Seconds in which a prompt is appended to each sequence."""
        return self._append(sequences, tokens)

    def decode(self, sequences: list[Any], tokens: int) -> float:
        """Seconds in which tokens are appended to each sequence one at a time."""
        steps = self._random(tokens).T[:, :, None]
        start = time.perf_counter()
        for step in steps:
            self._model.forward_batch(list(zip(sequences, step, strict=True)))
        return time.perf_counter() - start

    def _append(self, sequences: list[Any], tokens: int) -> float:
        prompts = self._random(tokens)
        start = time.perf_counter()
        self._model.forward_batch(list(zip(sequences, prompts, strict=True)))
        return time.perf_counter() - start

    def _random(self, tokens: int) -> Any:
        """Random tokens ``[sequences, tokens]``."""
        return self._rng.integers(0, self._model.vocab_size, (self._count, tokens))

    def _sequences(self) -> list[Any]:
        """Sequences as deep as those that were filled."""
        if self._filled:
            return [self._model.fork(sequence) for sequence in self._filled]
        return [self._model.new_sequence() for _ in range(self._count)]


def _rate(tokens: int, seconds: list[float]) -> float | None:
    return tokens / statistics.median(seconds) if seconds else None


def _print_table(report: dict[str, Any]) -> None:
    screen = console()
    screen.print(
        f"[bold]{escape(Path(report['checkpoint']).name)}[/bold] on {report['backend']} ({escape(report['device'])}), "
        f"cache in {report['cache_dtype']}, {report['sequences']} sequences, depth {report['depth']}"
    )
    screen.print()
    rows = table("", ">tokens of\na sequence", ">tokens/s", ">slowest", ">fastest")
    for name, length in (("prefill", report["prompt_tokens"]), ("decode", report["new_tokens"])):
        seconds = report[f"{name}_seconds"]
        if seconds:
            rates = [
                report["sequences"] * length / each for each in (statistics.median(seconds), max(seconds), min(seconds))
            ]
            rows.add_row(name, str(length), *map(rate, rates))
    screen.print(rows)
    screen.print(
        f"{memory_line(report)} Cache: {megabytes(report['cache_bytes'])}. Loaded in {report['load_seconds']:.2f} s."
    )

"""Score a text with a checkpoint's model: with packed weights, and for comparison with dense weights.

The object that ``--json`` prints has these keys: ``version``, ``checkpoint`` (its path), ``text`` (its path),
``tokens`` (of the text), ``window``, ``windows``, ``scored_tokens``, ``skipped`` (an object: from the name of each
precision that could not run to the reason) and ``results``, a list of ``name``, ``engine`` ("decoder" or
"transformers"), ``device`` (in words), ``dtype`` (of the activations), ``perplexity`` (per token),
``relative_difference`` (to the first result), ``seconds``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from marlin_cy import __version__
from marlin_cy.backends import backend_factory, backend_names
from marlin_cy.command_line import CommandLine, Precision
from marlin_cy.commands.decoder_model import declared_context, load_decoder
from marlin_cy.commands.options import (
    add_backend_options,
    add_checkpoint_argument,
    checkpoint_folder,
    open_backend,
    positive_argument,
)
from marlin_cy.commands.output import LoadProgress, console, escape, note, print_json, table
from marlin_cy.commands.sampling_options import add_engine_options, engine_of
from marlin_cy.errors import BackendUnavailable, MarlinError, UnsupportedError
from marlin_cy.integrations import needs_extra

__all__ = ["HELP", "add_arguments", "execute"]

HELP = "score a text with a checkpoint's model, packed and dense"
BUILT_IN_TEXT = "validation.txt"
WINDOW, WINDOWS = 512, 32


class Run(NamedTuple):
    """One way to run the model; ``backend`` is None for PyTorch with dense weights.

    ``options`` are options of the backend's contexts. They replace the options of the command line.
    """

    name: str
    backend: str | None
    dtype: str | None
    options: Mapping[str, Any]


# --compare compares all other results with the first one.
DENSE_RUNS = (
    Run("dequantised, float32", None, "float32", {}),
    Run("dequantised, bfloat16", None, "bfloat16", {}),
)


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Declare the command's arguments; ``argv`` is the command line."""
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help=f"a text in UTF-8; default: {BUILT_IN_TEXT} in the folder"
    )
    parser.add_argument(
        "--window",
        type=positive_argument,
        default=WINDOW,
        metavar="N",
        help=f"tokens that the model is given at once; the first one is not scored; default: {WINDOW}",
    )
    parser.add_argument("--all", action="store_true", help=f"score the whole text, not {WINDOWS} windows")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="score every precision and the dequantised model, which needs memory for dense weights",
    )
    add_engine_options(parser)
    compares = any(len(argument) > 2 and "--compare".startswith(argument) for argument in argv)
    add_backend_options(parser, argv, every=compares)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    engine = engine_of(arguments)
    runs = _compared_runs() if arguments.compare else None
    if runs is not None:
        for name in sorted({"dtype"}.union(*(run.options for run in runs))):
            if getattr(arguments, name, None) is not None:
                arguments.refuse(f"--{name.replace('_', '-')}: not with --compare, which runs every one")
    if arguments.window < 2:
        arguments.refuse(f"--window: got {arguments.window}, expected at least 2, as the first token is not scored")
    with checkpoint_folder(arguments) as folder:
        report = _measure(folder, runs, engine, arguments)
    if arguments.json:
        print_json(report)
    else:
        _print_table(report)
    return 0


def _measure(folder: Path, runs: list[Run] | None, engine: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report; ``runs`` is None for the one that the options ask for."""
    file = arguments.text or folder / BUILT_IN_TEXT
    text = _read(file)
    context = declared_context(folder)
    if context is not None and arguments.window > context:
        raise MarlinError(f"--window: got {arguments.window}, but the model has a context of {context} tokens")
    tokens, engine = _tokenize(folder, text, engine)
    count = len(tokens)
    if count < 2:
        raise MarlinError(f"{file}: {count} tokens, expected at least 2")
    window = min(arguments.window, count)
    windows = count // window if arguments.all else min(WINDOWS, count // window)
    results: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for run in [_asked_for(arguments)] if runs is None else runs:
        try:
            model = _load(folder, run, engine, window, arguments)
        except BackendUnavailable as error:
            if runs is None:
                raise
            skipped[run.name] = str(error)
            continue
        start = time.perf_counter()
        with LoadProgress("scoring") as progress:
            value = model.perplexity(tokens, window, windows, progress)
        if not math.isfinite(value):
            raise MarlinError(f"{run.name}: the model's output has NaN or infinity")
        results.append(
            {
                "name": run.name,
                "engine": model.engine,
                "device": model.device,
                "dtype": model.dtype,
                "perplexity": value,
                "relative_difference": value / results[0]["perplexity"] - 1 if results else 0.0,
                "seconds": time.perf_counter() - start,
            }
        )
    return {
        "version": __version__,
        "checkpoint": str(folder),
        "text": str(file),
        "tokens": count,
        "window": window,
        "windows": windows,
        "scored_tokens": windows * (window - 1),
        "skipped": skipped,
        "results": results,
    }


class Scored(NamedTuple):
    """A model that is ready to be scored: ``perplexity(tokens, window, windows, progress)``."""

    engine: str
    device: str
    dtype: str
    perplexity: Callable[[list[int], int, int, LoadProgress], float]


def _tokenize(folder: Path, text: str, engine: str) -> tuple[list[int], str]:
    """The tokens of a text, and the engine: that of transformers if the decoder cannot read the tokenizer."""
    if engine != "transformers":
        from marlin_cy.decoder.text import Tokenizer

        try:
            return Tokenizer(folder).encode(text), engine
        except UnsupportedError as error:
            if engine == "decoder":
                raise
            note(f"the decoder does not read this tokenizer ({error}); transformers runs the model")
    with needs_extra():
        from marlin_cy.commands import language_model
    return language_model.tokenize(language_model.load_tokenizer(folder), text)[0].tolist(), "transformers"


def _load(folder: Path, run: Run, engine: str, window: int, arguments: argparse.Namespace) -> Scored:
    """The model of a run, by the decoder where it has the family, unless the options ask for transformers."""
    if run.backend is not None and engine != "transformers":
        try:
            return _of_decoder(folder, run, window, arguments)
        except UnsupportedError as error:
            if engine == "decoder":
                raise
            note(f"the decoder does not run this model ({error}); transformers runs it")
    return _of_transformers(folder, run, arguments)


def _of_decoder(folder: Path, run: Run, window: int, arguments: argparse.Namespace) -> Scored:
    from marlin_cy.decoder.perplexity import perplexity

    loaded = load_decoder(folder, arguments, cache_tokens=window, backend=run.backend, **run.options)
    return Scored("decoder", loaded.device, "float32", partial(perplexity, loaded.model))


def _of_transformers(folder: Path, run: Run, arguments: argparse.Namespace) -> Scored:
    with needs_extra():
        from marlin_cy.commands import language_model
    language_model.set_torch_threads(arguments)
    place: language_model.DensePlace | language_model.PackedPlace
    if run.backend is None:
        place = language_model.DensePlace()
    else:
        backend = open_backend(run.backend, arguments)
        place = language_model.packed_place(backend, {**backend.context_from_arguments(arguments), **run.options})
    model = place.load(folder, run.dtype)
    return Scored(
        "transformers",
        place.description,
        str(model.dtype).removeprefix("torch."),
        lambda tokens, *sizes: language_model.perplexity(model, language_model.as_tensor(tokens), *sizes),
    )


def _asked_for(arguments: argparse.Namespace) -> Run:
    """The run that the options ask for, named after the precision whose context options it has, if there is one."""
    options = open_backend(arguments.backend, arguments).context_from_arguments(arguments)
    named = [
        precision.name
        for precision in _precisions(arguments.backend)
        if precision.options and precision.options.items() <= options.items()
    ]
    return Run(", ".join([arguments.backend, *named]), arguments.backend, arguments.dtype, {})


def _compared_runs() -> list[Run]:
    """The runs of ``--compare``: with dense weights, and in each precision of each backend."""
    runs = list(DENSE_RUNS)
    for backend in backend_names():
        for precision in _precisions(backend):
            name = ", ".join(filter(None, (backend, precision.name)))
            runs.append(Run(name, backend, precision.dtype, precision.options))
    return runs


def _precisions(backend: str) -> Sequence[Precision]:
    """A backend's precisions, or the default ones if it has none or cannot be imported."""
    try:
        precisions = getattr(backend_factory(backend), "precisions", CommandLine.precisions)
    except BackendUnavailable:
        precisions = CommandLine.precisions
    found: Sequence[Precision] = precisions()
    return found


def _read(file: Path) -> str:
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise MarlinError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if not text:
        raise MarlinError(f"{file}: empty, expected a text to score")
    return text


def _print_table(report: dict[str, Any]) -> None:
    screen = console()
    screen.print(
        f"[bold]{escape(Path(report['checkpoint']).name)}[/bold]: {report['windows']} windows of {report['window']} "
        f"tokens of {escape(Path(report['text']).name)} ({report['tokens']} tokens), {report['scored_tokens']} scored"
    )
    screen.print()
    rows = table("weights", "activations", ">perplexity\nper token", ">relative\ndifference", ">time\ns", "on")
    for position, result in enumerate(report["results"]):
        rows.add_row(
            result["name"],
            result["dtype"],
            f"{result['perplexity']:.5f}",
            "—" if position == 0 else f"{result['relative_difference']:+.4%}",
            f"{result['seconds']:.1f}",
            escape(result["device"]),
        )
    screen.print(rows)
    for name, reason in report["skipped"].items():
        screen.print(f"Skipped: {escape(name)} ({escape(reason)})")

"""How well does a checkpoint's model predict a text? Packed, and beside it the same weights dense.

The object that ``--json`` prints has these keys: ``version``, ``checkpoint`` (its path), ``text`` (its path),
``tokens`` (of it), ``window``, ``windows``, ``scored_tokens``, ``skipped`` (an object: what could not be run, and why)
and ``results``, a list of ``name``, ``device`` (in words), ``dtype`` (of the activations), ``perplexity`` (a token),
``relative_difference`` (to the first result), ``seconds``.
"""

import math
import time
from pathlib import Path

from rich.markup import escape

from marlin_cy import __version__
from marlin_cy.commands.options import (
    add_backend_options,
    add_checkpoint_argument,
    check_backend_options,
    checkpoint_folder,
    positive,
)
from marlin_cy.commands.output import LoadProgress, console, print_json, table
from marlin_cy.errors import BackendUnavailable, MarlinError
from marlin_cy.integrations import needs_extra

__all__ = ["HELP", "add_arguments", "execute"]

HELP = "score a text with a checkpoint's model, packed and dense"
BUILT_IN_TEXT = "validation.txt"
WINDOW, WINDOWS = 512, 32

# Of --compare: name, backend (None: PyTorch alone, with dense weights), dtype, compute dtype. The first is what the
# others are held against.
COMPARED = (
    ("dequantised, float32", None, "float32", None),
    ("dequantised, bfloat16", None, "bfloat16", None),
    ("cpu, int16", "cpu", "float32", "int16"),
    ("cpu, int8", "cpu", "float32", "int8"),
    ("opencl, float16", "opencl", "float16", None),
)


def add_arguments(parser):
    """Declare the command's arguments."""
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help=f"in UTF-8; default: {BUILT_IN_TEXT} in the folder, if it is there"
    )
    parser.add_argument(
        "--window",
        type=positive,
        default=WINDOW,
        metavar="N",
        help=f"tokens that the model sees at once, the first of which is not scored; default: {WINDOW}",
    )
    parser.add_argument("--all", action="store_true", help=f"the whole text, not the first {WINDOWS} windows alone")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="every precision beside the dequantised model, which needs memory for dense weights",
    )
    add_backend_options(parser)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the activations; default: that of the checkpoint's weights",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(refuse=parser.error)


def execute(arguments):
    """Run the command; returns the exit code."""
    if arguments.compare:
        for name in ("compute_dtype", "dtype"):
            if getattr(arguments, name) is not None:
                arguments.refuse(f"--{name.replace('_', '-')}: not with --compare, which takes them all")
    else:
        check_backend_options(arguments)
    if arguments.window < 2:
        arguments.refuse(f"--window: got {arguments.window}, expected at least 2: the first token is not scored")
    with checkpoint_folder(arguments) as folder:
        report = _measure(folder, arguments)
    if arguments.json:
        print_json(report)
    else:
        _print_table(report)
    return 0


def _measure(folder, arguments):
    with needs_extra():
        from marlin_cy.commands import language_model
    file = arguments.text or folder / BUILT_IN_TEXT
    text = _read(file)
    context = language_model.context_length(folder)
    if context is not None and arguments.window > context:
        raise MarlinError(f"--window: got {arguments.window}, but the model can see {context} tokens at once")
    tokens = language_model.tokenize(language_model.load_tokenizer(folder), text)
    count = tokens.shape[1]
    if count < 2:
        raise MarlinError(f"{file}: {count} tokens, expected at least 2")
    window = min(arguments.window, count)
    windows = count // window if arguments.all else min(WINDOWS, count // window)
    results, skipped = [], {}
    for name, backend, dtype, compute_dtype in COMPARED if arguments.compare else [_asked_for(arguments)]:
        try:
            place = language_model.place_of(backend, compute_dtype, arguments)
        except BackendUnavailable as error:
            if not arguments.compare:
                raise
            skipped[name] = str(error)
            continue
        model = place.load(folder, dtype)
        start = time.perf_counter()
        with LoadProgress("scoring") as progress:
            value = language_model.perplexity(model, tokens, window, windows, progress)
        if not math.isfinite(value):
            raise MarlinError(f"{name}: the model's output has NaN or infinity")
        results.append(
            {
                "name": name,
                "device": place.description,
                "dtype": str(model.dtype).removeprefix("torch."),
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


def _asked_for(arguments):
    """The row of :data:`COMPARED` that the options mean."""
    compute_dtype = (arguments.compute_dtype or "int16") if arguments.backend == "cpu" else None
    name = ", ".join(filter(None, (arguments.backend, compute_dtype)))
    return name, arguments.backend, arguments.dtype, compute_dtype


def _read(file):
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise MarlinError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if not text:
        raise MarlinError(f"{file}: empty, expected a text to score")
    return text


def _print_table(report):
    screen = console()
    screen.print(
        f"[bold]{escape(Path(report['checkpoint']).name)}[/bold]: {report['windows']} windows of {report['window']} "
        f"tokens of {escape(Path(report['text']).name)} ({report['tokens']} tokens), {report['scored_tokens']} scored"
    )
    screen.print()
    rows = table("weights", "activations", ">perplexity\na token", ">relative\ndifference", ">time\ns", "on")
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
        screen.print(f"Left out: {escape(name)} ({escape(reason)})")

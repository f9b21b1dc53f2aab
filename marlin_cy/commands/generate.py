"""Continue a text with a checkpoint's model, token by token.

The object that ``--json`` prints has these keys: ``version``, ``checkpoint`` (its path), ``backend``, ``device`` (in
words), ``dtype`` (of the activations), ``load_seconds``, ``prompt``, ``text``, ``tokens`` (of the text),
``stopped`` ("end": the model ended the text; "length": --max-new-tokens; "context": the model's context is full),
``prompt_tokens``, ``prompt_tokens_per_second``, ``generated_tokens``, ``generated_tokens_per_second`` (without the
first token; null where it is the only one), ``packed_bytes``, ``other_weight_bytes``, ``resident_bytes`` (null where
the system does not report it).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from marlin_cy import __version__
from marlin_cy.commands.options import (
    add_backend_options,
    add_checkpoint_argument,
    checkpoint_folder,
    open_backend,
    positive_argument,
)
from marlin_cy.commands.output import console, print_json, table
from marlin_cy.errors import MarlinError
from marlin_cy.integrations import needs_extra

__all__ = ["HELP", "add_arguments", "execute"]

HELP = "continue a text with a checkpoint's model"
DTYPES = ("bfloat16", "float16", "float32")
STOPPED = {"end": "the model ended the text", "length": "--max-new-tokens", "context": "the model's context is full"}


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Declare the command's arguments; ``argv`` is the command line."""
    add_checkpoint_argument(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with the text, in UTF-8")
    parser.add_argument("--max-new-tokens", type=positive_argument, default=128, metavar="N", help="default: 128")
    add_backend_options(parser, argv)
    parser.add_argument("--dtype", choices=DTYPES, help="of the activations; default: as the checkpoint's weights")
    parser.add_argument(
        "--temperature", type=_number(math.inf), metavar="T", help="draw tokens; default: take the most likely one"
    )
    parser.add_argument("--top-p", type=_number(1), metavar="P", help="with --temperature: draw from the likeliest")
    parser.add_argument("--seed", type=int, metavar="N", help="with --temperature; default: 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text as it comes")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    for name in ("top_p", "seed"):
        if getattr(arguments, name) is not None and arguments.temperature is None:
            arguments.refuse(f"--{name.replace('_', '-')}: only with --temperature")
    prompt = _prompt(arguments)
    with checkpoint_folder(arguments) as folder:
        report = _generate(folder, prompt, arguments)
    if arguments.json:
        print_json(report)
    else:
        _print_figures(report)
    return 0


def _generate(folder: Path, prompt: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The report. Without ``--json`` the text is written as the model produces it."""
    with needs_extra():
        from marlin_cy.commands import language_model
        from marlin_cy.integrations.transformers import weight_bytes
    backend = open_backend(arguments.backend, arguments)
    language_model.set_torch_threads(arguments)
    place = language_model.packed_place(backend, backend.context_from_arguments(arguments))
    tokenizer = language_model.load_tokenizer(folder)
    tokens = language_model.tokenize(tokenizer, prompt)
    prompt_tokens, room = tokens.shape[1], math.inf
    if prompt_tokens == 0:
        raise MarlinError("the prompt has no tokens")
    context = language_model.context_length(folder)
    if context is not None:
        room = context - prompt_tokens
        if room < 1:
            raise MarlinError(f"the prompt has {prompt_tokens} tokens, but the model has a context of {context}")
    start = time.perf_counter()
    model = place.load(folder, arguments.dtype)
    load_seconds = time.perf_counter() - start
    generated = language_model.generate(
        model,
        tokenizer,
        tokens,
        min(arguments.max_new_tokens, room),
        temperature=arguments.temperature,
        top_p=arguments.top_p or 1.0,
        seed=arguments.seed or 0,
        write=(lambda text: None) if arguments.json else _write,
    )
    count = len(generated.tokens)
    packed, others = weight_bytes(model)
    return {
        "version": __version__,
        "checkpoint": str(folder),
        "backend": arguments.backend,
        "device": place.description,
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_seconds": load_seconds,
        "prompt": prompt,
        "text": generated.text,
        "tokens": generated.tokens,
        "stopped": "length" if count == arguments.max_new_tokens else "context" if count == room else "end",
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_per_second": prompt_tokens / generated.prompt_seconds,
        "generated_tokens": count,
        "generated_tokens_per_second": (count - 1) / generated.seconds if count > 1 else None,
        "packed_bytes": packed,
        "other_weight_bytes": others,
        "resident_bytes": resident_bytes(),
    }


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_figures(report: dict[str, Any]) -> None:
    """Print the figures to stderr, so that a pipe from stdout gets only the text."""
    _write("\n")
    screen = console(sys.stderr)
    screen.print()
    screen.print(
        f"[bold]{escape(Path(report['checkpoint']).name)}[/bold] on {report['backend']} ({escape(report['device'])}), "
        f"activations in {report['dtype']}"
    )
    rate = report["generated_tokens_per_second"]
    rows = table("", ">tokens", ">tokens/s", "")
    rows.add_row("prompt", str(report["prompt_tokens"]), f"{report['prompt_tokens_per_second']:#.3g}")
    rows.add_row(
        "generated",
        str(report["generated_tokens"]),
        "—" if rate is None else f"{rate:#.3g}",
        f"stopped: {STOPPED[report['stopped']]}",
    )
    screen.print(rows)
    resident = report["resident_bytes"]
    screen.print(
        ("" if resident is None else f"Memory: {_megabytes(resident)} resident. ")
        + f"Weights: {_megabytes(report['packed_bytes'])} packed, {_megabytes(report['other_weight_bytes'])} others. "
        f"Loaded in {report['load_seconds']:.2f} s."
    )


def _prompt(arguments: argparse.Namespace) -> str:
    """The prompt.

    Raises
    ------
    MarlinError
        It is empty, or not UTF-8.
    """
    prompt: str
    source: Path | str
    if arguments.prompt_file is None:
        source, prompt = "--prompt", arguments.prompt
        try:
            prompt.encode()
        except UnicodeEncodeError:
            # Python decodes invalid UTF-8 bytes of the command line to surrogates.
            raise MarlinError(f"{source}: not UTF-8") from None
    else:
        file: Path = arguments.prompt_file
        source = file
        try:
            prompt = file.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise MarlinError(f"{source}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if not prompt:
        raise MarlinError(f"{source}: empty, expected a text to continue")
    return prompt


def resident_bytes() -> int | None:
    """Resident memory of this process, mapped files included; None where the system does not report it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _number(most: float) -> Callable[[str], float]:
    """A ``type`` of argparse: a number above 0 and at most ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most or value == math.inf:
            limit = "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0{limit}")
        return value

    return parse

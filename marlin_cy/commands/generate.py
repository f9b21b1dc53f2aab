"""Continue a text with a checkpoint's model, token by token.

The object that ``--json`` prints has these keys: ``version``, ``checkpoint`` (its path), ``engine`` ("decoder" or
"transformers"), ``backend``, ``device`` (in words), ``dtype`` (of the activations), ``cache_dtype`` (of the decoder's
cache, else null), ``load_seconds``, ``prompt``, ``text``, ``tokens`` (of the text), ``stopped`` ("end": the model ended
the text; "stop": --stop; "length": --max-new-tokens; "context": the model's context is full), ``prompt_tokens``,
``prompt_tokens_per_second``, ``generated_tokens``, ``generated_tokens_per_second`` (without the first token; null where
it is the only one), ``packed_bytes``, ``other_weight_bytes``, ``resident_bytes`` (null where the system does not report
it).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_cy import __version__
from marlin_cy.commands.decoder_model import (
    declared_context,
    load_decoder,
    memory_line,
    resident_bytes,
    weight_bytes,
)
from marlin_cy.commands.mpi import add_mpi_options, mpi_group
from marlin_cy.commands.options import (
    add_backend_options,
    add_checkpoint_argument,
    argument_errors,
    checkpoint_folder,
    open_backend,
    positive_argument,
)
from marlin_cy.commands.output import LoadProgress, console, escape, note, print_json, rate, table
from marlin_cy.commands.sampling_options import add_engine_options, add_sampling_options, engine_of, sampling_of
from marlin_cy.decoder.options import CACHE_DTYPE
from marlin_cy.errors import MarlinError, UnsupportedError
from marlin_cy.integrations import needs_extra

if TYPE_CHECKING:
    from marlin_cy.distributed import Group

__all__ = ["HELP", "add_arguments", "execute"]

HELP = "continue a text with a checkpoint's model"
STOPPED = {
    "end": "the model ended the text",
    "stop": "--stop",
    "length": "--max-new-tokens",
    "context": "the model's context is full",
}
DECODER_ONLY = ("stop", "presence_penalty")


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Declare the command's arguments; ``argv`` is the command line."""
    add_checkpoint_argument(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with the text, in UTF-8")
    parser.add_argument("--max-new-tokens", type=positive_argument, default=128, metavar="N", help="default: 128")
    add_engine_options(parser)
    add_backend_options(parser, argv)
    add_mpi_options(parser)
    add_sampling_options(parser, "Without --temperature, the most likely token is taken each time.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text as it comes")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    engine = engine_of(arguments)
    sampling = sampling_of(arguments, needs_temperature=True)
    prompt = _prompt(arguments)
    if arguments.mpi and engine == "transformers":
        arguments.refuse("--mpi: only with the decoder, got --engine transformers")
    with mpi_group(arguments) as group, checkpoint_folder(arguments) as folder:
        report = _generate(folder, prompt, engine, sampling, arguments, group)
        if arguments.json:
            print_json(report)
        elif group is None or group.rank == 0:
            _print_figures(report)
    return 0


def _generate(
    folder: Path,
    prompt: str,
    engine: str,
    sampling: dict[str, Any],
    arguments: argparse.Namespace,
    group: Group | None,
) -> dict[str, Any]:
    """The report. Without ``--json`` the text is written as the model produces it."""
    if engine != "transformers":
        try:
            return _with_decoder(folder, prompt, sampling, arguments, group)
        except UnsupportedError as error:
            if engine == "decoder" or group is not None:
                raise
            note(f"the decoder does not run this model ({error}); transformers runs it")
    return _with_transformers(folder, prompt, sampling, arguments)


def _with_decoder(
    folder: Path, prompt: str, sampling: dict[str, Any], arguments: argparse.Namespace, group: Group | None
) -> dict[str, Any]:
    from marlin_cy.decoder.generate import generate, keep_tokenizer
    from marlin_cy.decoder.text import Tokenizer

    tokenizer = Tokenizer(folder)
    tokens = tokenizer.encode(prompt)
    _check_length(len(tokens), declared_context(folder))
    loaded = load_decoder(folder, arguments, cache_tokens=len(tokens) + arguments.max_new_tokens, group=group)
    model = loaded.model
    keep_tokenizer(model, tokenizer)
    write = (lambda text: None) if arguments.json else _write
    with LoadProgress("reading the") as progress, argument_errors():
        pieces = generate(model, tokens, max_new_tokens=arguments.max_new_tokens, progress=progress, **sampling)
        start = time.perf_counter()
        written = [next(pieces)]
        first = time.perf_counter()
    write(written[0].text)
    for piece in pieces:
        written.append(piece)
        write(piece.text)
    end = time.perf_counter()
    reason = written[-1].finish_reason
    if reason == "stop" and written[-1].tokens[0] in tokenizer.stop_ids:
        reason = "end"
    packed, others = weight_bytes(model.plan)
    return _report(
        folder,
        prompt,
        arguments,
        engine="decoder",
        device=loaded.device,
        dtype="float32",
        cache_dtype=arguments.cache_dtype or CACHE_DTYPE,
        load_seconds=loaded.seconds,
        text="".join(piece.text for piece in written),
        tokens=[token for piece in written for token in piece.tokens],
        stopped=reason,
        prompt_tokens=len(tokens),
        prompt_seconds=first - start,
        seconds=end - first,
        packed_bytes=packed,
        other_weight_bytes=others,
    )


def _with_transformers(
    folder: Path, prompt: str, sampling: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    for name in DECODER_ONLY:
        if name in sampling:
            raise MarlinError(f"--{name.replace('_', '-')}: only with the decoder, but transformers runs this model")
    with needs_extra():
        from marlin_cy.commands import language_model
        from marlin_cy.integrations import transformers
    backend = open_backend(arguments.backend, arguments)
    language_model.set_torch_threads(arguments)
    place = language_model.packed_place(backend, backend.context_from_arguments(arguments))
    tokenizer = language_model.load_tokenizer(folder)
    tokens = language_model.tokenize(tokenizer, prompt)
    count, context = tokens.shape[1], language_model.context_length(folder)
    _check_length(count, context)
    room = math.inf if context is None else context - count
    start = time.perf_counter()
    model = place.load(folder, arguments.dtype)
    load_seconds = time.perf_counter() - start
    generated = language_model.generate(
        model,
        tokenizer,
        tokens,
        min(arguments.max_new_tokens, room),
        sampling,
        write=(lambda text: None) if arguments.json else _write,
    )
    packed, others = transformers.weight_bytes(model)
    new = len(generated.tokens)
    return _report(
        folder,
        prompt,
        arguments,
        engine="transformers",
        device=place.description,
        dtype=str(model.dtype).removeprefix("torch."),
        cache_dtype=None,
        load_seconds=load_seconds,
        text=generated.text,
        tokens=generated.tokens,
        stopped="length" if new == arguments.max_new_tokens else "context" if new == room else "end",
        prompt_tokens=count,
        prompt_seconds=generated.prompt_seconds,
        seconds=generated.seconds,
        packed_bytes=packed,
        other_weight_bytes=others,
    )


def _check_length(prompt_tokens: int, context: int | None) -> None:
    if prompt_tokens == 0:
        raise MarlinError("the prompt has no tokens")
    if context is not None and prompt_tokens >= context:
        raise MarlinError(f"the prompt has {prompt_tokens} tokens, but the model has a context of {context}")


def _report(
    folder: Path,
    prompt: str,
    arguments: argparse.Namespace,
    *,
    prompt_tokens: int,
    prompt_seconds: float,
    tokens: list[int],
    seconds: float,
    **figures: Any,
) -> dict[str, Any]:
    count = len(tokens)
    return {
        "version": __version__,
        "checkpoint": str(folder),
        "backend": arguments.backend,
        "prompt": prompt,
        "prompt_tokens": prompt_tokens,
        "prompt_tokens_per_second": prompt_tokens / prompt_seconds,
        "tokens": tokens,
        "generated_tokens": count,
        "generated_tokens_per_second": (count - 1) / seconds if count > 1 else None,
        "resident_bytes": resident_bytes(),
        **figures,
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
        f"{report['engine']}, activations in {report['dtype']}"
    )
    generated = report["generated_tokens_per_second"]
    rows = table("", ">tokens", ">tokens/s", "")
    rows.add_row("prompt", str(report["prompt_tokens"]), rate(report["prompt_tokens_per_second"]))
    rows.add_row(
        "generated",
        str(report["generated_tokens"]),
        "—" if generated is None else rate(generated),
        f"stopped: {STOPPED[report['stopped']]}",
    )
    screen.print(rows)
    screen.print(f"{memory_line(report)} Loaded in {report['load_seconds']:.2f} s.")


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

"""Continue a text with a checkpoint's model, token by token.

The object that ``--json`` prints has these keys: ``version``, ``checkpoint`` (its path), ``backend``, ``device`` (in
words), ``dtype`` (of the activations), ``load_seconds``, ``prompt``, ``text``, ``tokens`` (the text's),
``stopped`` ("end": the model ended the text; "length": --max-new-tokens; "context": the model can see no more),
``prompt_tokens``, ``prompt_tokens_per_second``, ``generated_tokens``, ``generated_tokens_per_second`` (of those after
the first; null where there are none), ``packed_bytes``, ``other_weight_bytes``, ``resident_bytes`` (null where the
system does not say).
"""

import argparse
import math
import sys
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
from marlin_cy.commands.output import console, print_json, table
from marlin_cy.errors import MarlinError
from marlin_cy.integrations import needs_extra

__all__ = ["HELP", "add_arguments", "execute"]

HELP = "continue a text with a checkpoint's model"
DTYPES = ("bfloat16", "float16", "float32")
STOPPED = {"end": "the model ended the text", "length": "--max-new-tokens", "context": "the model can see no more"}


def add_arguments(parser):
    """Declare the command's arguments."""
    add_checkpoint_argument(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="what to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file with it, in UTF-8")
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="default: 128")
    add_backend_options(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="of the activations; default: that of the checkpoint's weights")
    parser.add_argument(
        "--temperature", type=_number(math.inf), metavar="T", help="draw tokens; default: take the most likely one"
    )
    parser.add_argument("--top-p", type=_number(1), metavar="P", help="with --temperature: from the most likely ones")
    parser.add_argument("--seed", type=int, metavar="N", help="with --temperature; default: 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text as it comes")
    parser.set_defaults(refuse=parser.error)


def execute(arguments):
    """Run the command; returns the exit code."""
    check_backend_options(arguments)
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


def _generate(folder, prompt, arguments):
    """The report; the text is written as it comes unless ``--json`` is given."""
    with needs_extra():
        from marlin_cy.commands import language_model
        from marlin_cy.integrations.transformers import weight_bytes
    place = language_model.place_of(arguments.backend, arguments.compute_dtype or "int16", arguments)
    tokenizer = language_model.load_tokenizer(folder)
    tokens = language_model.tokenize(tokenizer, prompt)
    prompt_tokens, room = tokens.shape[1], math.inf
    if prompt_tokens == 0:
        raise MarlinError("the prompt has no tokens")
    context = language_model.context_length(folder)
    if context is not None:
        room = context - prompt_tokens
        if room < 1:
            raise MarlinError(f"the prompt has {prompt_tokens} tokens, but the model can see {context} at once")
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


def _write(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_figures(report):
    """After the text, to stderr: a pipe gets the text alone."""
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


def _prompt(arguments):
    """The prompt; refuses what is none."""
    if arguments.prompt_file is None:
        source, prompt = "--prompt", arguments.prompt
        try:
            prompt.encode()
        except UnicodeEncodeError:
            # The system hands over bytes that are no UTF-8 as halves of surrogate pairs.
            raise MarlinError(f"{source}: not UTF-8") from None
    else:
        source = arguments.prompt_file
        try:
            prompt = source.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise MarlinError(f"{source}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if not prompt:
        raise MarlinError(f"{source}: empty, expected a text to continue")
    return prompt


def resident_bytes():
    """The memory of this process that is in RAM, mapped files included; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def _megabytes(count):
    return f"{count / 1e6:,.1f} MB"


def _number(most):
    """A number above 0 and at most ``most``, for argparse."""

    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= most or value == math.inf:
            limit = "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a number above 0{limit}")
        return value

    return parse

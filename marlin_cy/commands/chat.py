"""Talk with a checkpoint's model.

Each line of the input is a message. ``/reset`` begins the conversation anew, and ``/exit`` or the end of the input ends
the program. Ctrl-C stops an answer. The answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_cy.commands.decoder_model import add_context_option, context_of, load_decoder, resident_bytes
from marlin_cy.commands.options import (
    add_backend_options,
    add_checkpoint_argument,
    checkpoint_folder,
    positive_argument,
)
from marlin_cy.commands.output import LoadProgress, megabytes, note, rate
from marlin_cy.commands.sampling_options import add_cache_option, add_sampling_options, sampling_of
from marlin_cy.errors import MarlinError

if TYPE_CHECKING:
    from marlin_cy.decoder.writer import Piece

__all__ = ["HELP", "add_arguments", "execute"]

HELP = "talk with a checkpoint's model"
PROMPT = "> "


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Declare the command's arguments; ``argv`` is the command line."""
    add_checkpoint_argument(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message, before all others")
    parser.add_argument(
        "--max-new-tokens", type=positive_argument, metavar="N", help="of an answer; default: until the model ends it"
    )
    add_context_option(parser, "tokens of the whole conversation")
    add_cache_option(parser)
    add_backend_options(parser, argv)
    add_sampling_options(parser, "By default as the folder's generation_config.json says.")


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    sampling = sampling_of(arguments, needs_temperature=False)
    with checkpoint_folder(arguments) as folder:
        return _Talk(folder, arguments, sampling).run()


class _Talk:
    """A conversation on the terminal."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, sampling: dict[str, Any]) -> None:
        from marlin_cy.decoder.chat import Chat
        from marlin_cy.decoder.generate import keep_tokenizer
        from marlin_cy.decoder.sampling import read_sampling
        from marlin_cy.decoder.text import Tokenizer

        tokenizer = Tokenizer(folder)
        tokenizer.check_chat()
        read_sampling(folder, **sampling)
        loaded = load_decoder(folder, arguments, context_length=context_of(folder, arguments))
        keep_tokenizer(loaded.model, tokenizer)
        self._chat = Chat(loaded.model)
        self._options = {**sampling, "max_new_tokens": arguments.max_new_tokens}
        self._system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
        self._messages: list[dict[str, str]] = list(self._system)
        self._tokens, self._seconds = 0, 0.0
        note(f"{folder.name} on {arguments.backend} ({loaded.device}), loaded in {loaded.seconds:.2f} s")
        note("/reset begins anew, /exit ends, Ctrl-C stops an answer")

    def run(self) -> int:
        """Answer the input's lines; returns the exit code."""
        failed = False
        while (line := self._read()) is not None:
            text = line.strip()
            if text == "/exit":
                break
            if text == "/reset":
                self._messages = list(self._system)
            elif text.startswith("/"):
                note(f"got {text.split()[0]}, expected /reset, /exit or a message that does not begin with /")
            elif text:
                failed = not self._answer(text) or failed
        self._print_figures()
        # On a terminal the user has seen the error and gone on.
        return int(failed and not sys.stdin.isatty())

    def _read(self) -> str | None:
        """The next line; None at the end of the input. Ctrl-C begins another line."""
        while True:
            if sys.stdin.isatty():
                sys.stderr.write(PROMPT)
                sys.stderr.flush()
            try:
                return sys.stdin.readline() or None
            except KeyboardInterrupt:
                sys.stderr.write("\n")
            except UnicodeDecodeError as error:
                raise MarlinError(f"the input: not UTF-8 ({error.reason} at byte {error.start})") from error

    def _answer(self, text: str) -> bool:
        """Answer a message, and keep both if there is an answer; whether there was no error."""
        messages = [*self._messages, {"role": "user", "content": text}]
        answer, tokens, good, end = "", 0, True, ""
        pieces: Generator[Piece, None, None] | None = None
        start = time.perf_counter()
        try:
            with LoadProgress("reading the") as progress:
                pieces = self._chat.answer(messages, progress=progress, **self._options)
                piece = next(pieces)
            first = time.perf_counter()
            while True:
                answer, tokens = answer + piece.text, tokens + 1
                sys.stdout.write(piece.text)
                sys.stdout.flush()
                if piece.finish_reason is not None:
                    end = ENDS.get(piece.finish_reason, "")
                    break
                piece = next(pieces)
        except KeyboardInterrupt:
            end = "; stopped"
            if pieces is not None:
                pieces.close()
        except (MarlinError, ValueError) as error:
            print(f"marlin-cy: error: {error}", file=sys.stderr)
            good = False
        if tokens:
            sys.stdout.write("\n")
            sys.stdout.flush()
            seconds = time.perf_counter() - first
            self._tokens, self._seconds = self._tokens + tokens - 1, self._seconds + seconds
            speed = f", {rate((tokens - 1) / seconds)} tokens/s" if tokens > 1 else ""
            note(f"{tokens} tokens{speed}, the first after {first - start:.2f} s{end}")
            self._messages = [*messages, {"role": "assistant", "content": answer}]
        return good

    def _print_figures(self) -> None:
        speed = f"{rate(self._tokens / self._seconds)} tokens/s. " if self._seconds else ""
        resident = resident_bytes()
        note(speed + ("" if resident is None else f"Memory: {megabytes(resident)} resident."))


ENDS = {
    "length": "; the answer has --max-new-tokens",
    "context": "; the context is full: /reset begins anew",
}

"""Serve a checkpoint's model over HTTP, with the OpenAI interface.

It has ``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models``; ``/health``, ``/metrics`` for Prometheus, and a
page to chat with at ``/``. Ctrl-C ends the server after the answers that it has begun or accepted; a second Ctrl-C ends
it at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from marlin_cy.commands.decoder_model import add_context_option, context_of, load_decoder
from marlin_cy.commands.options import (
    add_backend_options,
    add_checkpoint_argument,
    checkpoint_folder,
    positive_argument,
)
from marlin_cy.commands.output import note
from marlin_cy.commands.sampling_options import add_cache_option, count_argument
from marlin_cy.decoder.generate import keep_tokenizer
from marlin_cy.decoder.text import Tokenizer
from marlin_cy.errors import MarlinError
from marlin_cy.extras import needs

__all__ = ["HELP", "add_arguments", "execute"]

HELP = "serve a checkpoint's model over HTTP, with the OpenAI interface"
KEY_VARIABLE = "MARLIN_CY_API_KEY"
PORT = 8000
SEQUENCES = 16
WAITING = 128
CACHE_CONTEXTS = 2
"""Contexts that the cache has room for by default. Requests that need more are put back, and continue later."""


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Declare the command's arguments; ``argv`` is the command line."""
    add_checkpoint_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at; default: %(default)s")
    parser.add_argument(
        "--port", type=_port, default=PORT, metavar="N", help="default: %(default)s; 0: any that is free"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"refuse requests without this key; default: the environment variable {KEY_VARIABLE}, else no key",
    )
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model; default: the folder's name")
    parser.add_argument(
        "--max-sequences",
        type=positive_argument,
        default=SEQUENCES,
        metavar="N",
        help="texts that are written at once, at most; default: %(default)s",
    )
    parser.add_argument(
        "--max-waiting",
        type=count_argument,
        default=WAITING,
        metavar="N",
        help="texts that wait for their turn, at most; others are refused; default: %(default)s",
    )
    add_context_option(parser, "most tokens of a text, with its prompt")
    parser.add_argument(
        "--cache-tokens",
        type=positive_argument,
        metavar="N",
        help=f"most tokens of all texts together; default: {CACHE_CONTEXTS} times --context-length",
    )
    add_cache_option(parser)
    add_backend_options(parser, argv)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    with needs("uvicorn, starlette, pydantic and prometheus-client", "serve"):
        from marlin_cy.serve import server
        from marlin_cy.serve.service import Service
    key = os.environ.get(KEY_VARIABLE) if arguments.api_key is None else arguments.api_key
    if key == "":
        raise MarlinError(f"--api-key or {KEY_VARIABLE}: got an empty text, expected a key")
    with checkpoint_folder(arguments) as folder, server.open_socket(arguments.host, arguments.port) as bound:
        tokenizer = Tokenizer(folder)
        context = context_of(folder, arguments)
        cache = arguments.cache_tokens or CACHE_CONTEXTS * context
        if cache < context:
            raise MarlinError(f"--cache-tokens: got {cache}, expected at least the context of {context}")
        loaded = load_decoder(folder, arguments, context_length=context, cache_tokens=cache)
        keep_tokenizer(loaded.model, tokenizer)
        service = Service(
            loaded.model,
            arguments.model_name or _name(folder),
            max_sequences=arguments.max_sequences,
            max_waiting=arguments.max_waiting,
        )
        note(f"{service.name} on {arguments.backend} ({loaded.device}), loaded in {loaded.seconds:.2f} s")
        if service.no_chat is not None:
            note(f"no chat: {service.no_chat}")
        server.listen(bound)
        note(f"serving at {server.address_of(bound)}; Ctrl-C ends")
        server.Server(service, key, lambda: _say_end(service.engine.scheduler.open)).serve_on(bound)
        if service.engine.error is not None:
            raise MarlinError("the engine has failed") from service.engine.error
    return 0


def _say_end(texts: int) -> None:
    note(f"ending after {texts} texts; Ctrl-C ends at once" if texts else "ending")


def _name(folder: Path) -> str:
    return folder.resolve().name or "model"


def _port(text: str) -> int:
    """A port, as the ``type`` of a command-line argument."""
    if not (text.isdecimal() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of 0 to 65535")
    return int(text)

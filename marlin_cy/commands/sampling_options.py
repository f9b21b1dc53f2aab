"""The options that choose an engine for a whole model, and those that choose tokens."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

from marlin_cy.decoder.options import CACHE_DTYPE, CACHE_DTYPES, LM_HEADS

__all__ = [
    "DTYPES",
    "add_cache_option",
    "add_engine_options",
    "add_sampling_options",
    "count_argument",
    "engine_of",
    "sampling_of",
]

ENGINES = ("auto", "decoder", "transformers")
DTYPES = ("bfloat16", "float16", "float32")
DRAWING = ("top_k", "top_p", "min_p", "seed")
"""Options that only matter where tokens are drawn."""

NAMES = ("temperature", *DRAWING, "repetition_penalty", "presence_penalty")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Declare ``--engine``, ``--dtype``, ``--cache-dtype`` and ``--lm-head``."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="what runs the model; default: auto, the library's decoder where it has the model's family, "
        "else transformers",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="transformers: of the activations; default: as the checkpoint's weights"
    )
    add_cache_option(parser)


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """Declare ``--cache-dtype`` and ``--lm-head``."""
    parser.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help="decoder: of keys and values in the cache; default: " + CACHE_DTYPE
    )
    parser.add_argument(
        "--lm-head", choices=LM_HEADS, help="decoder: round the head to 8 bits; default: as it is in the file"
    )


def engine_of(arguments: argparse.Namespace) -> str:
    """The engine that the options ask for: ``"auto"``, ``"decoder"`` or ``"transformers"``.

    ``--dtype`` asks for transformers, ``--cache-dtype`` and ``--lm-head`` for the decoder. A contradiction is a usage
    error.
    """
    engine: str = arguments.engine
    for option, value, owner in (
        ("--dtype", arguments.dtype, "transformers"),
        ("--cache-dtype", arguments.cache_dtype, "decoder"),
        ("--lm-head", arguments.lm_head, "decoder"),
    ):
        if value is not None:
            if engine not in ("auto", owner):
                reason = f"got --engine {engine}" if arguments.engine == engine else "got --dtype"
                arguments.refuse(f"{option}: only with --engine {owner}, {reason}")
            engine = owner
    return engine


def add_sampling_options(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """Declare the options of sampling; ``otherwise`` says what happens without them."""
    group = parser.add_argument_group("choosing tokens", otherwise)
    at_least_0 = _number(0.0, math.inf)
    group.add_argument("--temperature", type=at_least_0, metavar="T", help="0: take the most likely token")
    group.add_argument(
        "--top-k", type=count_argument, metavar="N", help="draw from the N most likely tokens; 0: from all"
    )
    group.add_argument(
        "--top-p", type=_number(None, 1.0), metavar="P", help="draw from the fewest tokens of this probability"
    )
    group.add_argument(
        "--min-p", type=_number(0.0, 1.0), metavar="P", help="draw from tokens of this share of the largest probability"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the random numbers; default: 0")
    group.add_argument(
        "--repetition-penalty", type=_number(None, math.inf), metavar="X", help="above 1: repeat prompt and text less"
    )
    group.add_argument(
        "--presence-penalty", type=_number(-math.inf, math.inf), metavar="X", help="above 0: repeat the text less"
    )
    group.add_argument(
        "--stop", action="append", type=_text, metavar="TEXT", help="end the text before TEXT; may be given repeatedly"
    )


def sampling_of(arguments: argparse.Namespace, *, needs_temperature: bool) -> dict[str, Any]:
    """The sampling options that were given, by the names of :class:`~marlin_cy.decoder.sampling.SamplingParams`.

    Parameters
    ----------
    arguments
    needs_temperature : bool
        Refuse options of drawing without ``--temperature``.
    """
    if needs_temperature and not arguments.temperature:
        for name in DRAWING:
            if getattr(arguments, name) is not None:
                arguments.refuse(f"--{name.replace('_', '-')}: only with a --temperature above 0")
    given = {name: getattr(arguments, name) for name in NAMES if getattr(arguments, name) is not None}
    return given if arguments.stop is None else given | {"stop": arguments.stop}


def _number(least: float | None, most: float) -> Callable[[str], float]:
    """A ``type`` of argparse: a number of at least ``least``, or above 0 if that is None, and at most ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (value > 0 if least is None else value >= least) or value > most or math.isinf(value):
            floor = " above 0" if least is None else f" of at least {least:g}" if math.isfinite(least) else ""
            limit = "" if most == math.inf else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a number{floor}{limit}")
        return value

    return parse


def count_argument(text: str) -> int:
    """A whole number of at least 0, as the ``type`` of a command-line argument."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 0")
    return value


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("got an empty text, expected at least one character")
    return text

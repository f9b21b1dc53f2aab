"""The arguments that several commands share: the checkpoint, the backend and its options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.resources import as_file, files
from pathlib import Path

from marlin_cy.arguments import positive_argument
from marlin_cy.backends import DEFAULT, backend_factory, backend_names, get_backend
from marlin_cy.errors import BackendUnavailable, MarlinError
from marlin_cy.interface import Backend

__all__ = [
    "BUILT_IN",
    "add_backend_options",
    "add_checkpoint_argument",
    "argument_errors",
    "checkpoint_folder",
    "open_backend",
    "positive_argument",
    "refuse_unknown",
]

BUILT_IN = "data/tiny-qwen3-moe-gptq-int4"


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the optional ``CHECKPOINT``."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint's folder, or a GGUF file (default: a small built-in model)",
    )


def checkpoint_folder(arguments: argparse.Namespace) -> AbstractContextManager[Path]:
    """A context manager that gives the folder of ``CHECKPOINT``, or the built-in one."""
    if arguments.checkpoint is not None:
        return nullcontext(arguments.checkpoint)
    return as_file(files("marlin_cy") / BUILT_IN)


def add_backend_options(
    parser: argparse.ArgumentParser, argv: Sequence[str], *, every: bool = False, default: str = DEFAULT
) -> None:
    """Declare ``--backend``, and the options of the backend that ``argv`` names.

    Only that backend's package is imported.

    Parameters
    ----------
    parser : ArgumentParser
    argv : sequence of str
        The command line.
    every : bool
        Declare the options of all backends.
    default : str
        The backend to use if ``argv`` names none.
    """
    names = backend_names()
    parser.add_argument(
        "--backend",
        default=default,
        choices=names,
        help=f"default: {default}; with --help, shows the options of that backend",
    )
    if every:
        for name in names:
            try:
                _add_options_of(parser, name)
            except MarlinError:  # such as an option name that two backends declare: keep the first
                continue
    elif (named := _backend_in(argv, default)) in names:
        _add_options_of(parser, named)


def open_backend(name: str, arguments: argparse.Namespace) -> Backend:
    """The backend with the options of the command line.

    Raises
    ------
    BackendUnavailable
        The backend cannot run here, or not with these options.
    MarlinError
        An option, or the environment variable in its place, has an invalid value.
    """
    from_arguments = getattr(backend_factory(name), "from_arguments", None)
    with argument_errors():
        return get_backend(name, **({} if from_arguments is None else from_arguments(arguments)))


@contextmanager
def argument_errors() -> Iterator[None]:
    """Turn a ValueError or an IndexError into a MarlinError, which ends the command with a message."""
    try:
        yield
    except (ValueError, IndexError) as error:
        raise MarlinError(str(error)) from error


def refuse_unknown(arguments: argparse.Namespace, unknown: Sequence[str]) -> None:
    """End with a usage error because of arguments that the command does not have.

    Raises
    ------
    BackendUnavailable
        The backend cannot be imported, so its options are not known.
    """
    if hasattr(arguments, "backend"):
        backend_factory(arguments.backend)
        for option in (argument.partition("=")[0] for argument in unknown if argument.startswith("--")):
            owners = [name for name in backend_names() if option in _option_strings(name)]
            if owners:
                arguments.refuse(
                    f"{option}: only with --backend {' or '.join(owners)}, got --backend {arguments.backend}"
                )
    arguments.refuse(f"unrecognized arguments: {' '.join(unknown)}")


def _backend_in(argv: Sequence[str], default: str) -> str:
    """The value of ``--backend`` in a command line, or the default."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--backend", nargs="?")
    named = parser.parse_known_args(list(argv))[0].backend
    return default if named is None else str(named)


def _add_options_of(parser: argparse.ArgumentParser, name: str) -> None:
    try:
        factory = backend_factory(name)
    except BackendUnavailable:  # it is raised again when the backend is made
        return
    if not hasattr(factory, "add_arguments"):
        return
    try:
        factory.add_arguments(parser.add_argument_group(f"options of --backend {name}"))
    except Exception as error:  # the package's own, of any type
        raise MarlinError(f"backend {name!r}: add_arguments() fails ({type(error).__name__}: {error})") from error


def _option_strings(name: str) -> set[str]:
    """The options of a backend; an empty result if the backend cannot be imported."""
    parser = argparse.ArgumentParser(add_help=False)
    try:
        _add_options_of(parser, name)
    except MarlinError:
        return set()
    return set(parser._option_string_actions)

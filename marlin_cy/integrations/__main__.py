"""Run a program of another package on models whose layers run packed::

    python -m marlin_cy.integrations transformers serve FOLDER
    python -m marlin_cy.integrations lm_eval --model hf --model_args pretrained=FOLDER ...

The program is a command that a Python package has installed. It starts in this process, after all quantisation methods
that :func:`~marlin_cy.integrations.quantizer.register` knows are taken over.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

from marlin_cy.errors import BackendUnavailable

__all__ = ["main"]


def main(words: list[str]) -> object:
    """Run a program with its arguments; returns its exit code.

    Raises
    ------
    SystemExit
        There is no such program, or PyTorch or transformers are not installed.
    """
    if not words or words[0].startswith("-"):
        raise SystemExit(__doc__)
    found = entry_points(group="console_scripts", name=words[0])
    if not found:
        raise SystemExit(f"marlin_cy.integrations: {words[0]!r}: no installed package has this command")
    try:
        from marlin_cy.integrations.quantizer import METHODS
        from marlin_cy.integrations.transformers import register
    except BackendUnavailable as error:
        raise SystemExit(f"marlin_cy.integrations: {error}") from error
    register(*METHODS)
    program = next(iter(found)).load()
    sys.argv = words
    return program()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))  # type: ignore[arg-type]  # whatever the program returns, as its own script does

"""Fields of the JSON objects in which tools say how they quantised."""

import re

from marlin_cy.errors import CheckpointError, UnsupportedError

__all__ = ["check_bits", "compiled", "refuse_rotation"]

BITS = 4


def check_bits(bits, where):
    """Refuse a width of codes that there are no kernels for; ``where`` begins the message."""
    if bits != BITS:
        raise UnsupportedError(f"{where}: bits: got {bits}, only {BITS} is supported")


def compiled(pattern, where, file):
    """A regular expression; ``where`` says which field it is from."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{where}: got {pattern!r}, expected a regular expression ({error})", file=file) from None


def refuse_rotation(config, name, file):
    """Refuse a checkpoint whose layers expect rotated activations, which the field ``name`` then describes."""
    if config.get(name):
        raise UnsupportedError(f"{file}: {name}: got {config[name]!r}, activations that are rotated are not supported")

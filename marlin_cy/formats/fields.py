"""Fields of the JSON objects in which tools say how they quantised."""

import re

from marlin_cy.errors import CheckpointError, UnsupportedError

__all__ = ["check_bits", "compiled", "optional", "refuse_rotation", "required"]

BITS = 4


def optional(config, names, kind, file, default=None):
    """The value that a JSON object has under any of ``names``, which are names for one thing; null is none.

    Parameters
    ----------
    config : dict
    names : sequence of str
    kind : type
        bool, int, str, list or dict.
    file : path-like
        For messages.
    default
        When no name has a value.

    Raises
    ------
    CheckpointError
        A value of another type, or names whose values contradict each other.
    """
    given = {name: config[name] for name in names if config.get(name) is not None}
    for name, value in given.items():
        # bool is an int to Python, but not to JSON.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{name}: got {value!r}, expected {kind.__name__}", file=file)
    values = list(given.values())
    if any(value != values[0] for value in values):
        said = " and ".join(f"{name} {value!r}" for name, value in given.items())
        raise CheckpointError(f"got {said}, which contradict each other", file=file)
    return values[0] if values else default


def required(config, names, kind, file):
    """As :func:`optional`, and a CheckpointError where there is none."""
    value = optional(config, names, kind, file)
    if value is None:
        raise CheckpointError(f"{names[0]}: missing", file=file)
    return value


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

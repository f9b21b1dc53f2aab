"""Reading typed fields of a checkpoint's JSON objects; what is wrong is a :class:`CheckpointError` that names it."""

import math

from marlin_cy.errors import CheckpointError

__all__ = ["finite", "optional", "positive", "required"]


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


def positive(config, names, file, default=None):
    """As :func:`optional`, an int of at least 1 that must be there unless there is a default."""
    value = optional(config, names, int, file, default)
    if value is None:
        raise CheckpointError(f"{' or '.join(names)}: missing", file=file)
    if value <= 0:
        raise CheckpointError(f"{names[0]}: got {value}, expected a positive number", file=file)
    return value


def finite(config, name, file, default):
    """A finite number, int or float, as a float."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"{name}: got {value!r}, expected a finite number", file=file)
    return float(value)

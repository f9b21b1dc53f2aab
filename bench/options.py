"""Types of command line options, for argparse."""

import argparse

__all__ = ["names", "positive", "values"]


def positive(text):
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return value


def values(kind):
    """A parser of values separated by commas."""

    def parse(text):
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def names(known):
    """A parser of some of these names, separated by commas."""

    def parse(text):
        given = tuple(text.split(","))
        if unknown := sorted(set(given) - set(known)):
            raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, expected some of {', '.join(known)}")
        return given

    return parse

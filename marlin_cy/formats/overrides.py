"""Settings that a checkpoint gives for some of its layers alone, by the name of their module.

Each class here, and AutoRound's :class:`~marlin_cy.formats.auto_round.ExtraConfig`, is one tool's way to say so. Its
method ``settings(module)`` returns a dict of what differs from the checkpoint's own settings, ``bits`` among it,
empty for a module that is nothing special. It raises an UnsupportedError for a module that is not quantised at all.
"""

import re
from dataclasses import dataclass, field, replace

from marlin_cy.errors import CheckpointError, UnsupportedError
from marlin_cy.formats.fields import check_bits, compiled

__all__ = ["Dynamic", "NotConverted", "overridden"]


def overridden(scheme, module):
    """A scheme with what all of its ``overrides`` say of a module, and none of them any more.

    Raises
    ------
    UnsupportedError
        A module that is not quantised, or to another width.
    """
    if not scheme.overrides:
        return scheme
    settings = {}
    for override in scheme.overrides:
        settings |= override.settings(module)
    check_bits(settings.pop("bits", 4), module)
    return replace(scheme, overrides=(), **settings)


@dataclass(frozen=True)
class Dynamic:
    """GPTQModel's ``dynamic``: regular expressions, of which the first that fits the module's beginning decides.

    One that begins with ``-:`` says that a module is not quantised; ``+:`` is the same as nothing.
    Source: GPTQModel, ``gptqmodel/quantization/config.py``, ``dynamic_get``.

    Attributes
    ----------
    rules : tuple of (str, Pattern, dict or None)
        As written, the expression, and the settings; None for not quantised.
    """

    rules: tuple = field(hash=False)

    @classmethod
    def parse(cls, config, read_settings, file):
        """From the JSON object; ``read_settings(dict, file)`` reads the settings of one rule.

        Raises
        ------
        CheckpointError
            No regular expression, or settings that are not an object.
        """
        rules = []
        for text, given in config.items():
            if not isinstance(given, dict):
                raise CheckpointError(f"dynamic: got {given!r} for {text!r}, expected an object", file=file)
            regex = compiled(text[2:] if text[:2] in ("+:", "-:") else text, "dynamic", file)
            rules.append((text, regex, None if text.startswith("-:") else read_settings(given, file)))
        return cls(tuple(rules))

    def settings(self, module):
        for text, regex, settings in self.rules:
            if regex.match(module):
                if settings is None:
                    raise UnsupportedError(f"{module}: not quantised, by {text!r} of dynamic")
                return settings
        return {}


@dataclass(frozen=True)
class NotConverted:
    """``modules_to_not_convert``: ends of names, or regular expressions for their beginnings, up to a dot.

    Source: transformers, ``quantizers/quantizers_utils.py``, ``should_convert_module``.

    Attributes
    ----------
    rules : tuple of (str, Pattern)
    """

    rules: tuple

    @classmethod
    def parse(cls, names, file):
        """From the JSON list.

        Raises
        ------
        CheckpointError
            An entry that is not a string, or no regular expression.
        """
        rules = []
        for name in names:
            if not isinstance(name, str):
                raise CheckpointError(f"modules_to_not_convert: got {name!r}, expected strings", file=file)
            compiled(name, "modules_to_not_convert", file)
            rules.append((name, re.compile(rf"(?:{name})(?:(?<=\.)|(?=\.|$))")))
        return cls(tuple(rules))

    def settings(self, module):
        for name, regex in self.rules:
            if regex.match(module) or module.endswith(name):
                raise UnsupportedError(f"{module}: not quantised, by {name!r} of modules_to_not_convert")
        return {}

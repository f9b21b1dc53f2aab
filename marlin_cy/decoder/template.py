"""Chat templates: from messages to the text of a prompt, in jinja2's sandbox.

A template is a program that comes with a checkpoint. It runs in jinja2's sandbox, with the names and extensions that
transformers gives to chat templates (source: transformers, ``utils/chat_template_utils.py``), and with limits on its
time, its output and its products.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from marlin_cy.errors import CheckpointError
from marlin_cy.formats.json_fields import JsonObject

__all__ = ["ChatTemplate"]

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
MAX_SECONDS = 10.0
MAX_CHARACTERS = 1 << 26  # 16 million tokens


class ChatTemplate:
    """The chat template of a folder.

    The template is that of ``chat_template.jinja``, else ``chat_template`` in ``tokenizer_config.json``, which is one
    template or a list of named ones: ``tool_use`` is taken if there are tools, else ``default``.

    Parameters
    ----------
    folder : Path
    config : dict
        ``tokenizer_config.json``.
    special_tokens : mapping
        Variables of the template, such as ``bos_token``.

    Raises
    ------
    CheckpointError
        There is no template, or it is not of these forms.
    """

    def __init__(self, folder: Path, config: JsonObject, special_tokens: Mapping[str, Any]) -> None:
        self._variables = dict(special_tokens)
        self._file, self._sources = _find(folder, config)
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that asks for the next message.

        Parameters
        ----------
        messages : sequence of mappings
            Each has ``role`` and, as the template asks, ``content`` or other keys. Keys whose value is None are left
            out.
        tools, documents : sequence of mappings, optional
        options : mapping, optional
            Further variables of the template, such as ``{"enable_thinking": False}``.

        Raises
        ------
        TypeError, ValueError
            ``messages`` is empty, or an argument is not of these forms.
        CheckpointError
            The template refuses these messages, needs what was not given, does not end or has an error.
        """
        variables = {
            **self._variables,
            **{str(name): _plain(f"options[{name!r}]", value) for name, value in (options or {}).items()},
            "messages": _checked_messages(messages),
            "tools": None if tools is None else _plain("tools", tools),
            "documents": None if documents is None else _plain("documents", documents),
            "add_generation_prompt": True,
        }
        name = self._name(has_tools=tools is not None)
        try:
            if name not in self._compiled:
                self._compiled[name] = _environment().from_string(self._sources[name])
            with _deadline(MAX_SECONDS):
                return _joined(self._compiled[name].generate(variables))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a template can raise any type, and _Timeout must pass all handlers
            raise CheckpointError(f"the chat template fails: {_reason(error)}", file=self._file) from error

    def _name(self, has_tools: bool) -> str:
        name = "tool_use" if has_tools and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise CheckpointError(
                f"chat_template: got templates {', '.join(self._sources)}, expected one with the name 'default'",
                file=self._file,
            )
        return name


def _find(folder: Path, config: JsonObject) -> tuple[Path, dict[str, str]]:
    """The file with the templates, and the templates by name."""
    file = folder / TEMPLATE
    if file.exists():
        try:
            return file, {"default": file.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot be read: {error}", file=file) from error
    file = folder / CONFIG
    declared = config.get("chat_template")
    entries = declared if isinstance(declared, list) else [{"name": "default", "template": declared}]
    sources: dict[str, str] = {}
    for entry in entries:
        match entry:
            case {"name": str(name), "template": str(source)}:
                sources[name] = source
            case _ if declared is None:
                raise CheckpointError(
                    f"no chat template here or in {TEMPLATE}: the model is not made to chat", file=file
                )
            case _:
                raise CheckpointError(
                    f"chat_template: got {entry!r}, expected a text or a list of objects with name and template",
                    file=file,
                )
    return file, sources


# ---------------------------------------------------------------------------------------------
# What a template is given


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as plain data, without keys whose value is None."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: got {type(messages).__name__}, expected a list of dicts")
    if not messages:
        raise ValueError("messages: got no message, expected at least 1")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"messages[{index}]: got {type(message).__name__}, expected a dict")
        if not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{index}]['role']: got {message.get('role')!r}, expected a str")
    return [
        _plain(f"messages[{index}]", {key: value for key, value in message.items() if value is not None})
        for index, message in enumerate(messages)
    ]


def _plain(name: str, value: Any) -> Any:
    """A copy of a value in types that JSON has: a template gets no other objects, whose methods it could call."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{name}: {error}, expected data that JSON can hold") from None


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks text that a model is trained on: as its contents."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which products and powers have a limit too: they take long inside one operation."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of ``*`` or ``**``."""
        match operator, left, right:
            case "**", int(), int():
                size = left.bit_length() * abs(right)
            case "*", int(), int():
                size = left.bit_length() + right.bit_length()
            case ("*", int() as times, str() | list() | tuple() as items) | (
                "*",
                str() | list() | tuple() as items,
                int() as times,
            ):
                size = len(items) * times
            case _:
                size = 0
        if size > MAX_CHARACTERS:
            raise jinja2.exceptions.SecurityError(
                f"the result of {operator} has a size of {size}, expected at most {MAX_CHARACTERS}"
            )
        return super().call_binop(context, operator, left, right)


class _Namespace(jinja2.utils.Namespace):
    """``namespace()``, without attributes that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"an attribute of a namespace cannot have the name {name!r}")
        super().__setitem__(name, value)


def _environment() -> jinja2.Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = _Namespace
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is. The filter of jinja2 escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


# ---------------------------------------------------------------------------------------------
# Limits


class _Timeout(BaseException):
    """A template takes too long. No handler inside jinja2 catches this class."""


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """A context that ends with :class:`_Timeout` if its Python code runs longer.

    Each line that Python runs looks at the time: a template may loop for ever without output, and a thread of Python
    cannot be ended from outside.
    """
    end = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if time.monotonic() > end:
            raise _Timeout
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(previous)


def _joined(parts: Iterator[str]) -> str:
    """The text of a template's parts."""
    kept, size = [], 0
    for part in parts:
        size += len(part)
        if size > MAX_CHARACTERS:
            raise jinja2.exceptions.SecurityError(f"its output has more than {MAX_CHARACTERS} characters")
        kept.append(part)
    return "".join(kept)


def _reason(error: BaseException) -> str:
    match error:
        case _Timeout():
            return f"it has not ended after {MAX_SECONDS:g} seconds"
        case jinja2.TemplateSyntaxError():
            return f"line {error.lineno}: {error.message}"
        case RecursionError():
            return "it calls itself without end"
        case MemoryError():
            return "it needs more memory than there is"
        case jinja2.UndefinedError():
            return f"it needs what was not given: {error.message}"
        case jinja2.TemplateError():
            return str(error.message)
    return f"{type(error).__name__}: {error}"

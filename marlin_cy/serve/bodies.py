"""The bodies of requests: which fields there are, and what they may hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from marlin_cy.serve.errors import ApiError

__all__ = ["Body", "ChatBody", "CompletionBody", "read_body"]

MOST_SCORES = 20

# Fields that would change an answer, and that are not supported: only values that change nothing are accepted.
UNSUPPORTED: Mapping[str, Sequence[Any]] = {
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
# Fields that change no answer.
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention"),
)


class StreamOptions(BaseModel):
    """``stream_options``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # there is none


class Body(BaseModel):
    """The fields that both kinds of requests have. Ranges of sampling are checked where they are used."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None

    def sampling(self) -> dict[str, Any]:
        """The fields of :class:`~marlin_cy.decoder.sampling.SamplingParams` that were given."""
        names = (
            *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
            *("frequency_penalty", "stop", "stop_token_ids"),
        )
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatBody(Body):
    """Of ``/v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_SCORES)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Body):
    """Of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_SCORES)


B = TypeVar("B", bound=Body)


def read_body(kind: type[B], data: bytes) -> B:
    """The body of a request.

    Raises
    ------
    ApiError
        It is not JSON, or a field is unknown, unsupported or invalid. The message names the field.
    """
    try:
        fields = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body: got {type(fields).__name__}, expected a JSON object", code="invalid_json")
    for name in IGNORED:
        fields.pop(name, None)
    for name, neutral in UNSUPPORTED.items():
        value = fields.pop(name, None)
        if value is not None and value not in neutral:
            raise ApiError(400, f"{name}: not supported, got {_short(value)}", code="unsupported_field", param=name)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _invalid(error, fields) from None


def _invalid(error: ValidationError, fields: Mapping[str, Any]) -> ApiError:
    """The first fault that pydantic has found, in the words of this library."""
    # An unknown field first: it may be the misspelt name of one that is missing.
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    first = faults[0]
    name = str(first["loc"][0])
    wanted = [fault["msg"].removeprefix("Input should be ") for fault in faults if fault["loc"][0] == name]
    match first["type"]:
        case "extra_forbidden":
            message = f"{_path(first['loc'])}: there is no such field"
        case "missing":
            message = f"{name}: missing"
        case _ if name == "prompt":
            message = f"prompt: got {_short(fields[name])}, expected a text, texts, token ids or lists of token ids"
        case _ if len(wanted) > 1:  # a field of several types has a fault for each of them
            message = f"{name}: got {_short(fields[name])}, expected {' or '.join(wanted)}"
        case _:
            message = f"{_path(first['loc'])}: got {_short(first['input'])}, expected {wanted[0]}"
    return ApiError(400, message, code="invalid_field", param=name)


def _path(location: Sequence[str | int]) -> str:
    """``messages[0]``: a place in the body."""
    first, *rest = location
    return str(first) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"

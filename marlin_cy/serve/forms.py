"""The JSON of answers, of both kinds."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from marlin_cy import __version__
from marlin_cy.decoder.text import Tokenizer
from marlin_cy.serve.answer import Answer, Part
from marlin_cy.serve.scores import Scores

__all__ = ["ChatForm", "CompletionForm", "Form"]

REASONS = {"stop": "stop", "length": "length", "context": "length"}
LEAST_SCORE = -9999.0
"""In place of minus infinity, which JSON does not have. OpenAI's interface has the same value."""

FINGERPRINT = f"marlin_cy-{__version__}"


class Form(ABC):
    """The JSON of one answer.

    Parameters
    ----------
    model : str
        The name of the model.
    tokenizer : Tokenizer
        For the texts of tokens with log-probabilities.
    scored : bool
        Whether the answer has log-probabilities.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str, tokenizer: Tokenizer, *, scored: bool) -> None:
        self._tokenizer = tokenizer
        self._scored = scored
        self._common = {
            "id": f"{self.prefix}-{random.getrandbits(128):032x}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    def whole(self, answer: Answer, parts: Sequence[Part]) -> dict[str, Any]:
        """The answer at once; ``parts`` has each text."""
        choices = [self._choice(part) for part in sorted(parts, key=lambda part: part.index)]
        usage = usage_of(answer, sum(part.tokens for part in parts))
        return {"object": self.kind, **self._common, "choices": choices, "usage": usage}

    def first_chunks(self, answer: Answer) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def chunk(self, part: Part) -> dict[str, Any]:
        """A piece of a stream."""
        return self._chunk([self._stream_choice(part)])

    def usage_chunk(self, answer: Answer, tokens: int) -> dict[str, Any]:
        """The end of a stream, with the numbers of tokens."""
        return {**self._chunk([]), "usage": usage_of(answer, tokens)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"object": self.chunk_kind, **self._common, "choices": choices}

    def _token(self, token: int) -> tuple[str, list[int]]:
        data = self._tokenizer.token_bytes(token)
        return data.decode(errors="replace"), list(data)

    @abstractmethod
    def _choice(self, part: Part) -> dict[str, Any]:
        """A whole text."""

    @abstractmethod
    def _stream_choice(self, part: Part) -> dict[str, Any]:
        """A piece of a text."""


class ChatForm(Form):
    """Of ``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first_chunks(self, answer: Answer) -> list[dict[str, Any]]:
        """The role of each message."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": request.index, "delta": delta, "logprobs": None, "finish_reason": None}])
            for request in answer.requests
        ]

    def _choice(self, part: Part) -> dict[str, Any]:
        return self._end(part, {"message": {"role": "assistant", "content": part.text, "refusal": None}})

    def _stream_choice(self, part: Part) -> dict[str, Any]:
        return self._end(part, {"delta": {"content": part.text} if part.text else {}})

    def _end(self, part: Part, contents: dict[str, Any]) -> dict[str, Any]:
        scores = {"content": [self._score(one) for one in part.scores], "refusal": None} if self._scored else None
        reason = None if part.finish_reason is None else REASONS[part.finish_reason]
        return {"index": part.index, **contents, "logprobs": scores, "finish_reason": reason}

    def _score(self, scores: Scores) -> dict[str, Any]:
        return {
            **self._named(scores.token, scores.score),
            "top_logprobs": [self._named(token, score) for token, score in scores.top],
        }

    def _named(self, token: int, score: float) -> dict[str, Any]:
        text, data = self._token(token)
        return {"token": text, "logprob": max(score, LEAST_SCORE), "bytes": data}


class CompletionForm(Form):
    """Of ``/v1/completions``."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, *, scored: bool) -> None:
        super().__init__(model, tokenizer, scored=scored)
        self._offsets: dict[int, int] = {}  # characters of each text so far

    def _choice(self, part: Part) -> dict[str, Any]:
        scores = self._scores(part) if self._scored else None
        reason = None if part.finish_reason is None else REASONS[part.finish_reason]
        return {"index": part.index, "text": part.text, "logprobs": scores, "finish_reason": reason}

    _stream_choice = _choice

    def _scores(self, part: Part) -> dict[str, Any]:
        texts = [self._token(one.token)[0] for one in part.scores]
        offset, offsets = self._offsets.get(part.index, 0), []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        self._offsets[part.index] = offset
        return {
            "tokens": texts,
            "token_logprobs": [max(one.score, LEAST_SCORE) for one in part.scores],
            "top_logprobs": [
                {self._token(token)[0]: max(score, LEAST_SCORE) for token, score in one.top} for one in part.scores
            ],
            "text_offset": offsets,
        }


def usage_of(answer: Answer, tokens: int) -> dict[str, Any]:
    """The numbers of tokens of an answer."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": answer.prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": answer.known_tokens},
    }

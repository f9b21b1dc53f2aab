"""From the logits of one sequence to pieces of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from marlin_cy.decoder.detokenize import TextStream
from marlin_cy.decoder.protocol import Logits
from marlin_cy.decoder.sampling import Sampler, SamplingParams
from marlin_cy.decoder.stop import StopStrings

__all__ = ["Piece", "Writer"]


class Piece(NamedTuple):
    """What one token adds to a text.

    Attributes
    ----------
    text : str
        It may be empty: while a character is not complete, or while a stop string may have begun.
    tokens : tuple of int
        The token.
    finish_reason : str or None
        Set in the last piece. ``"stop"``: the model has ended the text, or a stop string or token has; ``"length"``:
        the text has ``max_new_tokens`` tokens; ``"context"``: the model's context is full.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None = None


class Writer:
    """Chooses the tokens of one sequence, and writes them as text.

    Parameters
    ----------
    params : SamplingParams
    vocab_size : int
    prompt : sequence of int
        The tokens before the text.
    stream : TextStream
    stop_ids : frozenset of int
        Tokens that end the text, apart from those of ``params``.
    max_new_tokens : int or None
    room : int
        Tokens for which the model's context has room, at least 1.

    Attributes
    ----------
    sampler : Sampler
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        prompt: Sequence[int],
        stream: TextStream,
        stop_ids: frozenset[int],
        max_new_tokens: int | None,
        room: int,
    ) -> None:
        self.sampler = Sampler(params, vocab_size, prompt)
        self._stream = stream
        self._stops = StopStrings(tuple(params.stop))
        self._stop_ids = stop_ids.union(params.stop_token_ids)
        self._left = room if max_new_tokens is None else min(max_new_tokens, room)
        self._last_reason = "length" if self._left == max_new_tokens else "context"

    def write(self, logits: Logits, position: int) -> Piece:
        """Choose a token, and write it; ``position`` is its position in the sequence.

        Raises
        ------
        MarlinError
            The logits are not finite.
        """
        return self.put(self.sampler.pick(logits, position))

    def put(self, token: int) -> Piece:
        """Write a token that the sampler has chosen."""
        self._left -= 1
        if token in self._stop_ids:
            return self._last("", token, "stop")
        text, stopped = self._stops.put(self._stream.put(token))
        if stopped:
            return Piece(text, (token,), "stop")
        return Piece(text, (token,)) if self._left else self._last(text, token, self._last_reason)

    def _last(self, text: str, token: int, reason: str) -> Piece:
        """The last piece, with all text that was held back."""
        rest, stopped = self._stops.put(self._stream.finish())
        if stopped:
            return Piece(text + rest, (token,), "stop")
        return Piece(text + rest + self._stops.finish(), (token,), reason)

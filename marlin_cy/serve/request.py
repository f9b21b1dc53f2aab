"""A text that a client waits for, and what the scheduler says about it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from marlin_cy.decoder.writer import Piece, Writer
from marlin_cy.errors import MarlinError
from marlin_cy.serve.scores import Scores

__all__ = ["Output", "Request"]


class Request:
    """One text: a prompt, and the writer of what follows.

    Parameters
    ----------
    prompt : sequence of int
        At least one token.
    writer : Writer
        Made for this prompt.
    top_scores : int, optional
        With each token, give its log-probability and those of this many of the most likely tokens.
    owner : object, optional
        Whoever waits for the text. The scheduler does not use it.
    index : int
        The number of the text among those of its owner.

    Attributes
    ----------
    tokens : array of int
        The prompt, then the text.
    sequence : object or None
        The model's sequence while the request runs.
    known : int
        Tokens of the prompt that other requests had computed.
    number : int
        The place in the order of arrival.
    follows : Request or None
        A request that computes the same tokens first.
    cancelled : bool
        Set by any thread; the request ends before the next step.
    """

    def __init__(
        self, prompt: Sequence[int], writer: Writer, *, top_scores: int | None = None, owner: Any = None, index: int = 0
    ) -> None:
        self.prompt = prompt
        self.tokens = array("i", prompt)
        self.writer = writer
        self.top_scores = top_scores
        self.owner = owner
        self.index = index
        self.sequence: Any = None
        self.known = 0
        self.number = -1
        self.follows: Request | None = None
        self.cancelled = False

    @property
    def pending(self) -> int:
        """Tokens that the model's cache does not have."""
        return len(self.tokens) - (0 if self.sequence is None else int(self.sequence.length))

    @property
    def reads_prompt(self) -> bool:
        """Whether it runs, and more than the last token is missing in the cache."""
        return self.sequence is not None and self.pending > 1


class Output(NamedTuple):
    """What a step has done for one request.

    Attributes
    ----------
    request : Request
    piece : Piece or None
        None if the request has failed.
    scores : Scores or None
        Of the piece's token, where the request asks for them.
    error : MarlinError or None
        The reason of the failure. The request has ended.
    """

    request: Request
    piece: Piece | None
    scores: Scores | None = None
    error: MarlinError | None = None

    @property
    def last(self) -> bool:
        """Whether the request has ended."""
        return self.piece is None or self.piece.finish_reason is not None

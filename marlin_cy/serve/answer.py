"""The texts of one HTTP request, while they are written."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field

from marlin_cy.errors import MarlinError
from marlin_cy.serve.request import Output, Request
from marlin_cy.serve.scores import Scores

__all__ = ["Answer", "Part"]


@dataclass
class Part:
    """What is new in one text.

    Attributes
    ----------
    index : int
        The number of the text.
    text : str
    tokens : int
        Number of tokens.
    scores : list of Scores
        Of the tokens, where the request asks for them.
    finish_reason : str or None
        As in :class:`~marlin_cy.decoder.writer.Piece`.
    error : MarlinError or None
        Why the text has ended before its end.
    """

    index: int
    text: str = ""
    tokens: int = 0
    scores: list[Scores] = field(default_factory=list)
    finish_reason: str | None = None
    error: MarlinError | None = None


class Answer:
    """Several texts. Outputs come in from the engine's thread, and parts go out as fast as the client reads.

    Outputs of a text that wait are merged, so that a client that reads slowly takes no more memory than the text.

    Parameters
    ----------
    stream : bool
        Whether the client reads the texts while they are written. Else nobody is woken before the end.

    Attributes
    ----------
    requests : list of Request
    arrived : float
        The time of :func:`time.perf_counter`.
    first : float or None
        The time of the first token.
    """

    def __init__(self, *, stream: bool) -> None:
        self.requests: list[Request] = []
        self.arrived = time.perf_counter()
        self.first: float | None = None
        self._stream = stream
        self._lock = threading.Lock()  # of what put and take share
        self._waiting: dict[int, Part] = {}
        self._left = 0
        self._woken = False
        self._new = asyncio.Event()

    def add(self, request: Request) -> None:
        """Wait for one more text. Its ``owner`` is this answer."""
        self.requests.append(request)
        self._left += 1

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts. A prompt that several texts follow counts once."""
        return sum({id(request.prompt): len(request.prompt) for request in self.requests}.values())

    @property
    def known_tokens(self) -> int:
        """Those that had been computed before, for another answer."""
        return sum({id(request.prompt): request.known for request in reversed(self.requests)}.values())

    @property
    def ended(self) -> bool:
        """Whether all texts have ended."""
        return self._left == 0

    def put(self, output: Output) -> bool:
        """Take an output of a step, on the engine's thread; whether :meth:`wake` must be called."""
        with self._lock:
            if self.first is None:
                self.first = time.perf_counter()
            part = self._waiting.setdefault(output.request.index, Part(output.request.index))
            if output.piece is not None:
                part.text += output.piece.text
                part.tokens += len(output.piece.tokens)
                part.finish_reason = output.piece.finish_reason
            if output.scores is not None:
                part.scores.append(output.scores)
            part.error = output.error
            self._left -= output.last
            wakes = not self._woken and (self._stream or self._left == 0 or part.error is not None)
            self._woken = self._woken or wakes
            return wakes

    def wake(self) -> None:
        """Let :meth:`take` look for what is new, on the event loop."""
        self._new.set()

    async def take(self) -> list[Part]:
        """What is new, after waiting for it; an empty list after the end."""
        while True:
            with self._lock:
                self._woken = False
                if self._waiting or not self._left:
                    parts, self._waiting = list(self._waiting.values()), {}
                    return parts
                self._new.clear()
            await self._new.wait()

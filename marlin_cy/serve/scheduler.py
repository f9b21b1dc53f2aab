"""Requests in, pieces out: which requests run, and what each step of the model computes.

::

    submit ── queue ── waiting ── admitted ── running ── a step: the next token of each text, and parts of prompts
                          ▲                      │
                          └── put back: the ─────┼── ended ── kept prefix ── freed when pages are needed
                              cache is full      │               │
                                                 └───────────────┴── pages are shared with requests that begin alike

A request that is put back loses its part of the cache, and computes its tokens again when it runs the next time. On
the CPU, a model's results do not depend on what runs together nor on how a prompt is cut: none of this changes a text.

Sources of ideas: continuous batching, Yu et al., "Orca" (2022); pages that sequences share, and putting sequences
back, Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023); prompts
in parts, Agrawal et al., "Sarathi-Serve" (2024).
"""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from marlin_cy.decoder.cache import CacheFull, pages_of
from marlin_cy.decoder.generate import forget
from marlin_cy.decoder.program import PAGE_TOKENS
from marlin_cy.decoder.protocol import Logits
from marlin_cy.errors import MarlinError
from marlin_cy.serve.pace import Pace
from marlin_cy.serve.prefixes import Prefix, PrefixStore, common_length
from marlin_cy.serve.protocol import ServedModel
from marlin_cy.serve.request import Output, Request
from marlin_cy.serve.scores import scores_of

__all__ = ["Counts", "QueueFull", "Scheduler"]

STEP_SECONDS = 0.5


class QueueFull(MarlinError):
    """There are as many requests as the queue has room for. The call has changed nothing."""


class Counts(NamedTuple):
    """What a scheduler has and has done.

    Attributes
    ----------
    running, waiting : int
    kept : int
        Sequences that are kept for other requests.
    free_tokens : int
        Positions of the cache that nothing holds.
    computed : int
        Tokens that the model has computed.
    put_back : int
        How often a running request has lost its part of the cache.
    """

    running: int
    waiting: int
    kept: int
    free_tokens: int
    computed: int
    put_back: int


class Scheduler:
    """Runs requests on a model. One thread calls :meth:`step`; any thread may submit and cancel.

    Parameters
    ----------
    model : ServedModel
        No other code may use it meanwhile. Its cache must have room for a whole context.
    max_sequences : int
        Requests that run at once, at most.
    max_waiting : int
        Requests that wait beside those, at most.
    step_seconds : float
        Parts of prompts beside texts are as large as a step of this time allows.
    clock : callable
        The time in seconds.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        max_sequences: int = 16,
        max_waiting: int = 128,
        step_seconds: float = STEP_SECONDS,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.limit = max_sequences + max_waiting
        self._model = model
        self._max_sequences = max_sequences
        self._clock = clock
        self._pace = Pace(step_seconds)
        self._lock = threading.Lock()
        self._arrivals: deque[Request] = deque()
        self._open = self._arrived = 0  # requests that have not ended; all of them. Guarded by the lock.
        self._waiting: list[Request] = []  # in the order of arrival, as is the next one
        self._running: list[Request] = []
        self._prefixes = PrefixStore(model.free)
        self._can_cut = True  # until the model refuses: one with recurrent state does
        self._computed = self._put_back_count = 0

    # Called by any thread ----------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """Accept requests, all or none.

        Raises
        ------
        QueueFull
        """
        with self._lock:
            if self._open + len(requests) > self.limit:
                raise QueueFull(
                    f"the queue is full: got {len(requests)} requests, {self._open} of at most {self.limit} have not "
                    "ended"
                )
            for request in requests:
                request.number = self._arrived
                self._arrived += 1
            self._open += len(requests)
            self._arrivals.extend(requests)

    @staticmethod
    def cancel(request: Request) -> None:
        """End a request before the next step. It has no further output."""
        request.cancelled = True

    @property
    def open(self) -> int:
        """Number of requests that have not ended."""
        return self._open

    # Called by one thread ----------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Compute the next token of each running request, and parts of prompts; returns what is new."""
        self._take_arrivals()
        self._drop_cancelled()
        self._admit()
        work = self._parts()
        if not work:
            return []
        start = self._clock()
        try:
            work, rows = self._forward(work)
        except Exception as error:  # of any type: a driver may fail. No request can go on; the next ones may.
            return self._fail_all(error)
        lengths = [len(part) for _, part in work]
        prompts = [length for length in lengths if length > 1]
        if 0 < len(prompts) < len(lengths):
            self._pace.record(sum(prompts), self._clock() - start)
        self._computed += sum(lengths)
        return [self._output(request, row) for (request, _), row in zip(work, rows, strict=True) if not request.pending]

    def abort(self, error: MarlinError) -> list[Output]:
        """End all requests with an error."""
        self._take_arrivals()
        self._running += self._waiting
        self._waiting = []
        return self._fail_all(error)

    def close(self) -> None:
        """Free the kept sequences."""
        self._prefixes.clear()

    def counts(self) -> Counts:
        """The state, for metrics. Another thread may call this, and gets numbers of slightly different moments."""
        return Counts(
            len(self._running),
            self._open - len(self._running),
            len(self._prefixes),
            self._model.free_tokens,
            self._computed,
            self._put_back_count,
        )

    # Which requests run ------------------------------------------------------------------------

    def _take_arrivals(self) -> None:
        while self._arrivals:
            self._waiting.append(self._arrivals.popleft())

    def _drop_cancelled(self) -> None:
        for requests in (self._waiting, self._running):
            for request in [request for request in requests if request.cancelled]:
                requests.remove(request)
                self._end(request, keep=True)

    def _admit(self) -> None:
        """Begin requests in the order of arrival, while there is room."""
        position = 0
        while position < len(self._waiting) and len(self._running) < self._max_sequences:
            request = self._waiting[position]
            if request.follows is None or not request.follows.reads_prompt:
                source, common = self._known_start(request)
                request.follows = self._leader(request, common)
            if request.follows is not None:
                position += 1  # others need not wait for it
                continue
            if not self._begin(request, source, common):
                break
            del self._waiting[position]
            insort(self._running, request, key=lambda one: one.number)

    def _known_start(self, request: Request) -> tuple[Prefix | Request | None, int]:
        """What has computed most of a request's tokens, and how many; the last token is always computed again."""
        most = len(request.tokens) - 1
        tokens = request.tokens[:most]
        source: Prefix | Request | None
        source, common = self._prefixes.find(tokens, whole=not self._can_cut)
        for other in self._running if self._can_cut else ():
            shared = min(common_length(tokens, other.tokens), other.sequence.length)
            if shared >= max(common + 1, PAGE_TOKENS):
                source, common = other, shared
        return source, common

    def _leader(self, request: Request, known: int) -> Request | None:
        """A running request that is about to compute more of the same tokens than are known; None if there is none."""
        if not self._can_cut:
            return None
        tokens = request.tokens[:-1]
        readers = [other for other in self._running if other.reads_prompt]
        shared = [common_length(tokens, other.tokens) for other in readers]
        if max(shared, default=0) < known + PAGE_TOKENS:
            return None
        return readers[shared.index(max(shared))]

    def _begin(self, request: Request, source: Prefix | Request | None, common: int) -> bool:
        """Give a request a sequence, if the cache has room beside the running ones. One alone always begins."""
        spared = source if isinstance(source, Prefix) else None
        wanted = sum(map(self._positions, self._running)) + self._positions(request) - common // PAGE_TOKENS
        while self._running and wanted * PAGE_TOKENS > self._model.free_tokens:
            if not self._prefixes.evict(spared):
                return False
        while True:
            try:
                request.sequence = self._sequence(request.tokens, source, common)
                break
            except CacheFull:  # all slots of recurrent state are in use
                if not self._prefixes.evict():
                    if not self._running:
                        raise
                    return False
                source, common = None, 0
        request.known = max(request.known, min(request.sequence.length, len(request.prompt)))
        return True

    @staticmethod
    def _positions(request: Request) -> int:
        """Pages that a request takes soon: those of its tokens, and one more."""
        held = 0 if request.sequence is None else request.sequence.length
        return pages_of(len(request.tokens)) + 1 - pages_of(held)

    def _sequence(self, tokens: Any, source: Prefix | Request | None, common: int) -> Any:
        """A sequence that begins with ``common`` tokens of a source, if the model can share them."""
        if source is None:
            return self._model.new_sequence()
        if isinstance(source, Prefix):
            if common == len(source.tokens):
                return self._prefixes.take(source)
            self._prefixes.touch(source)
        fork = self._model.fork(source.sequence)
        if forget(self._model, fork, common):
            return fork
        self._can_cut = False
        self._model.free(fork)
        return self._model.new_sequence()

    # A step ------------------------------------------------------------------------------------

    def _parts(self) -> list[tuple[Request, Any]]:
        """The tokens of a step: the last token of each text, and as much of prompts as the pace allows."""
        room = self._pace.most(beside_texts=not all(request.reads_prompt for request in self._running))
        work = []
        for request in self._running:
            begin = request.sequence.length
            end = begin + (min(request.pending, room) if request.reads_prompt else 1)
            if request.reads_prompt:
                room -= end - begin
            if end > begin:
                work.append((request, request.tokens[begin:end]))
        return work

    def _forward(self, work: list[tuple[Request, Any]]) -> tuple[list[tuple[Request, Any]], list[Logits]]:
        """Run the model; while the cache is full, free a kept sequence or put back the latest request."""
        while True:
            try:
                return work, self._model.forward_batch([(request.sequence, part) for request, part in work])
            except CacheFull:
                if self._prefixes.evict():
                    continue
                if len(self._running) < 2:
                    raise
                latest = self._running[-1]
                self._put_back(latest)
                work = [one for one in work if one[0] is not latest]

    def _put_back(self, request: Request) -> None:
        self._running.remove(request)
        self._model.free(request.sequence)
        request.sequence = None
        insort(self._waiting, request, key=lambda one: one.number)
        self._put_back_count += 1

    def _output(self, request: Request, logits: Logits) -> Output:
        """Write the next token of a request."""
        try:
            piece = request.writer.write(logits, request.sequence.length)
        except MarlinError as error:  # of these logits alone: the other requests go on
            self._running.remove(request)
            self._end(request, keep=False)
            return Output(request, None, error=error)
        scores = None
        if request.top_scores is not None:
            scores = scores_of(logits, piece.tokens[-1], request.top_scores)
        if piece.finish_reason is None:
            request.tokens.extend(piece.tokens)
        else:
            self._running.remove(request)
            self._end(request, keep=True)
        return Output(request, piece, scores)

    def _end(self, request: Request, *, keep: bool) -> None:
        """Count a request as ended, and keep or free its sequence."""
        sequence, request.sequence = request.sequence, None
        if sequence is not None:
            if keep and sequence.length >= PAGE_TOKENS:
                self._prefixes.keep(request.tokens[: sequence.length], sequence)
            else:
                self._model.free(sequence)
        with self._lock:
            self._open -= 1

    def _fail_all(self, error: Exception) -> list[Output]:
        """End all running requests with an error."""
        reason = error if isinstance(error, MarlinError) else MarlinError(f"{type(error).__name__}: {error}")
        failed, self._running = self._running, []
        for request in failed:
            self._end(request, keep=False)
        return [Output(request, None, error=reason) for request in failed if not request.cancelled]

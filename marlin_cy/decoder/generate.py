"""Text from a model: the continuation of a prompt, or of several prompts at once.

::

    prompt ── tokens ── model, in parts ── token ──┬── Writer ── piece of text
                                              ▲    └── model ─┐
                                              └───────────────┘

All functions check their arguments when they are called. The model runs while the result is iterated.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from marlin_cy.arguments import integer
from marlin_cy.decoder.cache import pages_of
from marlin_cy.decoder.program import PAGE_TOKENS
from marlin_cy.decoder.protocol import DecoderModel, Progress
from marlin_cy.decoder.sampling import Sampler, SamplingOptions, SamplingParams
from marlin_cy.decoder.text import Tokenizer
from marlin_cy.decoder.writer import Piece, Writer
from marlin_cy.errors import BatchError, MarlinError, UnsupportedError

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Piece",
    "check_tokens",
    "forget",
    "generate",
    "generate_batch",
    "keep_tokenizer",
    "new_writer",
    "pieces_of",
    "prefill",
    "stream_batch",
    "tokenizer_of",
]

# Tokens of a call of a long prompt: the first call's, and the most. Between calls, Ctrl-C works and progress is shown.
FIRST_PART, LARGEST_PART = 512, 4096
PART_SECONDS = 0.5


def generate(
    model: DecoderModel,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Generator[Piece, None, None]:
    """Continue a prompt, token by token.

    Parameters
    ----------
    model : DecoderModel
    prompt : str or sequence of int
        A text or its tokens.
    max_new_tokens : int, optional
        By default the text ends where the model ends it, or where its context is full.
    progress : callable, optional
        Called as ``progress(done, total, description)`` after each part of a long prompt.
    **sampling
        Attributes of :class:`SamplingParams`. By default the most likely token is taken each time.

    Returns
    -------
    generator of Piece
        One piece a token. Closing it ends the text.

    Raises
    ------
    TypeError, ValueError
        An argument is invalid, the prompt has no tokens, or the model's context has no room for it.
    """
    tokenizer = tokenizer_of(model)
    tokens = _prompt_tokens("prompt", prompt, model, tokenizer)
    params = SamplingParams(**sampling)
    writer = new_writer(model, tokenizer, tokens, params, max_new_tokens, continues=True)
    return _generate(model, tokens, writer, progress)


def _generate(
    model: DecoderModel, tokens: list[int], writer: Writer, progress: Progress | None
) -> Generator[Piece, None, None]:
    sequence = model.new_sequence()
    try:
        yield from pieces_of(model, sequence, tokens, writer, progress)
    finally:
        model.free(sequence)


def pieces_of(
    model: DecoderModel, sequence: Any, tokens: Sequence[int], writer: Writer, progress: Progress | None
) -> Generator[Piece, None, None]:
    """The pieces that follow the sequence and these tokens."""
    sampler = [writer.sampler]
    picked = prefill(model, sequence, tokens, writer.sampler, progress)
    while True:
        if not isinstance(picked, int):
            assert picked is not None
            raise picked
        piece = writer.put(picked)
        yield piece
        if piece.finish_reason is not None:
            return
        (picked,) = model.pick_batch([(sequence, piece.tokens)], sampler)


def prefill(
    model: DecoderModel,
    sequence: Any,
    tokens: Sequence[int],
    sampler: Sampler | None = None,
    progress: Progress | None = None,
) -> int | MarlinError | None:
    """Append a prompt to a sequence, in parts; returns what the sampler picks then.

    Parts become larger while they take less than half a second. If a part fails or is interrupted, the sequence gets
    the length back that it had.

    Parameters
    ----------
    model : DecoderModel
    sequence
    tokens : sequence of int
        At least one.
    sampler : Sampler, optional
        None: no token is picked.
    progress : callable, optional
        Called as ``progress(done, total, description)`` after each part.
    """
    size, done, before = FIRST_PART, 0, sequence.length
    try:
        while True:
            start = time.perf_counter()
            part = tokens[done : done + size]
            done += size
            (picked,) = model.pick_batch([(sequence, part)], [sampler if done >= len(tokens) else None])
            if done >= len(tokens):
                return picked
            if progress is not None:
                progress(done, len(tokens), f"prompt of {len(tokens)} tokens")
            if time.perf_counter() - start < PART_SECONDS:
                size = min(2 * size, LARGEST_PART)
    except BaseException:
        if sequence.length > before:
            forget(model, sequence, before)
        raise


def forget(model: DecoderModel, sequence: Any, length: int) -> bool:
    """Whether the sequence could be cut to this length: models with a recurrent state may refuse."""
    try:
        model.truncate(sequence, length)
    except UnsupportedError:
        return False
    return True


# ---------------------------------------------------------------------------------------------
# Several prompts


def generate_batch(
    model: DecoderModel,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
    **sampling: Unpack[SamplingOptions],
) -> list[str]:
    """Continue several prompts at once; returns the texts in the order of the prompts.

    Each text is the same as that of :func:`generate`. As many prompts run at once as the model's cache has room for;
    others begin when a text ends. The other parameters are those of :func:`generate`. ``progress`` is called when a
    text ends.

    Raises
    ------
    BatchError
        The logits of some prompts were not finite. The error has the texts of all others.
    """
    texts: list[list[str]] = [[] for _ in prompts]
    done = 0
    try:
        for index, piece in stream_batch(model, prompts, max_new_tokens=max_new_tokens, **sampling):
            texts[index].append(piece.text)
            if piece.finish_reason is not None:
                done += 1
                if progress is not None:
                    progress(done, len(texts), "prompts")
    except BatchError as error:
        error.texts = ["".join(pieces) for pieces in texts]
        raise
    return ["".join(pieces) for pieces in texts]


def stream_batch(
    model: DecoderModel,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    **sampling: Unpack[SamplingOptions],
) -> Generator[tuple[int, Piece], None, None]:
    """As :func:`generate_batch`, piece by piece: ``(index of the prompt, piece)``, in the order in which they come.

    A :class:`~marlin_cy.errors.BatchError` is raised after the last piece of all other prompts.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: got {type(prompts).__name__}, expected a sequence of texts or tokens")
    tokenizer = tokenizer_of(model)
    params = SamplingParams(**sampling)
    jobs = deque[_Job]()
    for index, prompt in enumerate(prompts):
        tokens = _prompt_tokens(f"prompts[{index}]", prompt, model, tokenizer)
        writer = new_writer(model, tokenizer, tokens, params, max_new_tokens, continues=True)
        jobs.append(_Job(index, tokens, writer, model, max_new_tokens))
    return _run(model, jobs)


class _Job:
    """A prompt, and the text that follows it."""

    def __init__(
        self, index: int, tokens: list[int], writer: Writer, model: DecoderModel, max_new_tokens: int | None
    ) -> None:
        self.index = index
        self.pending: Sequence[int] = tokens  # the cache does not have them
        self.writer = writer
        self.sequence: Any = None
        most = model.context_length if max_new_tokens is None else len(tokens) + max_new_tokens
        self.positions = _whole_pages(min(most, model.context_length))
        """Positions of the cache that the whole text takes."""


def _run(model: DecoderModel, waiting: deque[_Job]) -> Generator[tuple[int, Piece], None, None]:
    running: list[_Job] = []
    errors: dict[int, MarlinError] = {}

    def end(job: _Job) -> None:
        running.remove(job)
        model.free(job.sequence)

    try:
        while waiting or running:
            while waiting and _begin(model, running, waiting[0]):
                running.append(waiting.popleft())
            for job, picked in _step(model, running):
                if not isinstance(picked, int):  # an error of these logits alone: the other prompts continue
                    errors[job.index] = picked
                    end(job)
                    continue
                piece = job.writer.put(picked)
                job.pending = piece.tokens
                if piece.finish_reason is not None:
                    end(job)
                yield job.index, piece
    finally:
        for job in running:
            model.free(job.sequence)
    if errors:
        raise BatchError(errors)


def _begin(model: DecoderModel, running: Sequence[_Job], job: _Job) -> bool:
    """Give a job a sequence, if the cache has room for the whole text beside the others. A job alone always begins."""
    wanted = sum(other.positions - _whole_pages(other.sequence.length) for other in running) + job.positions
    if running and wanted > model.free_tokens:
        return False
    try:
        job.sequence = model.new_sequence()
    except MemoryError:  # all slots of recurrent state are in use
        if not running:
            raise
        return False
    return True


def _whole_pages(tokens: int) -> int:
    """Positions of the pages that hold this many tokens."""
    return pages_of(tokens) * PAGE_TOKENS


def _step(model: DecoderModel, running: Sequence[_Job]) -> list[tuple[_Job, int | MarlinError]]:
    """Run one token of each text, and parts of prompts; returns what jobs without pending tokens picked."""
    room = FIRST_PART
    taking_part = []
    for job in running:
        part = job.pending
        if len(part) > 1:
            part = part[:room]
            room -= len(part)
        if part:
            taking_part.append((job, part))
    results = model.pick_batch(
        [(job.sequence, part) for job, part in taking_part],
        [job.writer.sampler if len(part) == len(job.pending) else None for job, part in taking_part],
    )
    complete = []
    for (job, part), picked in zip(taking_part, results, strict=True):
        job.pending = job.pending[len(part) :]
        if picked is not None:
            complete.append((job, picked))
    return complete


# ---------------------------------------------------------------------------------------------
# Arguments

_TOKENIZERS: WeakKeyDictionary[Any, Tokenizer] = WeakKeyDictionary()


def tokenizer_of(model: DecoderModel) -> Tokenizer:
    """The tokenizer of a model's folder, which is read once."""
    tokenizer = _TOKENIZERS.get(model)
    return keep_tokenizer(model, Tokenizer(model.folder)) if tokenizer is None else tokenizer


def keep_tokenizer(model: DecoderModel, tokenizer: Tokenizer) -> Tokenizer:
    """Use a tokenizer that was already read; returns it."""
    _TOKENIZERS[model] = tokenizer
    return tokenizer


def _prompt_tokens(name: str, prompt: Any, model: DecoderModel, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt, which is a text or tokens."""
    if isinstance(prompt, str):
        try:
            tokens = tokenizer.encode(prompt)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    elif hasattr(prompt, "__len__") and hasattr(prompt, "__getitem__") and not isinstance(prompt, (bytes, Mapping)):
        tokens = [integer(f"{name}[{index}]", token) for index, token in enumerate(prompt)]
    else:
        raise TypeError(f"{name}: got {type(prompt).__name__}, expected a str or token ids")
    check_tokens(name, tokens, model)
    return tokens


def check_tokens(name: str, tokens: Sequence[int], model: DecoderModel) -> None:
    if not tokens:
        raise ValueError(f"{name}: got no tokens, expected at least 1")
    for index, token in enumerate(tokens):
        if not 0 <= token < model.vocab_size:
            raise ValueError(f"{name}: got the token {token} at [{index}], expected 0 to {model.vocab_size - 1}")
    if len(tokens) >= model.context_length:
        raise ValueError(
            f"{name}: got {len(tokens)} tokens, but the model has a context of {model.context_length}, "
            "expected at least one less"
        )


def new_writer(
    model: DecoderModel,
    tokenizer: Tokenizer,
    tokens: list[int],
    params: SamplingParams,
    max_new_tokens: int | None,
    *,
    continues: bool,
    stops: bool = True,
) -> Writer:
    """A writer of the text after a prompt. Without ``stops``, the tokens with which the model ends a text do not."""
    if max_new_tokens is not None and integer("max_new_tokens", max_new_tokens) < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, expected at least 1")
    return Writer(
        params,
        model.vocab_size,
        tokens,
        tokenizer.stream(continues=continues),
        tokenizer.stop_ids if stops else frozenset(),
        max_new_tokens,
        model.context_length - len(tokens),
    )

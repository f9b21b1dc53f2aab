"""Answers to messages: a conversation in which what is known is not run again."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from marlin_cy.decoder.generate import check_tokens, forget, new_writer, pieces_of, tokenizer_of
from marlin_cy.decoder.protocol import DecoderModel, Progress
from marlin_cy.decoder.sampling import SamplingOptions, read_sampling
from marlin_cy.decoder.writer import Piece, Writer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Chat", "ChatOptions", "chat"]


class ChatOptions(SamplingOptions, total=False):
    """The keyword arguments of :meth:`Chat.answer`."""

    max_new_tokens: int | None
    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    template_options: Mapping[str, Any] | None
    progress: Progress | None


def chat(
    model: DecoderModel, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
) -> Generator[Piece, None, None]:
    """Answer messages, token by token. The parameters are those of :meth:`Chat.answer`."""
    conversation = Chat(model)
    pieces = conversation.answer(messages, **options)
    return _then_free(pieces, conversation)


def _then_free(pieces: Generator[Piece, None, None], conversation: Chat) -> Generator[Piece, None, None]:
    try:
        yield from pieces
    finally:
        conversation.free()


class Chat:
    """A conversation with a model. What the messages have in common with the last ones is not run again.

    Parameters
    ----------
    model : DecoderModel
    """

    def __init__(self, model: DecoderModel) -> None:
        self._model = model
        self._sequence: Any = None
        self._tokens: list[int] = []  # the sequence holds the first of them, as many as its length

    def answer(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generator[Piece, None, None]:
        """Answer messages, token by token. The last answer must have ended or been closed.

        Parameters
        ----------
        messages : sequence of mappings
            ``{"role": "user", "content": "Hello"}`` and so on, as the folder's chat template asks.
        max_new_tokens : int, optional
            By default the answer ends where the model ends it, or where its context is full.
        tools, documents : sequence of mappings, optional
            For the chat template.
        template_options : mapping, optional
            Further variables of the chat template, such as ``{"enable_thinking": False}``.
        progress : callable, optional
            Called as ``progress(done, total, description)`` after each part of a long prompt.
        **sampling
            Attributes of :class:`SamplingParams`. By default they are those of the folder's
            ``generation_config.json``. ``temperature=0`` takes the most likely token each time.

        Returns
        -------
        generator of Piece
            One piece a token. Closing it ends the answer.

        Raises
        ------
        TypeError, ValueError
            An argument is invalid, or the model's context has no room for the messages.
        CheckpointError
            The folder has no chat template, or the template refuses the messages.
        """
        model = self._model
        tokenizer = tokenizer_of(model)
        params = read_sampling(model.folder, **sampling)
        tokens = tokenizer.chat_tokens(messages, tools=tools, documents=documents, options=template_options)
        check_tokens("messages", tokens, model)
        writer = new_writer(model, tokenizer, tokens, params, max_new_tokens, continues=False)
        return self._pieces(tokens, writer, progress)

    def free(self) -> None:
        """Forget the conversation."""
        if self._sequence is not None:
            self._model.free(self._sequence)
        self._sequence, self._tokens = None, []

    def _pieces(self, tokens: list[int], writer: Writer, progress: Progress | None) -> Generator[Piece, None, None]:
        known = self._reuse(tokens)
        self._tokens = list(tokens)
        for piece in pieces_of(self._model, self._sequence, tokens[known:], writer, progress):
            self._tokens.extend(piece.tokens)
            yield piece

    def _reuse(self, tokens: Sequence[int]) -> int:
        """Cut the sequence to what it shares with these tokens, except the last of them; returns its length."""
        if self._sequence is None:
            self._sequence = self._model.new_sequence()
        held = self._tokens[: self._sequence.length]
        known = 0
        while known < min(len(held), len(tokens) - 1) and held[known] == tokens[known]:
            known += 1
        if known < self._sequence.length and not forget(self._model, self._sequence, known):
            self.free()
            self._sequence, known = self._model.new_sequence(), 0
        return known

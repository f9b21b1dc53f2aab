"""The methods of a model that take and return text."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from marlin_cy.decoder.chat import ChatOptions, chat
from marlin_cy.decoder.generate import generate, generate_batch
from marlin_cy.decoder.protocol import DecoderModel, Progress
from marlin_cy.decoder.sampling import SamplingOptions
from marlin_cy.decoder.writer import Piece

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["TextMethods"]


class TextMethods:
    """What :class:`~marlin_cy.decoder.model.Model` does with text. The folder must have a tokenizer."""

    def generate(
        self: DecoderModel,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generator[Piece, None, None]:
        """Continue a prompt, token by token: :func:`marlin_cy.decoder.generate.generate`."""
        return generate(self, prompt, max_new_tokens=max_new_tokens, progress=progress, **sampling)

    def generate_batch(
        self: DecoderModel,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> list[str]:
        """Continue several prompts at once: :func:`marlin_cy.decoder.generate.generate_batch`."""
        return generate_batch(self, prompts, max_new_tokens=max_new_tokens, progress=progress, **sampling)

    def chat(
        self: DecoderModel, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]
    ) -> Generator[Piece, None, None]:
        """Answer messages, token by token: :meth:`marlin_cy.decoder.chat.Chat.answer`."""
        return chat(self, messages, **options)

"""What generation needs of a model. :class:`marlin_cy.decoder.model.Model` has it; tests have a small one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from marlin_cy.errors import MarlinError

if TYPE_CHECKING:
    from marlin_cy.decoder.sampling import Sampler

__all__ = ["DecoderModel", "Logits", "Progress", "SequenceLike"]

Logits: TypeAlias = npt.NDArray[np.float32]

Progress: TypeAlias = Callable[[int, int, str], object]
"""Called as ``progress(done, total, description)``."""


class SequenceLike(Protocol):
    """The tokens that a model's cache holds of one text."""

    @property
    def length(self) -> int:
        """Number of tokens."""


class DecoderModel(Protocol):
    """A model with a cache of several sequences."""

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint, where its tokenizer is."""

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence."""

    @property
    def free_tokens(self) -> int:
        """Positions of the cache that no sequence holds, in whole pages."""

    @property
    def vocab_size(self) -> int:
        """Number of logits of a token."""

    def new_sequence(self) -> Any:
        """An empty sequence, a :class:`SequenceLike`."""

    def truncate(self, sequence: Any, length: int) -> None:
        """Forget the tokens of a sequence from position ``length`` on."""

    def free(self, sequence: Any) -> None:
        """Forget a sequence."""

    def forward(self, tokens: Sequence[int], *, sequence: Any = None, all_logits: bool = False) -> Logits:
        """Append tokens to a sequence; returns the logits ``[vocab_size]`` of the last one, or those of all."""

    def forward_batch(self, pairs: Sequence[tuple[Any, Sequence[int]]]) -> list[Logits]:
        """Append tokens to several sequences; returns the logits of each one's last token."""

    def pick_batch(
        self, pairs: Sequence[tuple[Any, Sequence[int]]], samplers: Sequence[Sampler | None]
    ) -> list[int | MarlinError | None]:
        """Append tokens to several sequences; returns the token that each one's sampler picks, or the error.

        A sampler may be None: then no token is picked.
        """

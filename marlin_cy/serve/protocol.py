"""What serving needs of a model, beside what generation needs."""

from __future__ import annotations

from typing import Any, Protocol

from marlin_cy.decoder.protocol import DecoderModel

__all__ = ["ServedModel"]


class ServedModel(DecoderModel, Protocol):
    """A model whose sequences can share a part of the cache."""

    def fork(self, sequence: Any) -> Any:
        """A sequence with the same tokens."""

"""marlin_cy inside other libraries: ``transformers.py`` loads whole models, ``vllm/`` is a plugin of vLLM."""

from __future__ import annotations

from contextlib import AbstractContextManager

from marlin_cy.extras import needs

__all__ = ["needs_extra"]


def needs_extra() -> AbstractContextManager[None]:
    """Context for imports of PyTorch and transformers: :func:`marlin_cy.extras.needs`."""
    return needs("PyTorch and transformers 5.8 or later", "transformers")

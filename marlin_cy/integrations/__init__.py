"""marlin_cy inside other libraries: ``marlin_cy.integrations.transformers`` loads whole models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from marlin_cy.errors import BackendUnavailable

__all__ = ["needs_extra"]


@contextmanager
def needs_extra() -> Iterator[None]:
    """Context for imports of PyTorch and transformers. An import error becomes an error that says how to install them.

    Raises
    ------
    BackendUnavailable
        An import inside the context failed.
    """
    try:
        yield
    except BackendUnavailable:
        raise
    except ImportError as error:
        raise BackendUnavailable(
            f"PyTorch and transformers 5.8 or later are needed ({error}); pip install 'marlin-cy[transformers]'"
        ) from error

"""The library inside others: ``marlin_cy.integrations.transformers`` loads whole models."""

from contextlib import contextmanager

from marlin_cy.errors import BackendUnavailable

__all__ = ["needs_extra"]


@contextmanager
def needs_extra():
    """Around imports of PyTorch and transformers: where one fails, say how to install them.

    Raises
    ------
    BackendUnavailable
    """
    try:
        yield
    except BackendUnavailable:
        raise
    except ImportError as error:
        raise BackendUnavailable(
            f"PyTorch and transformers 5.8 or later are needed ({error}); pip install 'marlin-cy[transformers]'"
        ) from error

"""Optional dependencies: an import that fails says how to install them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from marlin_cy.errors import BackendUnavailable

__all__ = ["needs"]


@contextmanager
def needs(packages: str, extra: str) -> Iterator[None]:
    """Context for imports of an extra's packages. An import error becomes an error that says how to install them.

    Parameters
    ----------
    packages : str
        In words: ``"tokenizers and jinja2"``.
    extra : str
        The name of the extra in ``pyproject.toml``.

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
        raise BackendUnavailable(f"{packages} are needed ({error}); pip install 'marlin-cy[{extra}]'") from error

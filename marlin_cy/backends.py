"""The backends by name: one row each, imported when first asked for."""

from importlib import import_module
from typing import NamedTuple

from marlin_cy.errors import BackendUnavailable

__all__ = ["BACKENDS", "available_backends", "get_backend"]


class _Row(NamedTuple):
    """Where a backend lives.

    ``factory`` names the callable that makes it; ``availability`` the one that returns None, or the
    reason why it cannot run here (left out where being importable is enough).
    """

    module: str
    factory: str
    availability: str | None = None


BACKENDS = {
    "cpu": _Row("marlin_cy.cpu", "CpuBackend"),
    "opencl": _Row("marlin_cy.opencl", "backend", "availability"),
}


def get_backend(name, **options):
    """The backend called ``name``.

    Parameters
    ----------
    name : str
        ``"cpu"`` or ``"opencl"``.
    **options
        The backend's own.

    Returns
    -------
    Backend

    Raises
    ------
    TypeError
        ``name`` is not a string.
    ValueError
        No backend has that name.
    BackendUnavailable
        The backend cannot run on this machine; the message says why.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, expected str")
    if name not in BACKENDS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    row = BACKENDS[name]
    return getattr(_imported(name, row), row.factory)(**options)


def available_backends():
    """Which backends work here.

    Returns
    -------
    dict of str to (str or None)
        For each backend's name None if it is usable, else the reason why not.
    """
    return {name: _reason_missing(name, row) for name, row in BACKENDS.items()}


def _reason_missing(name, row):
    try:
        module = _imported(name, row)
    except BackendUnavailable as error:
        return str(error)
    return getattr(module, row.availability)() if row.availability else None


def _imported(name, row):
    try:
        return import_module(row.module)
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {name!r}: {row.module} cannot be imported ({error}); "
            "install marlin-cy anew, which compiles it (in its source folder: pip install .)"
        ) from error

"""The exception types that are this library's own.

A caller's mistake (wrong dtype, shape, range) is a built-in ``TypeError``, ``ValueError`` or
``IndexError`` whose message names the argument, what it got and what was expected. The classes
below say what those three cannot.
"""

__all__ = ["BackendUnavailable", "CheckpointError", "ContextInUse", "MarlinError", "UnsupportedError"]


class MarlinError(Exception):
    """Base class of this library's own exceptions."""


class UnsupportedError(MarlinError, NotImplementedError):
    """The request is well formed, but this backend or format cannot do it (3-bit weights, say)."""


class BackendUnavailable(MarlinError, ImportError):
    """A backend cannot run on this machine. The message says why and what to install."""


class ContextInUse(MarlinError, RuntimeError):
    """A :class:`~marlin_cy.interface.Context` was entered by two threads at once."""


class CheckpointError(MarlinError, ValueError):
    """A checkpoint is damaged, or contradicts itself.

    Parameters
    ----------
    reason : str
        What is wrong, with what was found and what was expected.
    file : path-like, optional
        The file in which it was found.
    tensor : str, optional
        The tensor that is wrong or missing.
    """

    def __init__(self, reason, *, file=None, tensor=None):
        self.reason = reason
        self.file = None if file is None else str(file)
        self.tensor = tensor
        where = [self.file] if file is not None else []
        if tensor is not None:
            where.append(f"tensor {tensor!r}")
        super().__init__(f"{', '.join(where)}: {reason}" if where else reason)
